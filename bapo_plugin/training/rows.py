"""Rows that come to the trainer without axolotl: texts are tokenised, token ids are checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset

from bapo_plugin.answers.stops import named_stops
from bapo_plugin.rows.columns import IDS, TEXTS
from bapo_plugin.rows.ends import StopTexts
from bapo_plugin.rows.faults import Faults
from bapo_plugin.rows.table import finish
from bapo_plugin.rows.texts import TextRows
from bapo_plugin.rows.tokens import FEATURES, Encoder, prepare_batch


def tokenized(dataset: Dataset, tokenizer: Any, args: Any, dataset_name: str) -> Dataset:
    """Rows of token ids.

    Args:
        dataset: with the columns prompt, chosen, rejected and base as text, or with token ids.
        tokenizer: for the texts.
        args: `max_length` and `output_dir`, where faulty rows would be written, are read.
        dataset_name: "train", "eval", for messages.

    Raises:
        ValueError: rows without a base response or otherwise unusable, all in one message.
    """
    columns = dataset.column_names or []
    if all(name in columns for name in IDS):
        refuse_empty(dataset, IDS, f"the {dataset_name} data set")
        return dataset
    missing = [name for name in TEXTS if name not in columns]
    if missing:
        raise ValueError(
            f"the {dataset_name} data set lacks the columns {', '.join(missing)} (it has "
            f"{', '.join(columns)}); BAPO needs prompt, chosen, rejected and base as text, or {', '.join(IDS)}"
        )
    limit = args.max_length or 2**31
    name = f"the {dataset_name} data set"
    with PartialState().main_process_first():
        rows = dataset.map(
            prepare_batch,
            batched=True,
            batch_size=256,
            with_indices=True,
            fn_kwargs={
                "read": TextRows(StopTexts(tokenizer, named_stops(tokenizer, None))),
                "encode": Encoder(tokenizer, from_template=False),
                "sequence_len": limit,
                "strategy": "truncate",
            },
            remove_columns=columns,
            features=FEATURES,
            desc=f"Tokenizing {dataset_name} dataset",
        )
    faults = Faults(Path(args.output_dir), "error")
    rows = faults.take(name, rows, len(rows))
    faults.settle(write=False)
    return finish(rows, name, limit, "truncate", "keep")


def refuse_empty(dataset: Dataset, columns: Sequence[str], name: str, unit: str = "row") -> None:
    """A prompt without tokens has no state that predicts a response's first one.

    Args:
        dataset: rows of token ids.
        columns: those that must have tokens.
        name, unit: of the data set and of its rows, for the message.

    Raises:
        ValueError: one has none.
    """
    start = 0
    for part in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000):
        for column in columns:
            counts = pc.fill_null(pc.list_value_length(part[column]), 0).to_numpy()
            if not counts.all():
                raise ValueError(
                    f"{name}: {column} of {unit} {start + int(counts.argmin()) + 1} is empty; prompt and responses need at "
                    f"least one token each; leave the {unit} out"
                )
        start += len(part)
