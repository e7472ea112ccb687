"""What a user can mend ends as a message without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bapo_plugin.last_word import _launches, is_for_the_user


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_only_messages_of_our_own_code_lose_their_traceback():
    from bapo_plugin.config import parse_block

    assert is_for_the_user(raised(lambda: parse_block({"anchor_weight": -1})))
    assert not is_for_the_user(raised(lambda: int("x")))  # a fault of code, ours or not
    assert not is_for_the_user(raised(lambda: {}["x"]))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/v/bin/python", "/v/bin/accelerate", "launch", "-m", "axolotl.cli.train"], True),
        (["/v/bin/python3.11", "/v/bin/axolotl", "train", "a.yml"], True),
        (["torchrun", "x"], True),
        (["python", "-m", "torch.distributed.run", "x"], True),
        (["/home/axolotl/bin/python", "-m", "pytest", "tests"], False),
        (["bash", "axolotl train"], False),
    ],
)
def test_launchers_are_told_by_their_names(command, expected):
    assert _launches(command) == expected


def test_a_process_says_its_message_and_exits_with_1():
    code = (
        "from bapo_plugin import last_word; last_word.install()\n"
        "from tqdm import tqdm; bar = tqdm(total=3, mininterval=0); bar.update()\n"
        "from bapo_plugin.config import parse_block; parse_block({'anchor_wieght': 1})"
    )
    for extra, traceback in (({}, False), ({"BAPO_TRACEBACK": "1"}, True)):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | extra
        )
        assert done.returncode == 1 and ("Traceback" in done.stderr) == traceback
        last = done.stderr if traceback else done.stderr.splitlines()[-1]
        assert "did you mean anchor_weight?" in last


def test_a_message_of_a_worker_is_one_and_comes_back_whole():
    import pickle

    from bapo_plugin import last_word
    from bapo_plugin.files import NotWritten

    error = NotWritten(Path("/folder/file"), 28, "name another folder")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)

    class RemoteTraceback(Exception):
        pass

    def raised(place):
        try:
            raise ValueError("said") from RemoteTraceback(f'\n  File "{place}", line 3, in f\n')
        except ValueError as found:
            return found

    assert last_word.is_for_the_user(raised(last_word.__file__))
    assert not last_word.is_for_the_user(raised("/elsewhere/other.py"))
