"""A small crash-safe store: what was computed once and must not be computed, or lost, again.

One SQLite file. A write is on disk as a whole or not at all, whatever moment the process is killed at.
Every entry carries a checksum of its own and is verified when it is read, so that a damaged disk or a
flipped bit is found before it is used: the file is then set aside, its sound entries are copied to a
new one, and the run stops with a message. Opening reads no entries, however many there are; `verify`
reads them all. Several processes may use one store; by `claim` they share out work among
themselves without doing it twice.
"""

import hashlib
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil

from bapo_plugin.files import writing
from bapo_plugin.machines import Machine
from bapo_plugin.trust import refuse_strangers

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, checksum BLOB NOT NULL, PRIMARY KEY (kind, key)
);
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, started REAL NOT NULL, renewed REAL NOT NULL
) WITHOUT ROWID;
"""
_VERSION = 1
_LEASE = 120.0  # seconds without a sign of life after which another machine's claim is void
_PATIENCE = 60  # seconds to wait for a lock
_KEYS_A_QUERY = 500
_ELSEWHERE = "name another dataset_prepared_path"


class StoreDamaged(ValueError):
    """The store was damaged and has been set aside; the text says where it is and what was saved."""


class Store:
    """Entries (kind, key) -> bytes in a SQLite file.

    Args:
        path: the file; it and its folder are made if they are not there.
        content: what the entries are, for messages ("anchors").

    Raises:
        StoreDamaged: the file is not a store, or not a sound one; it was set aside.
        ValueError: the file was written by a newer version, may be another user's work, or is in use by a machine whose locks
            aren't seen here.
    """

    def __init__(self, path: str | Path, content: str = "entries"):
        self.path = Path(path).absolute()
        self.content = content
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the store of {content} {self.path} can't be made: {error}; {_ELSEWHERE}"
            ) from error
        refuse_strangers(self.path, self.path.with_name(f"{self.path.name}-journal"))
        self._owner = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self._file = self._inode()
        self._machine = Machine(self.path, content)
        try:
            self._open()
        except BaseException:
            self._machine.close()
            raise

    def _open(self) -> None:
        with self._damage_is_fatal():
            self._db = _connect(self.path)
            self._file = self._inode()
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise ValueError(
                    f"{self.path} was written by a newer version of this plugin (format {version}, known is "
                    f"{_VERSION}); update the plugin, or name another store"
                )
            if version < _VERSION:
                self._db.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT"
                )

    def verify(self) -> int:
        """Read the whole file.

        Returns:
            The number of entries; all are sound.

        Raises:
            StoreDamaged: the file was set aside.
        """
        count = 0
        with self._damage_is_fatal():
            fault = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise sqlite3.DatabaseError(fault)
            for kind, *entry in self._db.execute("SELECT * FROM entries"):
                _check(kind, *entry)
                count += 1
        return count

    def get(self, kind: str, keys: Iterable[str]) -> dict[str, bytes]:
        """The entries that are there.

        Raises:
            StoreDamaged: one of them isn't sound; the file was set aside.
        """
        keys, found = list(keys), {}
        with self._damage_is_fatal():
            for start in range(0, len(keys), _KEYS_A_QUERY):
                part = keys[start : start + _KEYS_A_QUERY]
                marks = ",".join("?" * len(part))
                query = (
                    f"SELECT key, value, checksum FROM entries WHERE kind = ? AND key IN ({marks})"  # nosec B608 # marks are ?
                )
                for key, value, checksum in self._db.execute(query, (kind, *part)):
                    _check(kind, key, value, checksum)
                    found[key] = value
        return found

    def put(self, kind: str, entries: Mapping[str, bytes], done: Iterable[str] = ()) -> None:
        """Write entries, all or none, and give back the claims `done` in the same moment."""
        rows = [(kind, key, value, _checksum(kind, key, value)) for key, value in entries.items()]
        with self._damage_is_fatal(), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", rows)
            self._release(done)

    def remove(self, kind: str, keys: Iterable[str]) -> None:
        """Take entries out that turned out to be wrong."""
        with self._damage_is_fatal(), self._transaction():
            self._db.executemany(
                "DELETE FROM entries WHERE kind = ? AND key = ?", [(kind, key) for key in keys]
            )

    def put_first(self, kind: str, key: str, value: bytes) -> bytes:
        """Write an entry if there is none; returns the one that is there then."""
        row = (kind, key, value, _checksum(kind, key, value))
        with self._damage_is_fatal(), self._transaction():
            self._db.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?)", row)
        return self.get(kind, [key])[key]

    def claim(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are now this process's to compute, because they are nobody else's.

        What another process has computed before the claim is in the store by then: look once more. A claim
        ends with `put(done=...)` or `release`, with the process, or, where that can't be seen from here
        (another machine), two minutes after its last sign of life.
        """
        with self._damage_is_fatal(), self._transaction():
            mine = []
            for key in keys:
                row = self._db.execute("SELECT * FROM claims WHERE key = ?", (key,)).fetchone()
                if row and row[1:4] != self._owner and _alive(*row[1:]):
                    continue
                mine.append(key)
            now = time.time()
            self._db.executemany(
                "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?)",
                [(key, *self._owner, now) for key in mine],
            )
        return mine

    def release(self, keys: Iterable[str]) -> None:
        """Give claims back without a result. Where that can't be written they end with the process."""
        if self._machine.taken:
            return
        try:
            with self._transaction():
                self._release(keys)
        except sqlite3.OperationalError:
            pass  # an error under way says more; else the next write meets the same fault

    @contextmanager
    def keep_claims_alive(self):
        """Inside, a thread renews this process's claims, for other machines to see."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(_LEASE / 4) and not self._machine.taken:
                try:
                    with closing(_connect(self.path)) as db:
                        db.execute(
                            "UPDATE claims SET renewed = ? WHERE host = ? AND pid = ? AND started = ?",
                            (time.time(), *self._owner),
                        )
                except sqlite3.Error:
                    pass  # the main thread meets the same fault and reports it

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        self._db.close()
        self._machine.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- inside

    def _release(self, keys: Iterable[str]) -> None:
        self._db.executemany(
            "DELETE FROM claims WHERE key = ? AND host = ? AND pid = ? AND started = ?",
            [(key, *self._owner) for key in keys],
        )

    @contextmanager
    def _transaction(self):
        self._check_in_place()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk has ended the transaction already
                self._db.execute("ROLLBACK")
            raise

    def _check_in_place(self) -> None:
        if self._inode() != self._file:
            raise ValueError(
                f"{self.path} was moved or replaced while it was in use; start again to go on with what is "
                "there now"
            )

    def _inode(self) -> int | None:
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return None

    @contextmanager
    def _damage_is_fatal(self):
        self._machine.check()
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, disk full, no permission: not damage
            if not any(word in str(error) for word in ("malformed", "Could not decode")):
                raise ValueError(
                    f"the store of {self.content} {self.path} can't be used: {error}. {_remedy(error)}. What was stored before is "
                    "kept"
                ) from error
            self._set_aside(error)
        except sqlite3.DatabaseError as error:
            self._set_aside(error)

    def _set_aside(self, error: Exception) -> None:
        """Keep the damaged file under another name, copy what is sound in it, and stop."""
        self._machine.check()
        damaged = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        if hasattr(self, "_db"):
            self._db.close()
        self._check_in_place()  # another process may have set it aside already
        # the new store first: where there is no room for it, nothing has moved
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            sound = _copy_sound(self.path, new)
            with writing(damaged, _ELSEWHERE):
                os.replace(self.path, damaged)
                journal = self.path.with_name(f"{self.path.name}-journal")
                if (
                    journal.exists()
                ):  # it belongs to the damaged file and would be applied to the new one
                    os.replace(journal, damaged.with_name(f"{damaged.name}-journal"))
                os.replace(new, self.path)
        except sqlite3.Error as fault:
            raise ValueError(
                f"the store of {self.content} {self.path} is damaged ({error}), and the sound entries in it can't be copied to "
                f"a new one: {fault}. {_remedy(fault)}"
            ) from error
        finally:
            new.unlink(missing_ok=True)
        raise StoreDamaged(
            f"the store of {self.content} {self.path} is damaged ({error}). It was set aside as "
            f"{damaged.name}; the {sound} sound entries in it were copied to a new store. Put a copy of yours "
            "in its place, or start again to compute only what is missing"
        ) from error


def _remedy(error: sqlite3.Error) -> str:
    """What mends a fault of the file system, by SQLite's name of it."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL":
        return f"Free space on its disk, or {_ELSEWHERE}"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return f"Make the file and its folder writable, or {_ELSEWHERE}"
    if name in ("SQLITE_BUSY", "SQLITE_PROTOCOL", "SQLITE_LOCKED") or name.endswith("LOCK"):
        # a lock that a network folder refuses looks as if another process held it
        return (
            f"Either another process has held it for over {_PATIENCE} s, then start again; or its folder knows no locks, as some "
            f"network folders, then {_ELSEWHERE}, on a local disk"
        )
    return f"Its disk or network folder fails, or a quota is used up; mend that, or {_ELSEWHERE}"


