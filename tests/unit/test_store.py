"""The store keeps what it is given, through kills, damage and several processes."""

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from bapo_plugin.store import Store, StoreDamaged

WRITER = """
import sys
from bapo_plugin.store import Store
store = Store(sys.argv[1])
for i in range(10**6):
    store.put("n", {f"{i}a": bytes([i % 256]) * 900, f"{i}b": bytes([i % 256]) * 900})
    print(i, flush=True)
"""


def content(path):
    with Store(path) as store:
        return dict(store._db.execute("SELECT key, value FROM entries"))


def test_put_and_get(tmp_path):
    path = tmp_path / "new" / "s.sqlite"
    values = {str(i): os.urandom(20) for i in range(1200)}  # more than one query's worth
    with Store(path) as store:
        store.put("a", values)
        store.put("b", {"1": b"other kind"})
    with Store(path) as store:
        assert store.get("a", [*values, "absent"]) == values
        assert store.get("b", ["1", "2"]) == {"1": b"other kind"}
        store.put("b", {"1": b"new"})
        assert store.get("b", ["1"]) == {"1": b"new"}


def test_killed_while_writing(tmp_path):
    """Whatever was reported as written is there, and each write is there as a whole."""
    path = tmp_path / "s.sqlite"
    generator = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        reported = 1 + len(process.stdout.read().split())
        process.wait()
        found = content(path)
        assert {f"{i}{c}" for i in range(reported) for c in "ab"} <= found.keys()
        assert {key[:-1] for key in found if key[-1] == "a"} == {
            key[:-1] for key in found if key[-1] == "b"
        }


def read(path, keys, whole):
    with Store(path, "base responses") as store:
        if whole:
            store.verify()
        return store.get("a", keys)


@pytest.mark.parametrize("whole", [False, True], ids=["read", "verified"])
@pytest.mark.parametrize("seed", [*range(12), 351])  # 351: in a key, which is no UTF-8 then
def test_a_flipped_bit_is_found_or_harmless(tmp_path, seed, whole):
    path = tmp_path / "s.sqlite"
    values = {f"key{i}": f"value {i} ".encode() * 20 for i in range(300)}
    with Store(path, "base responses") as store:
        store.put("a", values)
        assert store.verify() == 300
    raw = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(raw))
    raw[place] ^= 1 << (seed % 8)
    path.write_bytes(raw)
    try:
        found = read(path, values, whole)
    except StoreDamaged as error:
        assert "set aside as s.sqlite.damaged-" in str(error)
        (aside,) = tmp_path.glob("s.sqlite.damaged-*")
        assert aside.read_bytes() == raw
        found = read(path, values, whole)
        assert len(found) > 150, "sound entries were lost"
    except ValueError as error:  # the flipped bit is in the number of the format
        assert "newer version" in str(error)
        return
    assert found.items() <= values.items(), "a wrong value came out"
    assert len(found) > 150


def test_only_what_lies_in_damaged_pages_is_lost(tmp_path):
    path = tmp_path / "s.sqlite"
    values = {f"{i:03}": f"<{i:03}>".encode() * 100 for i in range(300)}
    with Store(path) as store:
        for key, value in values.items():
            store.put("a", {key: value})
        size = store._db.execute("PRAGMA page_size").fetchone()[0]
    raw, lost = bytearray(path.read_bytes()), set()
    for key in ("050", "150", "250"):
        start = raw.index(values[key]) // size * size
        lost |= {key for key, value in values.items() if value in raw[start : start + size]}
        raw[start : start + size] = bytes(size)
    path.write_bytes(raw)
    with pytest.raises(StoreDamaged):
        read(path, values, whole=True)
    assert content(path).keys() == values.keys() - lost and 9 <= len(lost) < 30


def test_a_small_answer_takes_no_page_of_its_own(tmp_path):
    """In a table that is kept as an index all beyond a quarter of a page lies elsewhere: 3.4 kB for an answer of 1 kB."""
    path = tmp_path / "s.sqlite"
    keys = [hashlib.sha256(bytes([i])).hexdigest() for i in range(250)]
    with Store(path) as store:
        for key in keys:
            store.put("a", {key: bytes(1000)})
    assert path.stat().st_size < 1.6 * 1000 * len(keys)


