"""Files are written as a whole or not at all, and what keeps one from being written is said with its remedy."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# libraries that are not written in Python raise errors of their own, with the system's words in them
_WORDS = {os.strerror(number): number for number in (*_FULL, *_CLOSED, *_NO_LOCKS)}
# what torch.save says where a write fails, whatever the reason was
_TORCH = ("PytorchStreamWriter failed", "inline_container.cc")


class NotWritten(ValueError):
    """A file can't be written; the text has its path, the reason and the remedy.

    Args:
        path: of the file or folder.
        number: of the system's error; 0 where it isn't known.
        instead: see `write_whole`.
    """

    def __init__(self, path: Path, number: int, instead: str):
        super().__init__(_sentences(path, number, instead))
        self.path, self.number, self._instead = path, number, instead

    def __reduce__(self) -> tuple:  # from a worker to its main process
        return type(self), (self.path, self.number, self._instead)


def write_whole(path: Path, content: str | bytes, instead: str) -> None:
    """Write a file as a whole or not at all; its folder is made.

    Args:
        path: of the file.
        content: text is written as UTF-8.
        instead: what the user may do to have it written elsewhere, "name another output_dir".

    Raises:
        NotWritten: it can't be written; what was there before is still there.
    """
    with whole(path, instead) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole(path: Path, instead: str) -> Iterator[Path]:
    """Gives another name in the same folder; what is written there becomes the file at the end, and nothing is left
    of it after an error.

    Args:
        path, instead: see `write_whole`.

    Raises:
        NotWritten: it can't be written.
    """
    with writing(path, instead):
        _make(path.parent, instead)
        partial = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}")
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, instead: str) -> Iterator[Path]:
    """Gives a folder beside the target, which becomes the target at the end; nothing is left of it after an error.

    Args:
        path: not there, or an empty folder.
        instead: see `write_whole`.

    Raises:
        NotWritten: it can't be written.
    """
    with writing(path, instead):
        _make(path.parent, instead)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            yield folder
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)
            if path.is_dir():
                path.rmdir()  # empty, or this fails
            folder.rename(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path, instead: str) -> Iterator[None]:
    """Inside, an error that says that a disk is full or a folder can't be written to becomes a message.

    Args:
        path: the file or folder that is written.
        instead: see `write_whole`.

    Raises:
        NotWritten: the message: path, reason and remedy.
    """
    try:
        yield
    except NotWritten as error:
        if path not in (error.path, *error.path.parents):
            raise
        raise NotWritten(path, error.number, instead) from error  # who is outside knows more
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise NotWritten(path, number, instead) from error


def of_the_disk(error: BaseException) -> str | None:
    """The message for an error that nobody has seen coming, from a library that writes somewhere; None where it is
    another error."""
    if not isinstance(error, OSError) or error.errno not in (*_FULL, *_CLOSED):
        return None
    if isinstance(error.filename, str | bytes):
        path = Path(os.fsdecode(error.filename)).absolute()
        kept = "What was finished is kept"
        if error.errno in (errno.EACCES, errno.EPERM):  # it may have been read
            reason = os.strerror(error.errno).lower()
            return f"{path} can't be opened: {reason}. Mend the permissions, or name another place. {kept}"
        return f"{_sentences(path, error.errno, 'let it lie elsewhere')}. {kept}"
    if error.errno not in _FULL:
        return None
    places = [Path.cwd(), Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()]
    places.append(Path(tempfile.gettempdir()))
    free = "; ".join(dict.fromkeys(f"{place}: {_free(place)}" for place in places))
    return (
        f"a disk is full: {os.strerror(error.errno).lower()}. Free space ({free}), or let output_dir, dataset_prepared_path, "
        "HF_HOME and TMPDIR lie elsewhere, and start again. What was finished is kept"
    )


def must_be_writable(folder: Path, instead: str) -> None:
    """Try it, before the work whose result is to be written there. The folder is made.

    Raises:
        NotWritten: it isn't.
        ValueError: it is a file.
    """
    probe = folder / f".bapo-writable.{os.getpid()}"
    with writing(folder, instead):
        _make(folder, instead)
        probe.touch()
        probe.unlink()


def _make(folder: Path, instead: str) -> None:
    """A folder with those above it.

    Raises:
        ValueError: one of them is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(place for place in (folder, *folder.parents) if place.exists())
        raise ValueError(
            f"{folder} can't be a folder: {file} is a file. Move it away, or {instead}"
        ) from None


def _sentences(path: Path, number: int, instead: str) -> str:
    """One with the reason and one with the remedy."""
    reason = os.strerror(number).lower() if number else "the disk may be full"
    if number in _CLOSED:
        folder = path if path.is_dir() else path.parent
        remedy = f"Make {folder} writable, or {instead}"
    elif number in _NO_LOCKS:
        remedy = f"The file system there has no locks, as some network folders; {instead}, on a local disk"
    else:
        remedy = f"Free space there ({_free(path)}), or {instead}"
    return f"{path} can't be written: {reason}. {remedy}"


def _number(error: Exception) -> int | None:
    """The system's number of a failed write; 0 where a library doesn't say; None for other errors."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _WORDS.values() else None
    if isinstance(error, ValueError):
        return None  # a message already
    text = str(error)
    for words, number in _WORDS.items():
        if words in text:
            return number
    return 0 if any(words in text for words in _TORCH) else None


def _free(path: Path) -> str:
    """How much is free on the disk of a path that may not be there yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"{shutil.disk_usage(path).free / 2**20:,.0f} MiB are free"
    except OSError:
        return "it can't be told how much is free"
