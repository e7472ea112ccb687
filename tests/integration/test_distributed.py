"""Two processes with gloo on the CPU give what one process gives, whatever splits model, state or batches."""

import contextlib
import importlib.util
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest
import torch
import warm

HERE = Path(__file__).parent
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed isn't installed (make test-distributed installs it into an environment of its own)",
)


def kind(name, *marks):
    marks = [*marks, needs_deepspeed] if name.startswith("zero") else marks
    return pytest.param(name, marks=marks)


KINDS = [kind("ddp"), kind("zero1", pytest.mark.slow), *map(kind, ("zero2", "zero3", "fsdp2"))]
LOGGED = ("loss", "loss/anchor", "drift/base", "drift/chosen", "rewards/margins", "grad_norm")
EVALUATED = ("eval_loss", "eval_loss/anchor", "eval_drift/chosen", "eval_rewards/accuracies")


def start(processes, script, *arguments, fails=False):
    """What the ranks print. As torchrun does it, all end where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        ranks = []
        for rank, file in enumerate(files):
            env = {**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank}
            env = {name: str(value) for name, value in env.items()}
            ranks.append(warm.Process([HERE / script, *arguments], stdout=file, env=env))
        deadline = time.monotonic() + 300
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for rank in ranks:
            rank.kill()
            rank.wait()
        errors = "".join(rank.errors()[-5000:] for rank in ranks)
        assert any(rank.returncode for rank in ranks) == fails, errors
        for file in files:
            file.seek(0)
        return "".join(file.read() for file in files) + errors


def run(folder, processes, **settings):
    folder.mkdir(exist_ok=True)
    start(processes, "ddp_script.py", folder, json.dumps(settings))
    return json.loads((folder / "result.json").read_text())


SETTINGS = {"rows": 32, "tokens": 80, "continued": True, "keep": 1}
SETTINGS["anchor"] = {"anchor_weight": "auto", "drift_limit": 0.01, "anchor_loss": "hinge"}
PROMPTS = "tell me about the sea\nwho are you\nname three blue leaf please\n"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return str(path)


@pytest.fixture(scope="module")
def one(tmp_path_factory, prompts):
    """Packs of tokens, a continued adapter, a weight that is found, kept prompts, retention."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return run(folder, 1, batch=8, **SETTINGS, retention=prompts)


def same(one, two, steps):
    assert one["steps"] == two["steps"] == steps
    for key in LOGGED:
        found = [[e[key] for e in result["log"] if key in e] for result in (one, two)]
        assert len(found[0]) == steps, (key, found[0])
        assert found[1] == pytest.approx(found[0], rel=1e-4, abs=5e-5), key
    for key in EVALUATED:
        assert two["eval"][key] == pytest.approx(one["eval"][key], abs=5e-5), key
    assert two["weights"].keys() == one["weights"].keys() and len(one["weights"]) > 20
    for name, value in one["weights"].items():
        expected = torch.tensor(value)
        torch.testing.assert_close(torch.tensor(two["weights"][name]), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(tmp_path, one, prompts, kind):
    """With packs whose number differs between ranks, as do the rows in them; one rank has no kept prompt in a step; killed after the first checkpoint and
    resumed, which changes nothing either."""
    settings = {"kind": kind, "batch": 4, **SETTINGS}
    two = run(tmp_path / "two", 2, **settings, retention=prompts)
    same(one, two, 4)
    for key, count in (("retention/drift", 2), ("anchor/weight", 4), ("keep/kl", 4)):
        found = [[e[key] for e in result["log"] if key in e] for result in (one, two)]
        assert len(found[0]) == count and found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4)
        assert len(set(found[0])) == count, key
    folder = tmp_path / "killed"
    folder.mkdir()
    dies = json.dumps({**settings, "retention": prompts, "die_at": 2, "die_on": 1})
    start(2, "ddp_script.py", folder, dies, fails=True)
    assert [path.name for path in (folder / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    same(one, run(folder, 2, **settings, retention=prompts, resume=True), 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_micro_batches_of_a_new_adapter(tmp_path, kind):
    settings = {"keep": 3, "anchor": {"anchor_loss": "kl"}}
    one = run(tmp_path / "one", 1, batch=4, **settings)
    same(one, run(tmp_path / "two", 2, kind=kind, batch=1, accumulation=2, **settings), 4)


@pytest.mark.slow
def test_fsdp2_with_sharded_state_resumes(tmp_path):
    settings = {"kind": "fsdp2", "batch": 4, "rows": 32, "tokens": 80, "continued": True}
    settings["state_dict_type"] = "SHARDED_STATE_DICT"
    one = run(tmp_path / "one", 2, **settings)
    (tmp_path / "two").mkdir()
    start(2, "ddp_script.py", tmp_path / "two", json.dumps({**settings, "die_at": 2}), fails=True)
    two = run(tmp_path / "two", 2, **settings, resume=True)
    for key in LOGGED:
        found = [[e[key] for e in result["log"] if key in e] for result in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6), key


@pytest.mark.slow
def test_fsdp2_in_bf16_shares_prompts_and_keeps_log_probs_in_fp32(tmp_path):
    two = run(tmp_path / "two", 2, kind="fsdp2", batch=2, rows=8, bf16=True)
    for key in ("logps/chosen", "logps/rejected", "logps/base"):
        mean = next(entry[key] for entry in two["log"] if key in entry)
        # between 32 and 64 nats bf16 has steps of a quarter, and the mean of four rows has of a sixteenth
        assert 32 < -mean < 64 and (16 * mean) % 1, "rounded to bf16"


def test_fsdp2_gives_the_same_gradients():
    assert "SAME" in start(1, "sharded_script.py", "fsdp2")


@needs_deepspeed
def test_zero3_gives_the_same_gradients():
    assert "SAME" in start(2, "sharded_script.py", "zero3")
