"""Notices that another machine uses a file of a network folder whose locks don't reach from one machine to the other.

Some such folders grant a lock on each machine alone: sshfs, most object stores, NFS mounted with `nolock`, Lustre with
`localflock`. SQLite believes them, and two machines damage its file. So a machine that uses a file says so in one beside it,
its sign, under a lock, and writes that anew every few seconds. Another machine that gets this lock, though the sign is still being
written, knows that locks are worth nothing there. Clocks need not agree.

Some show an old state for a while of what another machine has written; SQLite would take a file that seems empty for a new one. So
a sign also has the length of the file, and whoever comes from another machine waits until that is what is seen.
"""

import hashlib
import os
import re
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows, where SQLite takes locks of another kind
    fcntl: Any = None

_LOCAL = "ext2 ext3 ext4 xfs btrfs zfs f2fs tmpfs ramfs overlay apfs hfs".split()
_BEAT = 5.0  # seconds from one sign of life to the next
_WATCH = 30.0  # seconds without one after which a machine is gone; what is seen may be 20 old
_STALE = 90.0  # seconds to wait for the state that another machine has left
_LENGTH = 200  # bytes of a sign, always, so that its own length is never old
_open: dict[Path, "_Sign"] = {}  # one a process: closing one handle of a file ends all its locks
_opening = threading.RLock()  # a Store that nobody closed may be collected at any moment


def _after_fork() -> None:
    """A child has none of its parent's locks."""
    global _opening
    _opening = threading.RLock()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class OtherMachine(ValueError):
    """Another machine uses the file, or what it has left can't be seen yet."""


class Machine:
    """This machine's use of a file, from the making of this object to `close`. Does nothing on a local disk.

    Args:
        path: the file; its folder is there.
        content: what is in it, for messages ("base responses").

    Raises:
        OtherMachine: another machine uses it, and locks between the two don't hold; or an old state of it is seen. What can't be
            found out, in a folder that can't be written or knows no locks, raises nothing here: who then writes the file meets
            the same fault.
    """

    def __init__(self, path: Path, content: str):
        self._sign: _Sign | None = None
        path = Path(os.path.realpath(path))
        if not fcntl or _on_a_local_disk(path.parent):
            return
        key = path.with_name(f"{path.name}-machine")
        with _opening:
            if key not in _open:
                _open[key] = _Sign(key, path, content)
            self._sign = _open[key]
            self._sign.users += 1
        self._leave = weakref.finalize(self, _leave, self._sign, os.getpid())

    @property
    def taken(self) -> bool:
        """Whether another machine has taken the file for its own since, because this one gave no sign of life for some time."""
        return bool(self._sign and self._sign.taken_by)

    def check(self) -> None:
        """Look whether it is `taken`.

        Raises:
            OtherMachine: it is.
        """
        if self.taken:
            raise self._sign.refusal(self._sign.taken_by)

    def close(self) -> None:
        if self._sign:
            self._leave()


def _leave(sign: "_Sign", process: int) -> None:
    if process != os.getpid():
        return
    with _opening:
        sign.users -= 1
        if not sign.users:
            _open.pop(sign.path, None)
            sign.end()


class _Said(NamedTuple):
    """What a sign says; all empty where nothing was written yet."""

    machine: str = ""
    host: str = ""
    when: str = ""  # of the last sign of life, or "ended"
    size: int = 0  # bytes of the file then