def _connect(path: Path) -> sqlite3.Connection:
    if not path.exists():
        with suppress(OSError):  # what is wrong is said below
            path.touch()  # with the permissions of the user's umask; SQLite's are its own
    db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA trusted_schema = OFF")  # a file's own triggers and views call nothing
    except sqlite3.Error:
        db.close()
        raise
    return db


def _copy_sound(damaged: Path, new: Path) -> int:
    """Entries that match their checksum, to a new store; their number."""
    new.unlink(missing_ok=True)
    with closing(_connect(new)) as db:
        db.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION}")
        db.execute("BEGIN")
        for row in _readable(damaged):
            if row[3] == _checksum(*row[:3]):
                db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", row)
        db.execute("COMMIT")
        return db.execute("SELECT count(*) FROM entries").fetchone()[0]


def _readable(path: Path) -> Iterator[tuple]:
    """Entries of a damaged file: from both ends up to the damage, and one by one what can be read between."""
    first = last = 0
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        for place, row in _rows(db, "ORDER BY rowid"):
            yield row
            first = place
        for place, row in _rows(db, "ORDER BY rowid DESC"):
            if place <= first:
                break
            yield row
            last = place
        # of those of this size; a place may be damaged too
        for number in range(first + 1, min(last, first + path.stat().st_size // 32)):
            for _, row in _rows(db, f"WHERE rowid = {number}"):
                yield row


def _rows(db: sqlite3.Connection, which: str) -> Iterator[tuple[int, tuple]]:
    """Places in the file and entries, up to the first that can't be read."""
    with suppress(sqlite3.Error, UnicodeDecodeError):
        for place, *row in db.execute(f"SELECT rowid, * FROM entries {which}"):  # nosec B608 # ours
            if all(isinstance(part, str) for part in row[:2]) and isinstance(row[2], bytes):
                yield place, tuple(row)


def _checksum(kind: str, key: str, value: bytes) -> bytes:
    head = f"{kind}\0{key}\0".encode()
    return hashlib.blake2b(head + value, digest_size=8).digest()


def _check(kind: str, key: str, value: bytes, checksum: bytes) -> None:
    if not isinstance(value, bytes) or checksum != _checksum(kind, key, value):
        raise sqlite3.DatabaseError(f"entry {key} doesn't match its checksum")


def _alive(host: str, pid: int, started: float, renewed: float) -> bool:
    if host != socket.gethostname():
        return time.time() - renewed < _LEASE
    try:
        process = psutil.Process(pid)
        # the time of start, since numbers of processes are used again
        same = abs(process.create_time() - started) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