def test_what_is_no_store_is_set_aside(tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"not a database, but longer than a hundred bytes" * 9)
    with pytest.raises(StoreDamaged, match="0 sound entries.*start again"):
        Store(path)
    assert content(path) == {}


def test_newer_format_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "s.sqlite"
    Store(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ValueError, match=r"newer version.*99.*update the plugin"):
        Store(path)
    assert list(tmp_path.iterdir()) == [path]


def test_moved_while_open(tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="moved or replaced"):
            store.put("a", {"1": b""})


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((ValueError, OSError)):
        Store(tmp_path / "file" / "s.sqlite")


CLAIMER = """
import sys, time
from bapo_plugin.store import Store
store = Store(sys.argv[1])
print(",".join(store.claim(sys.argv[2].split(","))), flush=True)
time.sleep(60)
"""


def test_claims_exclude_other_processes_and_end_with_them(tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIMER, path, "x,y"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline().strip() == "x,y"
        assert store.claim(["x", "z"]) == ["z"]
        assert store.claim(["z"]) == ["z"], "a claim of one's own can be claimed again"
        process.kill()
        process.wait()
        assert store.claim(["x"]) == ["x"]
        store.put("a", {"x": b"1"}, done=["x"])
        store.release(["z"])
        assert store._db.execute("SELECT key FROM claims").fetchall() == [("y",)]


def test_the_first_writer_of_an_entry_wins(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        assert store.put_first("date", "now", b"monday") == b"monday"
        assert store.put_first("date", "now", b"tuesday") == b"monday"


def test_claims_of_another_machine_end_without_a_sign_of_life(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store._owner = ("elsewhere", 1, 0.0)
        store.claim(["x"])
        store._owner = ("here", 2, 0.0)
        assert store.claim(["x"]) == []
        store._db.execute("UPDATE claims SET renewed = renewed - 121")
        assert store.claim(["x"]) == ["x"]


def test_claims_are_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr("bapo_plugin.store._LEASE", 0.2)
    with Store(tmp_path / "s.sqlite") as store:
        store.claim(["x"])
        before = store._db.execute("SELECT renewed FROM claims").fetchone()
        with store.keep_claims_alive():
            for _ in range(300):
                if store._db.execute("SELECT renewed FROM claims").fetchone() > before:
                    return
                time.sleep(0.1)
    raise AssertionError("not renewed in half a minute")


def test_a_full_disk_is_said_and_nothing_half_written_is_read(tmp_path):
    """A limit on the size of files stands for the disk: SQLite's writes fail in the middle of one."""
    code = """
import resource, signal, sys
from bapo_plugin.store import Store
store = Store(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for i in range(1000):
    try:
        store.put("kind", {f"{i}-{j}": bytes([i % 256]) * 1000 for j in range(7)})
    except ValueError as error:
        print("WRITTEN", i, error)
        break
"""
    path = tmp_path / "store.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    written, message = done.stdout.split("WRITTEN ")[1].split(" ", 1)
    assert "can't be used" in message and str(path) in message
    with Store(path) as store:
        keys = [f"{i}-{j}" for i in range(1000) for j in range(7)]
        assert len(store.get("kind", keys)) == 7 * int(written) > 0
        store.put("kind", {"more": b"x"})


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be made: .*; name another dataset_prepared_path"):
        Store(tmp_path / "file" / "store.sqlite")


def test_opening_reads_no_entries(tmp_path):
    """Else a store of a million answers takes ten seconds, in every process."""
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.put("a", {str(i): bytes(1000) for i in range(3000)})
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    seen = []
    with Store(path) as store:
        store._db.set_progress_handler(lambda: seen.append(1), 100)
        assert store.get("a", ["7"]) == {"7": bytes(1000)}
    assert pages > 700 and len(seen) < 20, "more was read than one entry"
    # a damaged entry is found by who reads it, and by `verify`
    db = sqlite3.connect(path)
    db.execute("UPDATE entries SET value = x'00' WHERE key = '8'")
    db.commit()
    db.close()
    with Store(path) as store:
        assert store.get("a", ["7"]) == {"7": bytes(1000)}
        with pytest.raises(StoreDamaged, match="entry 8 .* 2999 sound entries"):
            store.verify()
