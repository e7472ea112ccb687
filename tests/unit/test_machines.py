"""Two machines on a folder whose locks don't reach from one to the other don't damage the store."""

import gc
import os
import signal
import sqlite3
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from bapo_plugin import machines
from bapo_plugin.machines import OtherMachine
from bapo_plugin.store import Store


def in_a_child(work) -> int:
    child = os.fork()
    if not child:
        code = 9
        try:
            code = work()
        finally:
            os._exit(code)
    return child


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(machines, "_BEAT", 0.05)
    monkeypatch.setattr(machines, "_on_a_local_disk", lambda folder: False)


@pytest.fixture
def waits_a_second(monkeypatch):
    """For what waits to the end. Elsewhere a slow machine of the tests has all the time that users have."""
    monkeypatch.setattr(machines, "_WATCH", 1.0)
    monkeypatch.setattr(machines, "_STALE", 1.0)


@pytest.fixture
def waits_for_nobody(monkeypatch):
    watch = Mock(side_effect=AssertionError("a machine that is known to be gone is waited for"))
    monkeypatch.setattr(machines._Sign, "_watch", watch)


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "s.sqlite"


class Holder:
    """Another machine, which has the store until it is told to end."""

    def __init__(self, path):
        self.path = path
        self.ready, self.go = os.pipe(), os.pipe()
        self.pid = in_a_child(self._hold)
        assert os.read(self.ready[0], 1) == b"x"

    def _hold(self) -> int:
        os.close(self.go[1])
        machines._this_machine = lambda folder: "other"
        with Store(self.path) as store:
            store.put("a", {"1": b"theirs"})
            os.write(self.ready[1], b"x")
            os.read(self.go[0], 1)
        return 0

    def end(self) -> None:
        os.write(self.go[1], b"x")
        os.waitpid(self.pid, 0)
        self.pid = None

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None


@pytest.fixture
def holder(store_path):
    holder = Holder(store_path)
    yield holder
    holder.kill()
    for handle in (*holder.ready, *holder.go):
        os.close(handle)


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


def test_refused_while_another_machine_is_at_it(store_path, holder, monkeypatch, request):
    no_locks(monkeypatch)
    with pytest.raises(OtherMachine, match="s.sqlite is in use by another machine, .*`shards_idx`"):
        Store(store_path)
    holder.end()
    assert said(store_path).when == "ended"
    request.getfixturevalue("waits_for_nobody")
    with Store(store_path) as store:
        assert store.get("a", ["1"]) == {"1": b"theirs"}
    assert said(store_path)[::2] == (machines._this_machine(store_path.parent), "ended")


def test_shared_where_locks_hold(store_path, holder):
    with Store(store_path) as store:
        store.put("a", {"2": b"ours"})
        assert store.get("a", ["1", "2"]) == {"1": b"theirs", "2": b"ours"}
    assert said(store_path).machine == "other" and said(store_path).when != "ended"


@pytest.mark.usefixtures("waits_a_second")
@pytest.mark.parametrize("locks_hold", [True, False])
def test_taken_over_from_a_machine_that_is_gone(store_path, holder, monkeypatch, locks_hold):
    if not locks_hold:
        no_locks(monkeypatch)
    holder.kill()
    start = time.monotonic()
    with Store(store_path) as store:
        assert time.monotonic() - start > 1.0, "nobody looked whether it is still there"
        assert store.get("a", ["1"]) == {"1": b"theirs"}
        assert said(store_path).machine == machines._this_machine(store_path.parent)


@pytest.mark.usefixtures("waits_for_nobody")
def test_processes_of_one_machine_share(store_path, holder, monkeypatch):
    """The last one says that the machine is done, also after one that was killed."""
    monkeypatch.setattr(machines, "_this_machine", lambda folder: "other")
    with Store(store_path), Store(store_path) as store:
        assert store.get("a", ["1"]) == {"1": b"theirs"}
    assert said(store_path).when != "ended"
    holder.kill()
    with Store(store_path) as store:
        store.put("a", {"2": b"ours"})
    assert said(store_path).when == "ended" and said(store_path).size == store_path.stat().st_size


def test_a_machine_that_slept_finds_the_store_taken(store_path):
    with Store(store_path) as store:
        store.put("a", {"1": b"x"})
        write_sign(store_path, "their-name", "1", 0)
        for _ in range(1500):
            time.sleep(0.02)
            if store._machine._sign.taken_by:
                break
        with pytest.raises(OtherMachine, match="their-name"):
            store.put("a", {"2": b"x"})
    assert said(store_path).machine == "other"


@pytest.mark.usefixtures("waits_a_second")
@pytest.mark.parametrize("when", ["ended", "1"])
def test_an_old_state_is_not_taken_for_what_another_machine_left(store_path, when, monkeypatch):
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
    monkeypatch.setattr(machines, "_STALE", 30.0)
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


