"""Two machines on a folder whose locks don't reach from one to the other don't damage the store."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bapo_plugin import machines
from bapo_plugin.machines import OtherMachine
from bapo_plugin.store import Store

# another machine: it says when it has the store, and goes on until its input ends
HOLDER = """
import sys
from bapo_plugin import machines
machines._this_machine, machines._BEAT = lambda: "other", 0.05
machines._on_a_local_disk = lambda folder: False
from bapo_plugin.store import Store
with Store(sys.argv[1]) as store:
    store.put("a", {"1": b"theirs"})
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machines, "_BEAT", 0.05)
    monkeypatch.setattr(machines, "_WATCH", 1.0)
    monkeypatch.setattr(machines, "_STALE", 1.0)
    monkeypatch.setattr(machines, "_on_a_local_disk", lambda folder: False)


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "s.sqlite"


@pytest.fixture
def holder(store_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, store_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def sign(store_path):
    return store_path.with_name("s.sqlite-machine")


def said(store_path):
    with sign(store_path).open("rb") as file:
        return machines._read(file.fileno())


def write_sign(store_path, host, when, size):
    with sign(store_path).open("r+b" if sign(store_path).exists() else "wb") as file:
        file.write(f"other {host} {when} {size}\n".rjust(200).encode())


def no_locks(monkeypatch):
    """As on a folder that grants locks on each machine alone."""
    monkeypatch.setattr(machines, "_locked", lambda handle, kind: True)


def test_refused_while_another_machine_is_at_it(store_path, holder, monkeypatch):
    no_locks(monkeypatch)
    with pytest.raises(OtherMachine, match="s.sqlite is in use by another machine, .*`shards_idx`"):
        Store(store_path)
    holder.stdin.close()
    holder.wait()
    assert said(store_path).when == "ended"
    start = time.monotonic()
    with Store(store_path) as store:
        assert store.get("a", ["1"]) == {"1": b"theirs"}
    assert time.monotonic() - start < 1.0, "a machine that has said it is gone was waited for"
    assert said(store_path)[::2] == (machines._this_machine(), "ended")


def test_shared_where_locks_hold(store_path, holder):
    with Store(store_path) as store:
        store.put("a", {"2": b"ours"})
        assert store.get("a", ["1", "2"]) == {"1": b"theirs", "2": b"ours"}
    assert said(store_path).machine == "other" and said(store_path).when != "ended"


@pytest.mark.parametrize("locks_hold", [True, False])
def test_taken_over_from_a_machine_that_is_gone(store_path, holder, monkeypatch, locks_hold):
    if not locks_hold:
        no_locks(monkeypatch)
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with Store(store_path) as store:
        assert time.monotonic() - start > 1.0, "nobody looked whether it is still there"
        assert store.get("a", ["1"]) == {"1": b"theirs"}
        assert said(store_path).machine == machines._this_machine()


def test_processes_of_one_machine_share(store_path, holder, monkeypatch):
    """The last one says that the machine is done, also after one that was killed."""
    monkeypatch.setattr(machines, "_this_machine", lambda: "other")
    with Store(store_path), Store(store_path) as store:
        assert store.get("a", ["1"]) == {"1": b"theirs"}
    assert said(store_path).when != "ended"
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with Store(store_path) as store:
        store.put("a", {"2": b"ours"})
    assert time.monotonic() - start < 1.0
    assert said(store_path).when == "ended" and said(store_path).size == store_path.stat().st_size


def test_a_machine_that_slept_finds_the_store_taken(store_path):
    with Store(store_path) as store:
        store.put("a", {"1": b"x"})
        write_sign(store_path, "their-name", "1", 0)
        for _ in range(100):
            time.sleep(0.02)
            if store._machine._sign.taken_by:
                break
        with pytest.raises(OtherMachine, match="their-name"):
            store.put("a", {"2": b"x"})
    assert said(store_path).machine == "other"


@pytest.mark.parametrize("when", ["ended", "1"])
def test_an_old_state_is_not_taken_for_what_another_machine_left(store_path, when):
    """On sshfs a file has its old length for 20 s; SQLite would write a new store over one that seems empty."""
    with Store(store_path) as store:
        store.put("a", {"1": bytes(5000)})
    size = store_path.stat().st_size
    content = store_path.read_bytes()
    store_path.write_bytes(b"")
    write_sign(store_path, "their-name", when, size)
    with pytest.raises(
        OtherMachine, match=f"0 bytes here, and had {size} when .* their-name .* old state"
    ):
        Store(store_path)
    assert store_path.read_bytes() == b""
    timer = threading.Timer(0.5, lambda: store_path.write_bytes(content))
    timer.start()
    with Store(store_path) as store:  # it waits
        assert store.get("a", ["1"]) == {"1": bytes(5000)}
    timer.join()


def test_a_store_that_was_deleted_is_made_anew(store_path):
    write_sign(store_path, "their-name", "ended", 10**6)
    with Store(store_path) as store:
        store.put("a", {"1": b"x"})


def test_local_disks_need_no_sign(tmp_path, monkeypatch):
    monkeypatch.undo()
    with Store(tmp_path / "s.sqlite") as store:
        store.put("a", {"1": b"x"})
    local = machines._on_a_local_disk(tmp_path)
    assert (tmp_path / "s.sqlite-machine").exists() != local
    disks = [
        ("/", "ext4"),
        ("/data", "nfs4"),
        ("/data/fast", "xfs"),
        ("/database", "ext4"),
        ("/data/b", "ext4"),
    ]
    disks = [
        SimpleNamespace(mountpoint=place, fstype=kind)
        for place, kind in [*disks, ("/data/b", "fuse.sshfs")]
    ]
    monkeypatch.setattr(machines.psutil, "disk_partitions", lambda all: disks)
    found = {
        name: machines._on_a_local_disk(Path(name))
        for name in ("/x", "/data/x", "/data/fast/x", "/database", "/data/b/x")
    }
    assert found == {
        "/x": True,
        "/data/x": False,
        "/data/fast/x": True,
        "/database": True,
        "/data/b/x": False,
    }


def test_a_sign_shows_life(store_path):
    with Store(store_path):
        seen = set()
        for _ in range(20):
            seen.add(said(store_path).when)
            time.sleep(0.03)
    assert len(seen) > 3 and sign(store_path).stat().st_size == 200


def test_a_sign_that_cannot_be_written_keeps_nobody_away(store_path, monkeypatch):
    real = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("-machine"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with Store(store_path) as store:
        store.put("a", {"1": b"x"})
        assert store.get("a", ["1"]) == {"1": b"x"}
