"""Rows for training and for evaluation, and prompts to keep, of a configuration."""

import math
from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.utils import deduplicate_and_log_datasets
from axolotl.utils.logging import get_logger
from datasets import Dataset

from bapo_plugin.answers.prompts import Chat, held_out_answers, read_prompts
from bapo_plugin.config import BAPOConfig, parse_block
from bapo_plugin.preparation import KEEP, Preparation
from bapo_plugin.rows.columns import TEXTS
from bapo_plugin.rows.table import (
    kept_among,
    overlap,
    split_by_prompt,
)

LOG = get_logger("axolotl." + __name__)


def load_datasets(cfg: Any) -> tuple[TrainDatasetMeta, Dataset | None]:
    """Rows for training and evaluation, in the form axolotl's `train` takes them from a plugin, and the prompts of
    `bapo.keep` with their base responses.

    Raises:
        ValueError: as `prepare_rows`, or prompts to keep are among those that `bapo.retention` watches.
    """
    bapo, tokenizer = parse_block(dict(cfg.bapo)), load_tokenizer(cfg)
    check_watched_file(bapo)
    found = Preparation(cfg, tokenizer, keep=True).rows()
    kept = found.pop(KEEP, None)
    train, evaluation = split_rows(cfg, found)
    check_kept(bapo, tokenizer, kept, evaluation)
    if cfg.debug:  # `axolotl preprocess --debug`
        for row in train.select(range(min(3, len(train)))):
            for name in TEXTS:
                print(f"{name} ({len(row[f'{name}_ids'])} tokens): {row[name]!r}")
    steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
    return TrainDatasetMeta(train, evaluation, steps), kept


def check_watched_file(bapo: BAPOConfig) -> None:
    """Refuse prompts that `bapo.keep` holds and a file of `bapo.retention` watches.

    Raises:
        ValueError: there are some, or a file can't be used.
    """
    watched = bapo.retention.prompts if bapo.retention else None
    if isinstance(watched, str):
        _refuse_watched(bapo, kept_of(bapo, read_prompts(watched, "bapo.retention.prompts")))


def kept_of(bapo: BAPOConfig, chats: list[Chat]) -> int:
    """How many of these prompts `bapo.keep` holds, whatever white space is around their words.

    Raises:
        ValueError: the file of `bapo.keep` can't be used.
    """
    if not bapo.keep:
        return 0
    known = list(map(_words, read_prompts(bapo.keep.prompts, "bapo.keep.prompts")))
    return sum(_words(chat) in known for chat in chats)


def check_kept(
    bapo: BAPOConfig, tokenizer: Any, kept: Dataset | None, evaluation: Dataset | None
) -> None:
    """Say where prompts of `bapo.keep` are among the held-out rows.

    Raises:
        ValueError: `bapo.retention` watches those rows.
    """
    watched = bapo.retention.prompts if bapo.retention else None
    if kept is not None and evaluation is not None and (count := kept_among(evaluation, kept)):
        if isinstance(watched, int):
            asked = {tuple(row["prompt_ids"]) for row in kept.select_columns(["prompt_ids"])}
            answers = held_out_answers(evaluation, tokenizer, watched)
            _refuse_watched(bapo, sum(tuple(a.prompt_ids) in asked for a in answers))
        LOG.warning(
            f"{count} of {len(evaluation)} held-out rows have a prompt of bapo.keep.prompts: {bapo.keep.prompts}, so "
            "eval_drift/base on them says nothing about forgetting; take them out of one of the two"
        )


def prepare_rows(
    cfg: Any, tokenizer: Any, evaluation: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Tokenised rows of `datasets:` and of `test_datasets:` or the `val_set_size` share.

    Columns: prompt, chosen, rejected, base (text), prompt_ids, chosen_ids, rejected_ids, base_ids (list of int),
    open_tokens (how many tokens of base_ids the model was asked with: templates may begin the answer), asked (64 bits of all that
    it was asked with).

    Args:
        cfg: axolotl's validated configuration.
        tokenizer: axolotl's for this configuration.
        evaluation: for `axolotl evaluate`, which compares with the model without any adapter.

    Raises:
        ValueError: faulty rows (all of them in one message), rows over `sequence_len` with
            `excess_length_strategy: raise`, a data set without its split, no row left, or base responses
            that can't be made; what was made is kept.
    """
    return split_rows(cfg, Preparation(cfg, tokenizer, evaluation).rows())


def split_rows(cfg: Any, found: dict[str, Dataset]) -> tuple[Dataset, Dataset | None]:
    """Rows to train on and held-out rows, of prepared rows of `datasets` and perhaps `test_datasets`.

    Raises:
        ValueError: `val_set_size` leaves no row on a side.
    """
    train, *test = found.values()
    if cfg.dataset_exact_deduplication:
        train, deduplicated = deduplicate_and_log_datasets(
            dataset=train, other_dataset=test[0] if test else None
        )
        test = [deduplicated] if test else []
    if test:
        if count := overlap(train, test[0]):
            LOG.warning(
                f"{count} of {len(test[0])} held-out rows have a prompt that is in training too: what is measured on them "
                "(eval_drift/base, retention) says nothing about forgetting; take other prompts into test_datasets"
            )
        return train, test[0]
    if size := cfg.val_set_size:
        # axolotl makes a float of a number of rows
        return split_by_prompt(train, int(size) if size >= 1 else size)
    return train, None


def _words(chat: Chat) -> list[tuple[str, str]]:
    """A chat without white space at the ends of its messages, which most templates trim."""
    return [(message["role"], message["content"].strip()) for message in chat]


def _refuse_watched(bapo: BAPOConfig, count: int) -> None:
    """What is kept can't be what forgetting is measured on."""
    if count:
        raise ValueError(
            f"{count} prompts of bapo.keep.prompts: {bapo.keep.prompts} are among those that bapo.retention.prompts: "
            f"{bapo.retention.prompts} watches, so what is measured there would say nothing about forgetting; take them out "
            "of one of the two"
        )
