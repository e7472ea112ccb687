"""An error that a user can mend is the last thing on the screen: our message, without a traceback.

In a process of axolotl, a ValueError that our own code raised is such an error, and a full disk or a folder that can't
be written to, whoever met it. Launchers (accelerate, torchrun) print
tracebacks of their own when a process fails, so that under them the message waits until they are gone.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from bapo_plugin.files import of_the_disk
from bapo_plugin.runs import hide

_HERE = str(Path(__file__).parent)
_LAUNCHERS = ("axolotl", "accelerate", "torchrun")
_MODULES = ("accelerate.commands.launch", "torch.distributed.run", "torch.distributed.launch")
_PATIENCE = 30.0  # seconds that launchers may take to end


def install() -> None:
    """From now on in this process. With BAPO_TRACEBACK=1 in the environment tracebacks stay."""
    if os.environ.get("BAPO_TRACEBACK") or getattr(sys.excepthook, "_bapo", False):
        return
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> Any:
        text = str(error) if is_for_the_user(error) else of_the_disk(error)
        if text is None:
            return before(kind, error, traceback)
        rank = int(os.environ.get("RANK", 0))
        _say(f"\nError: {hide(text)}\n", rank)

    hook._bapo = True
    sys.excepthook = hook


def is_for_the_user(error: BaseException) -> bool:
    """Whether our code raised it as a message: a ValueError whose innermost frame is ours, here or in a worker."""
    traceback = error.__traceback__
    if not isinstance(error, ValueError) or traceback is None:
        return False
    if type(error.__cause__).__name__ == "RemoteTraceback":  # of a pool of processes, as text
        places = re.findall(r'^  File "(.+)", line \d+', str(error.__cause__), re.MULTILINE)
        return bool(places) and places[-1].startswith(_HERE + os.sep)
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_filename.startswith(_HERE + os.sep)


def _say(text: str, rank: int) -> None:
    if bars := sys.modules.get("tqdm.std"):
        for bar in list(bars.tqdm._instances):
            bar.close()  # else it is drawn once more when the process ends
    sys.stdout.flush()
    launcher = _launcher()
    if launcher is None:
        sys.stderr.write(text)
        sys.stderr.flush()
        return
    # one process speaks last; the others at once
    mark = os.path.join(tempfile.gettempdir(), f".bapo-last-word-{launcher.pid}")
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL, 0o600))
    except OSError:
        sys.stderr.write(f"\n[rank {rank}] {text.strip()}\n" if rank else text)
        sys.stderr.flush()
        return
    sys.stderr.flush()
    if os.fork():
        return
    os.setsid()  # the launcher ends the processes of its group
    ends = time.monotonic() + _PATIENCE
    while time.monotonic() < ends and _runs(launcher):
        time.sleep(0.001)
    os.write(2, text.encode("utf-8", "replace"))
    os.unlink(mark)
    os._exit(0)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _launcher() -> psutil.Process | None:
    """The outermost of the launchers above this process."""
    found = None
    process = psutil.Process()
    while (parent := process.parent()) is not None:
        try:
            if not _launches(parent.cmdline()):
                break
        except psutil.Error:
            break
        found = process = parent
    return found


def _launches(command: list[str]) -> bool:
    if any(os.path.basename(word) in _LAUNCHERS for word in command[:2]):
        return True
    return "-m" in command[:3] and any(word in _MODULES for word in command[1:4])