def test_a_machine_that_lost_the_store_writes_nothing_more(store_path):
    with Store(store_path) as store:
        store.put("a", {"1": b"x"})
        mine = store.claim(["2"])
        store._machine._sign.taken_by = "their-name"
        before = store_path.read_bytes()
        store.release(mine)
        with pytest.raises(OtherMachine):
            store._set_aside(sqlite3.DatabaseError("damage that the other machine did"))
    assert store_path.read_bytes() == before and len(list(store_path.parent.glob("*damaged*"))) == 0


def test_a_machine_that_begins_again_meanwhile_is_not_taken_over(store_path, monkeypatch):
    """While an old state is waited for."""
    no_locks(monkeypatch)
    with Store(store_path) as store:
        store.put("a", {"1": b"x"})
    write_sign(store_path, "their-name", "ended", 10**6)
    alive = threading.Event()

    def begin() -> None:
        for when in range(100):
            if alive.wait(0.03):
                return
            if when > 10:
                write_sign(store_path, "their-name", when, 10**6)

    thread = threading.Thread(target=begin)
    thread.start()
    with pytest.raises(OtherMachine, match="in use by another machine, their-name"):
        Store(store_path)
    alive.set()
    thread.join()
    assert said(store_path).machine == "other"


def test_processes_that_begin_together_are_refused_together(store_path, holder, monkeypatch):
    """Locks hold among them alone. One that tries the other machine's lock must not make it look taken to its siblings."""
    really_locked, really_close, others = machines._locked, os.close, []

    def locked(handle, kind):
        # the holder doesn't know this file
        others.append(os.open(f"{store_path}-here", os.O_RDWR | os.O_CREAT))
        got = really_locked(others[-1], kind)
        time.sleep(0.1)  # a slow network
        return got

    def close(handle):
        really_close(handle)
        while others:
            really_close(others.pop())

    monkeypatch.setattr(machines, "_locked", locked)
    monkeypatch.setattr(os, "close", close)
    start = time.monotonic() + 0.3

    def begin() -> int:
        time.sleep(max(0, start - time.monotonic()))
        try:
            Store(store_path)
        except OtherMachine:
            return 0
        return 1

    children = [in_a_child(begin) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_a_store_that_is_forgotten_ends(store_path):
    store = Store(store_path)
    assert said(store_path).when != "ended"
    del store
    gc.collect()
    assert said(store_path).when == "ended" and not machines._open


def test_two_names_of_a_store_are_one(store_path, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "other.sqlite").symlink_to(store_path)
    with Store(store_path):
        Store(tmp_path / "link/s.sqlite").close()
        Store(tmp_path / "other.sqlite").close()
        assert said(store_path).when != "ended" and len(machines._open) == 1


def test_a_sign_that_is_a_link_is_not_followed(store_path, tmp_path):
    (tmp_path / "precious").write_text("mine")
    sign(store_path).symlink_to(tmp_path / "precious")
    with Store(store_path) as store:
        store.put("a", {"1": b"x"})
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["a b", "", "ü" * 64, "\udcff", "x" * 300])
def test_any_name_of_a_machine(store_path, monkeypatch, name):
    monkeypatch.setattr(machines.socket, "gethostname", lambda: name)
    for _ in range(2):
        with Store(store_path):
            assert said(store_path).machine == machines._this_machine(store_path.parent)
            assert sign(store_path).stat().st_size == 200


@pytest.mark.usefixtures("waits_a_second")
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 200, b"other host 1 \xc2\xb2", b"words", b"x" * 5000]
)
def test_a_sign_that_says_nothing(store_path, content):
    sign(store_path).write_bytes(content)
    with Store(store_path) as store:
        store.put("a", {"1": b"x"})


@pytest.mark.usefixtures("waits_for_nobody")
def test_a_new_sign_that_cannot_be_written_is_taken_away(store_path, monkeypatch):
    """Else everybody would wait to see whether its machine is there."""
    monkeypatch.setattr(os, "pwrite", Mock(side_effect=OSError(28, "No space left on device")))
    for _ in range(2):
        with Store(store_path):
            assert not sign(store_path).exists()


def test_a_child_begins_anew(store_path):
    def work() -> int:
        with Store(store_path) as store:
            store.put("a", {"1": b"child"})
        return 0

    with Store(store_path) as store:
        assert os.waitpid(in_a_child(work), 0)[1] == 0
        assert said(store_path).when != "ended"
        assert store.get("a", ["1"]) == {"1": b"child"}


def test_a_sign_shows_life(store_path):
    with Store(store_path):
        seen = set()
        for _ in range(1000):
            seen.add(said(store_path).when)
            if len(seen) > 3:
                break
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