class _Sign:
    """One a process, since closing one handle would end the locks of all that the process has on the file."""

    def __init__(self, path: Path, file: Path, content: str):
        self.path, self.file, self.content = path, file, content
        self.users, self.taken_by = 0, ""
        self._machine = ""
        self._handle: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        try:
            with self._alone(), suppress(OSError):  # the file itself meets it too, and says so
                self._machine = _this_machine(path.parent)
                self._begin()
            if self._handle is not None:
                self._thread.start()
        except BaseException:
            self._drop()
            raise

    @contextmanager
    def _alone(self):
        """One process of this machine at a time decides: the locks of others would seem to be another machine's."""
        name = hashlib.blake2b(os.fsencode(self.path), digest_size=8).hexdigest()
        try:
            place = Path(tempfile.gettempdir()) / f"bapo-{os.getuid()}-{name}.lock"
            lock = FileLock(place, 2 * (_WATCH + _STALE))
            lock.acquire()
        except (OSError, Timeout):
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def refusal(self, host: str) -> OtherMachine:
        return OtherMachine(
            f"the store of {self.content} {self.file} is in use by another machine, {host}, and its folder's locks don't reach from "
            "machine to machine, so that both would damage it. Wait until it has finished there; or name another "
            "dataset_prepared_path here, and give each machine its part of the rows (`shards` and `shards_idx` in the entry of the "
            "data set)"
        )

    def _begin(self) -> None:
        end = time.monotonic() + _WATCH + 2 * _STALE
        while time.monotonic() < end:
            with self._handled(os.O_CREAT | os.O_EXCL) as handle:
                if handle is not None and self._join(handle, new=True):
                    return
            with self._handled() as handle:
                if handle is None:  # it was taken away in this moment
                    time.sleep(0.1)
                    continue
                said = _read(handle)
                if said.machine == self._machine:
                    if self._join(handle, new=False):
                        return
                    continue
                if not _locked(handle, fcntl.LOCK_EX):
                    return  # the other machine's lock is seen here, so locks hold
            if said.when == "ended" or self._watch(said):
                self._take_over(said)

    def _join(self, handle: int, new: bool) -> bool:
        """Share the lock with this machine's other processes; whether the sign is still this machine's."""
        end = time.monotonic() + _STALE
        while not _locked(handle, fcntl.LOCK_SH):  # another machine tries it, or a process ends
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        if not new and _read(handle).machine != self._machine:
            return False
        try:
            self._write(handle)
        except OSError:
            if new:  # else it would seem to be another machine's
                self.path.unlink(missing_ok=True)
            raise
        self._handle = handle
        return True

    def _watch(self, first: _Said) -> bool:
        """Its lock is free: is the machine gone, or are locks worth nothing? True where it is gone.

        Raises:
            OtherMachine: it is still there.
        """
        _tell(
            f"{self.file} was last used by another machine, {first.host}. Looking for {_WATCH:.0f} s whether it still is"
        )
        end = time.monotonic() + _WATCH
        while time.monotonic() < end:
            time.sleep(_BEAT / 10)
            with self._handled() as handle:
                if handle is None:
                    return False
                said = _read(handle)
                if said == first:
                    continue
                if said.machine != self._machine and said.when != "ended":
                    # whoever writes it has locked it before
                    if _locked(handle, fcntl.LOCK_EX):
                        raise self.refusal(said.host)
                return False
        return True

    def _take_over(self, said: _Said) -> None:
        """Wait until what the other machine has left is seen here, and say that it is this machine's now; or leave it, where the
        other one is at it again.

        Raises:
            OtherMachine: an old state is seen.
        """
        end, told = time.monotonic() + _STALE, False
        while True:
            with self._handled() as handle:
                if handle is None or _read(handle) != said or not _locked(handle, fcntl.LOCK_EX):
                    return
                size = self._size()
                if size is None or size >= said.size:
                    self._write(handle, said.size)
                    break
            if time.monotonic() > end:
                raise OtherMachine(
                    f"the store of {self.content} {self.file} has {size} bytes here, and had {said.size} when the machine {said.host} "
                    "last used it: its folder shows an old state. Start again in some minutes; or, if the file was replaced on "
                    f"purpose, delete {self.path}"
                )
            if not told:
                told = True
                _tell(f"{self.file} isn't seen yet as {said.host} has left it. Waiting")
            time.sleep(_BEAT / 10)
        time.sleep(_BEAT / 5)  # another may have done the same in this moment; the last one has it

    @contextmanager
    def _handled(self, flags: int = 0) -> Iterator[int | None]:
        """A handle of the sign, closed afterwards but where this process keeps it; None where it isn't there, or, to be made
        anew, where it is."""
        handle = None
        with suppress(FileExistsError, FileNotFoundError):
            handle = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o666)
        try:
            yield handle
        finally:
            if handle not in (None, self._handle):
                os.close(handle)

    def _size(self) -> int | None:
        with suppress(FileNotFoundError):
            return self.file.stat().st_size
        return None

    def _write(self, handle: int, size: int | None = None, when: str = "") -> None:
        size = size or self._size() or 0
        text = f"{self._machine} {_plain(socket.gethostname())} {when or time.time_ns()} {size}\n"
        os.pwrite(handle, text.rjust(_LENGTH).encode(), 0)
        os.fsync(handle)

    def _live(self) -> None:
        while not self._stop.wait(_BEAT):
            with suppress(OSError):
                said = _read(self._handle)
                if said.machine not in ("", self._machine):
                    # where its lock is seen here, locks hold, and there is nothing to watch
                    if _locked(self._handle, fcntl.LOCK_EX):
                        self.taken_by = said.host
                    return
                self._write(self._handle)

    def end(self) -> None:
        if self._handle is None:
            return
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            # no other process of this machine has it, and it is still this machine's
            last = _locked(self._handle, fcntl.LOCK_EX)
            if last and _read(self._handle).machine == self._machine:
                self._write(self._handle, when="ended")
        self._drop()

    def _drop(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _on_a_local_disk(folder: Path) -> bool:
    """Of a folder whose path holds no links."""
    try:
        mounts = psutil.disk_partitions(all=True)
    except OSError:  # not known: as if there were no other machine
        return True
    around = [mount for mount in mounts if folder.is_relative_to(mount.mountpoint)]
    # of two in one place the last is on top
    inner = max(reversed(around), key=lambda mount: len(mount.mountpoint), default=None)
    return inner is not None and inner.fstype in _LOCAL


def _this_machine(folder: Path) -> str:
    """The same for all processes between which locks hold anyway and that share a folder of temporary files.

    Two mounts of a network folder on one machine, as containers have them, may have locks of their own.
    """
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        name = socket.gethostname()
    temporary = os.stat(tempfile.gettempdir())
    parts = (name, folder.stat().st_dev, temporary.st_dev, temporary.st_ino)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _plain(name: str) -> str:
    """A name as one word of a sign."""
    return re.sub(r"[^\x21-\x7e]", "_", name)[:60] or "unknown"


def _read(handle: int) -> _Said:
    parts = os.pread(handle, _LENGTH, 0).decode("ascii", errors="replace").split()
    if len(parts) != 4 or not parts[3].isdecimal():
        return _Said()
    return _Said(*parts[:3], int(parts[3]))


def _locked(handle: int, kind: int) -> bool:
    """Whether the lock is now ours, at once or not."""
    try:
        fcntl.lockf(handle, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _tell(text: str) -> None:
    from axolotl.utils.logging import get_logger  # not light

    get_logger("axolotl." + __name__).info(text)
