"""A disk that can be filled and closed while a test runs, whoever writes to it, Python or not."""

import contextlib
import os
import resource
import signal
import subprocess
from pathlib import Path


class Disk:
    """A folder. As root a file system of its own (the faults are ENOSPC and EROFS); else a limit on the size of files stands
    for the full disk (EFBIG) and permissions for the read-only one (EACCES).

    Args:
        folder: must be empty.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
        self._mounted = (
            os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        )

    @property
    def can_be_closed(self) -> bool:
        """Permissions don't bind root."""
        return self._mounted or os.geteuid() != 0

    @contextlib.contextmanager
    def full(self, room: int = 16384):
        """Inside, writes fail behind `room` bytes."""
        if not self._mounted:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
                signal.signal(signal.SIGXFSZ, handler)
            return
        filler = self.folder / ".filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(filler, max(0, filler.stat().st_size - room))
        try:
            yield
        finally:
            filler.unlink()

    @contextlib.contextmanager
    def closed(self):
        """Inside, nothing can be written."""
        if self._mounted:
            self._remount("ro")
        else:
            places = [self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())]
            for path in places:
                path.chmod(0o555)
        try:
            yield
        finally:
            if self._mounted:
                self._remount("rw")
            else:
                for path in places:
                    path.chmod(0o755)

    def _remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)

    def content(self) -> dict[str, bytes]:
        """What lies there."""
        return {
            str(p.relative_to(self.folder)): p.read_bytes()
            for p in self.folder.rglob("*")
            if p.is_file() and p.name != ".filler"
        }

    def remove(self) -> None:
        if self._mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
