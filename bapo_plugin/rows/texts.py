"""Rows that are rendered already: texts with all special tokens."""

from collections.abc import Mapping
from typing import Any

from bapo_plugin.rows.columns import IDS
from bapo_plugin.rows.conversation import read_flag
from bapo_plugin.rows.ends import StopTexts
from bapo_plugin.rows.errors import RowError, kind_of
from bapo_plugin.rows.oddities import IDENTICAL
from bapo_plugin.rows.template import RenderedRow
from bapo_plugin.rows.tokens import Encoder, prepare_batch


class TextRows:
    """Callable row -> `RenderedRow`, for rows whose columns prompt, chosen, rejected and base are rendered already.

    Args:
        stops: ends of turn, for responses that bring one, or lack it.
    """

    def __init__(self, stops: StopTexts):
        self._stops = stops

    def __call__(self, row: Mapping[str, Any]) -> RenderedRow:
        """Take one row.

        Raises:
            RowError: a column is not text, or chosen and rejected are the same.
        """
        names = ("prompt", "chosen", "rejected", "base")
        for name in names:
            if not isinstance(row.get(name), str):
                raise RowError(
                    f"{name} is {kind_of(row.get(name))}, not text; apply the chat template first"
                )
        prompt, chosen, rejected, base = (row[name] for name in names)
        if chosen == rejected:
            raise RowError(IDENTICAL)
        cut = read_flag(row.get("base_cut"), "base_cut")
        if not cut:
            base = self._stops.close(base)
        chosen, rejected = self._stops.close(chosen), self._stops.close(rejected)
        return RenderedRow(prompt, prompt, chosen, rejected, base, cut, None, prompt)


def tokenize_row(row: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Token ids of one row of rendered texts, however long they are.

    Args:
        row: "prompt", "chosen", "rejected", "base", perhaps "base_cut".
        tokenizer: a `PreTrainedTokenizerBase`; its EOS ends responses that have no end.

    Returns:
        "prompt_ids", "chosen_ids", "rejected_ids", "base_ids"; none is empty.

    Raises:
        RowError: as `TextRows`, or a text has no token of its own.
    """
    read = TextRows(StopTexts(tokenizer, {tokenizer.eos_token_id} - {None}))
    batch = {key: [value] for key, value in row.items()}
    encode = Encoder(tokenizer, from_template=False)
    out = prepare_batch(batch, [0], read, encode, sequence_len=2**31, strategy="drop")
    if out["problem"][0]:
        raise RowError(out["problem"][0])
    return {key: out[key][0] for key in IDS}
