"""Notices that another machine uses a file of a network folder whose locks don't reach from one machine to the other.

Some such folders grant a lock on each machine alone: sshfs, most object stores, NFS mounted with `nolock`, Lustre with
`localflock`. SQLite believes them, and two machines damage its file. So a machine that uses a file says so in one beside it,
its sign, under a lock, and writes that anew every few seconds. Another machine that gets this lock, though the sign is still being
written, knows that locks are worth nothing there. Clocks need not agree.

Some show an old state for a while of what another machine has written; SQLite would take a file that seems empty for a new one. So
a sign also has the length of the file, and whoever comes from another machine waits until that is what is seen.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

try:
    import fcntl
except ImportError:  # Windows, where SQLite takes locks of another kind
    fcntl: Any = None

_LOCAL = "ext2 ext3 ext4 xfs btrfs zfs f2fs tmpfs ramfs overlay apfs hfs".split()
_BEAT = 5.0  # seconds from one sign of life to the next
_WATCH = (
    30.0  # seconds without one after which a machine is gone; folders may show an old state for 20
)
_STALE = 90.0  # seconds to wait for the state that another machine has left
_LENGTH = 200  # bytes of a sign, always, so that its own length is never old
_open: dict[
    tuple[int, Path], "_Sign"
] = {}  # by process: a lock is a process's, not a file handle's
_opening = threading.Lock()


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
        if not fcntl or _on_a_local_disk(path.parent):
            return
        self._key = (os.getpid(), path.with_name(f"{path.name}-machine"))
        with _opening:
            if self._key not in _open:
                _open[self._key] = _Sign(self._key[1], path, content)
            self._sign = _open[self._key]
            self._sign.users += 1

    def check(self) -> None:
        """Look whether another machine has taken the file for its own since.

        Raises:
            OtherMachine: it has, because this one gave no sign of life for some time.
        """
        if self._sign and self._sign.taken_by:
            raise self._sign.refusal(self._sign.taken_by)

    def close(self) -> None:
        with _opening:
            sign, self._sign = self._sign, None
            if not sign or self._key[0] != os.getpid():
                return
            sign.users -= 1
            if not sign.users:
                del _open[self._key]
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
        self._handle: int | None = None
        self._stop = threading.Event()
        try:
            self._begin()
        except OSError:  # the file itself can't be written or locked either, which is said there
            self._drop()
        except BaseException:
            self._drop()
            raise
        if self._handle is not None:
            self._thread = threading.Thread(target=self._live, daemon=True)
            self._thread.start()

    def refusal(self, host: str) -> OtherMachine:
        return OtherMachine(
            f"the store of {self.content} {self.file} is in use by another machine, {host}, and its folder's locks don't reach from "
            "machine to machine, so that both would damage it. Wait until it has finished there; or name another "
            "dataset_prepared_path here, and give each machine its part of the rows (`shards` and `shards_idx` in the entry of the "
            "data set)"
        )

    def _begin(self) -> None:
        for _ in range(50):
            try:
                handle, new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:
                try:
                    handle, new = os.open(self.path, os.O_RDWR), False
                except FileNotFoundError:  # it was taken away in this moment
                    time.sleep(0.1)
                    continue
            try:
                said = _read(handle)
                if new or said.machine == _this_machine():
                    self._join(handle)
                    return
                if not _locked(handle, fcntl.LOCK_EX):
                    return  # the other machine's lock is seen here, so locks hold
                if said.when == "ended":
                    self._take_over(handle, said)
                    continue
            finally:
                if self._handle is None:
                    os.close(handle)
            self._watch(said)

    def _join(self, handle: int) -> None:
        """Share the lock with this machine's other processes."""
        for _ in range(100):  # another machine may be trying it
            if _locked(handle, fcntl.LOCK_SH):
                break
            time.sleep(0.02)
        self._write(handle)
        self._handle = handle

    def _watch(self, first: _Said) -> None:
        """Its lock is free: is the machine gone, or are locks worth nothing?

        Raises:
            OtherMachine: it is still there.
        """
        _tell(
            f"{self.file} was last used by another machine, {first.host}. Looking for {_WATCH:.0f} s whether it still is"
        )
        end = time.monotonic() + _WATCH
        while time.monotonic() < end:
            time.sleep(_BEAT / 10)
            with suppress(FileNotFoundError):
                handle = os.open(self.path, os.O_RDWR)
                try:
                    said = _read(handle)
                    if said == first:
                        continue
                    # whoever writes it has locked it before
                    if said.machine == _this_machine() or said.when == "ended":
                        return
                    if _locked(handle, fcntl.LOCK_EX):
                        raise self.refusal(said.host)
                finally:
                    os.close(handle)
            return
        with suppress(FileNotFoundError):
            handle = os.open(self.path, os.O_RDWR)
            try:
                if _locked(handle, fcntl.LOCK_EX) and _read(handle) == first:
                    self._take_over(handle, first)
            finally:
                os.close(handle)

    def _take_over(self, handle: int, said: _Said) -> None:
        """Wait until what the other machine has left is seen here, and say that it is this machine's now.

        Raises:
            OtherMachine: it isn't.
        """
        end, told = time.monotonic() + _STALE, False
        while self.file.exists() and self.file.stat().st_size < said.size:
            if time.monotonic() > end:
                raise OtherMachine(
                    f"the store of {self.content} {self.file} has {self.file.stat().st_size} bytes here, and had {said.size} when the "
                    f"machine {said.host} last used it: its folder shows an old state. Start again in some minutes; or, if the file "
                    f"was replaced on purpose, delete {self.path}"
                )
            if not told:
                told = True
                _tell(f"{self.file} isn't seen yet as {said.host} has left it. Waiting")
            time.sleep(0.5)
        self._write(handle, said.size)
        time.sleep(_BEAT / 5)  # another may have done the same in this moment; the last one has it

    def _write(self, handle: int, size: int | None = None, when: str = "") -> None:
        if size is None:
            size = self.file.stat().st_size if self.file.exists() else 0
        text = f"{_this_machine()} {socket.gethostname()[:80]} {when or time.time_ns()} {size}\n"
        os.pwrite(handle, text.rjust(_LENGTH).encode(), 0)
        os.fsync(handle)

    def _live(self) -> None:
        while not self._stop.wait(_BEAT):
            with suppress(OSError):
                said = _read(self._handle)
                if said.machine not in ("", _this_machine()):
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
            if last and _read(self._handle).machine == _this_machine():
                self._write(self._handle, when="ended")
        self._drop()

    def _drop(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _on_a_local_disk(folder: Path) -> bool:
    place, kind = folder.resolve(), ""
    found = -1
    for mount in psutil.disk_partitions(all=True):  # the last one that fits best is on top
        if place.is_relative_to(mount.mountpoint) and len(mount.mountpoint) >= found:
            found, kind = len(mount.mountpoint), mount.fstype
    return kind in _LOCAL


def _this_machine() -> str:
    """The same for all processes between which the kernel keeps locks, containers included."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _read(handle: int) -> _Said:
    parts = os.pread(handle, _LENGTH, 0).decode(errors="replace").split()
    return _Said(*parts[:3], int(parts[3])) if len(parts) == 4 and parts[3].isdigit() else _Said()


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
