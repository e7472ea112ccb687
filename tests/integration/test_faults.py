"""Faults of the world: what was there before is still there, nothing half-written is left, and the message has a remedy."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from datasets import Dataset
from disks import Disk
from helpers import bapo_trainer, lora_model
from safetensors.torch import load_file, save_file
from tiny import make_rows
from transformers import TrainerState

from bapo_plugin import last_word, preparation
from bapo_plugin.cli.arguments import errors_in_a_line
from bapo_plugin.commands import anchors
from bapo_plugin.evaluation.output import write_result
from bapo_plugin.files import must_be_writable, of_the_disk, whole_folder, write_whole
from bapo_plugin.report import page
from bapo_plugin.rows.faults import Faults
from bapo_plugin.runs import RECORD, STATE
from bapo_plugin.store import Store, StoreDamaged
from bapo_plugin.training.checkpoints import whole_checkpoint

BIG = 200_000  # bytes; more than is free on a full disk


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.remove()


def faulty_rows(path, text):
    problems = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    rows = Dataset.from_dict({"row": list(range(len(problems))), "problem": problems})
    faults = Faults(path.parent, "drop")
    faults.take("rows", rows.add_column("notice", [""] * len(rows)), len(rows))
    faults._write()


def saved_rows(path, text):
    preparation._save(Dataset.from_dict({"text": [text]}), path)


# every writer of ours that a fault may meet alone: name -> (file, write(path, text))
WRITERS = {
    "text": ("record.json", lambda path, text: write_whole(path, text, "name another place")),
    "results": ("x.json", lambda path, text: write_result(path.with_suffix(""), {"a": text}, text, "-o")),
    "page": ("r.html", lambda path, text: page._write_all({path: text.encode(), path.with_suffix(".png"): b"x"})),
    "jsonl": ("rows.jsonl", lambda path, text: anchors._write(Dataset.from_dict({"a": [text] * 3}), path)),
    "parquet": ("rows.parquet", lambda path, text: anchors._write(Dataset.from_dict({"a": [text[i:] for i in range(5)]}), path)),
    "prepared rows": ("bapo-rows", saved_rows),
    "faulty rows": ("bapo-faulty-rows.jsonl", faulty_rows),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_written_whole_or_not_at_all(disk, name):
    file, write = WRITERS[name]
    path = disk.folder / file
    text = os.urandom(BIG // 2).hex()
    write(path, "before" * 1000)
    before = disk.content()
    with (
        disk.full(),
        pytest.raises(ValueError, match=f"{file}.*can't be written: .*Free space") as e,
    ):
        write(path, text)
    assert disk.content() == before, e.value
    if disk.can_be_closed:
        with disk.closed(), pytest.raises(ValueError, match="can't be written: .*Make .* writable"):
            write(path, text)
        assert disk.content() == before
    write(path, text)
    assert disk.content() != before


def test_parquet_of_a_file_that_says_its_errors_later_is_that_of_a_plain_one(tmp_path):
    rows = Dataset.from_dict({"a": list(range(5000)), "b": ["text"] * 5000})
    anchors._write(rows, tmp_path / "ours.parquet")
    rows.to_parquet(str(tmp_path / "plain.parquet"))
    assert (tmp_path / "ours.parquet").read_bytes() == (tmp_path / "plain.parquet").read_bytes()


def test_a_folder_is_made_whole_or_not_at_all(disk):
    def make(folder):
        (folder / "first").write_text("small")
        save_file({"a": torch.zeros(BIG)}, folder / "model.safetensors")

    path = disk.folder / "merged"
    with disk.full(), pytest.raises(ValueError, match="merged can't be written: .*Free space"):
        with whole_folder(path, "name another --output") as folder:
            make(folder)
    assert disk.content() == {} and not list(disk.folder.iterdir())
    path.mkdir()
    with whole_folder(path, "name another --output") as folder:
        make(folder)
    assert set(disk.content()) == {"merged/first", "merged/model.safetensors"}


def test_a_folder_is_tried_before_the_work(disk):
    must_be_writable(disk.folder / "new", "name another folder with --output")
    assert list(disk.folder.iterdir()) == [disk.folder / "new"]
    if disk.can_be_closed:
        with disk.closed(), pytest.raises(ValueError, match="Make .*new writable, or name another"):
            must_be_writable(disk.folder / "new", "name another folder with --output")


# ---------------------------------------------------------------- the store


def test_a_store_keeps_what_it_has(disk):
    path = disk.folder / "s.sqlite"
    with Store(path, "base responses") as store:
        store.put("a", {"1": b"one"})
        mine = store.claim(["2"])
        with (
            disk.full(),
            pytest.raises(
                ValueError,
                match=r"base responses .*s.sqlite can't be used: .*What was stored before",
            ),
        ):
            try:
                store.put("a", {"2": bytes(BIG)}, done=mine)
            finally:
                store.release(mine)  # as a run does; it may not hide the first error
        store.put("a", {"3": b"three"})  # the transaction is over
        assert store.get("a", "123") == {"1": b"one", "3": b"three"}
    if disk.can_be_closed:
        with disk.closed(), Store(path) as store:
            assert store.get("a", "1") == {"1": b"one"}, "what is there can be read"
            with pytest.raises(ValueError, match="Make the file and its folder writable, or name"):
                store.put("a", {"4": b""})
    assert set(disk.content()) == {"s.sqlite"}


def test_a_damaged_store_is_left_where_it_is_while_there_is_no_room(disk):
    path = disk.folder / "s.sqlite"
    with Store(path) as store:
        store.put("a", {str(i): bytes(1000) for i in range(100)})
    db = sqlite3.connect(path)
    db.execute("UPDATE entries SET value = x'00' WHERE key = '8'")
    db.commit()
    db.close()
    before = disk.content()
    with (
        disk.full(),
        Store(path) as store,
        pytest.raises(ValueError, match="is damaged .*entry 8 .* can't be copied to a new one: .*"),
    ):
        store.verify()
    assert disk.content() == before
    with Store(path) as store, pytest.raises(StoreDamaged, match="99 sound entries"):
        store.verify()


def test_a_store_that_cannot_be_locked_is_said(tmp_path, monkeypatch):
    """SQLite takes a refused lock (ENOLCK, network folders) for one that another process has."""
    monkeypatch.setattr("bapo_plugin.store._PATIENCE", 0.1)
    path = tmp_path / "s.sqlite"
    Store(path).close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(
        ValueError, match=r"locked\. Either another process .*knows no locks.*on a local disk"
    ):
        Store(path)
    other.close()


def test_a_folder_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    work = preparation.Preparation.__new__(preparation.Preparation)
    work.folder = tmp_path / "prepared"
    work._file_lock = preparation.FileLock(tmp_path / "lock")
    with pytest.raises(ValueError, match=r"prepared can't be written: no locks.*on a local disk"):
        with work._lock():
            pass


# ---------------------------------------------------------------- training


def trainer(disk, **changes):
    settings = {"save_strategy": "steps", "save_steps": 1, "rows": make_rows(12)}
    return bapo_trainer(disk.folder, lora_model(), **(settings | changes))


def test_training_stops_at_a_checkpoint_that_cannot_be_saved_and_goes_on(disk):
    one = trainer(disk)
    save = one._save_checkpoint

    def at_the_second(*args):
        if one.state.global_step < 2:
            return save(*args)
        with disk.full():
            return save(*args)

    one._save_checkpoint = at_the_second
    message = r"checkpoint-2 can't be written: .*Free space .*auto_resume_from_checkpoints: true"
    with pytest.raises(ValueError, match=message) as error:
        one.train()
    assert last_word.is_for_the_user(error.value)
    out = disk.folder / "out"
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert whole_checkpoint(str(out), True) == str(out / "checkpoint-1")
    again = trainer(disk)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_an_adapter_that_cannot_be_saved_leaves_the_one_before(disk):
    one = trainer(disk)
    out = disk.folder / "out"
    one.model.save_pretrained(str(out))
    (out / "adapter_config.json").write_text("{}")
    before = disk.content()
    with disk.full(4096), pytest.raises(ValueError, match="out can't be written: .*output_dir"):
        one.model.get_base_model().save_pretrained(str(out))
    assert disk.content() == before
    one.model.save_pretrained(str(out))
    assert set(disk.content()) == set(before) and load_file(out / "adapter_model.safetensors")
    with disk.full(0), pytest.raises(ValueError, match="README.md can't be written"):
        one.create_model_card()


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path, caplog, monkeypatch):
    one = bapo_trainer(tmp_path, lora_model())
    one.record.EVERY = 0

    def half(self, path):
        Path(path).write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TrainerState, "save_to_json", half)
    one.train()
    assert one.state.global_step == 2
    assert f"{STATE} can't be written" in caplog.text and "Training goes on" in caplog.text
    assert json.loads((tmp_path / "out" / RECORD).read_text())["finished"]
    assert not list(tmp_path.rglob(f"*{STATE}*"))


def test_log_probs_of_the_reference_are_kept_as_far_as_there_is_room(disk):
    one = trainer(disk, cache_dir=disk.folder, per_device_eval_batch_size=1, rows=make_rows(120))
    with disk.full(40960), pytest.raises(ValueError, match="reference log-probs .*name another"):
        one.get_train_dataloader()
    db = sqlite3.connect(disk.folder / "bapo-reference.sqlite")
    kept = db.execute("SELECT count(*) FROM entries").fetchone()[0]
    db.close()
    assert kept > 0 and kept % 4 == 0


# ---------------------------------------------------------------- what nobody has seen coming


def test_a_full_disk_that_a_library_meets_is_the_last_word():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "a disk is full: no space left on device. Free space (" in of_the_disk(full)
    named = OSError(errno.EROFS, os.strerror(errno.EROFS), "/somewhere/cache")
    assert "/somewhere/cache can't be written: read-only file system. Make" in of_the_disk(named)
    secret = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/rows.jsonl")
    assert "/data/rows.jsonl can't be opened: permission denied" in of_the_disk(secret)
    for other in (OSError(errno.ENOENT, "", "x"), ValueError("x"), OSError("no number")):
        assert of_the_disk(other) is None
    code = (
        "from bapo_plugin import last_word; last_word.install(); import errno, os\n"
        "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("\nError: a disk is full") and done.stderr.count("\n") == 2


def test_a_command_says_it_too(capsys):
    with pytest.raises(typer.Exit) as exit, errors_in_a_line():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/rows.arrow")
    assert exit.value.exit_code == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: /cache/rows.arrow can't be written: no space left on device")
    with pytest.raises(FileNotFoundError), errors_in_a_line():
        raise FileNotFoundError(errno.ENOENT, "", "x")
