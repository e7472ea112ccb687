"""Preference rows: text to token ids, checks, and one length policy over all three responses."""

from collections.abc import Callable
from typing import Any, Literal

from axolotl.utils.logging import get_logger
from datasets import Dataset, Features, Sequence, Value

from bapo_plugin.rows.strategies import RowError

LOG = get_logger("axolotl." + __name__)

RESPONSES = ("chosen", "rejected", "base")
TEXTS = ("prompt", *RESPONSES)
IDS = tuple(f"{name}_ids" for name in TEXTS)
SHOWN_PROBLEMS = 10
# of `prepare_row`; given to `map` because it would keep the source's type for a column of the same name
FEATURES = Features(
    {name: Value("string") for name in (*TEXTS, "length", "problem")}
    | {name: Sequence(Value("int64")) for name in IDS}
)
LengthStrategy = Literal["drop", "truncate", "raise"]


def tokenize_row(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """Token ids of a rendered row.

    The tokens are those of TRL's DPOTrainer: prompt and prompt + response are tokenised as whole
    texts, an end-of-sequence token is added where the response lacks one, a doubled BOS (template
    and tokenizer both add one) is made single. Where the last characters of the prompt merge with
    the first of a response into one token, TRL warns and trains on a text that nobody wrote; here
    the prompt then ends earlier, at the last token that all three share, so that the text stays
    right.

    Args:
        row: "prompt", "chosen", "rejected", "base": rendered text. With "base_cut" the base response was
            cut by a limit: no end-of-sequence token is added to it.
        tokenizer: a `PreTrainedTokenizerBase`.

    Returns:
        "prompt_ids", "chosen_ids", "rejected_ids", "base_ids"; none is empty.

    Raises:
        RowError: a text is not a string, the prompt has no token of its own, or chosen and rejected
            are the same.
    """
    for name in TEXTS:
        if not isinstance(row.get(name), str):
            raise RowError(
                f"{name} is {type(row.get(name)).__name__}, not text; apply the chat template first"
            )
    if row["chosen"] == row["rejected"]:
        raise RowError(
            "chosen and rejected are identical: there is no preference in it; remove the row"
        )
    open_ended = ("base",) if row.get("base_cut") else ()
    prompt = encode(tokenizer, row["prompt"])
    texts = [row[r] if r in open_ended else _with_eos(row[r], tokenizer) for r in RESPONSES]
    full = [encode(tokenizer, row["prompt"] + text) for text in texts]
    shared = _common_prefix(prompt, *full)
    if shared == 0:
        raise RowError(
            "the prompt is empty or no token of it stays the same before all three responses"
        )
    ids = {"prompt_ids": prompt[:shared]}
    for name, tokens in zip(RESPONSES, full, strict=True):
        if len(tokens) == shared:
            raise RowError(f"{name} has no token after the prompt; fill it or remove the row")
        ids[f"{name}_ids"] = tokens[shared:]
    return ids


def fit_length(
    ids: dict[str, list[int]], sequence_len: int, strategy: LengthStrategy
) -> tuple[dict[str, list[int]], str]:
    """Apply the length policy to a tokenised row, looking at all three responses.

    Args:
        ids: from `tokenize_row`.
        sequence_len: most tokens of prompt + response.
        strategy: "truncate" cuts responses at their end; a row whose prompt leaves no room, or whose
            chosen and rejected are the same once cut, can't be mended and is "long". "drop" and
            "raise" leave long rows to the caller.

    Returns:
        The ids and "fits", "cut" or "long".
    """
    room = sequence_len - len(ids["prompt_ids"])
    responses = [f"{name}_ids" for name in RESPONSES]
    if all(len(ids[key]) <= room for key in responses):
        return ids, "fits"
    if strategy != "truncate" or room <= 0:
        return ids, "long"
    cut = {**ids, **{key: ids[key][:room] for key in responses}}
    return cut, "long" if cut["chosen_ids"] == cut["rejected_ids"] else "cut"


def prepare_row(
    row: dict[str, Any],
    render: Callable[[dict], dict],
    tokenizer: Any,
    sequence_len: int,
    strategy: LengthStrategy,
) -> dict[str, Any]:
    """Render, tokenise and fit one row, for `Dataset.map` with `FEATURES`.

    Returns:
        Texts and ids, "length" ("fits", "cut" or "long") and "problem": what makes the row unusable,
        "" where nothing does, so that all faulty rows of a data set can be reported together.
    """
    out: dict[str, Any] = dict.fromkeys(TEXTS, "") | {name: [] for name in IDS}
    try:
        texts = render(row)
        ids, length = fit_length(tokenize_row(texts, tokenizer), sequence_len, strategy)
        return out | {name: texts[name] for name in TEXTS} | ids | {"length": length, "problem": ""}
    except RowError as error:
        return out | {"length": "", "problem": str(error)}


def faulty_rows(rows: Dataset) -> list[tuple[int, str]]:
    """(row number from 1, problem) of the prepared rows that can't be used."""
    return [(i, text) for i, text in enumerate(rows["problem"], start=1) if text]


def report_rows(name: str, faulty: list[tuple[int, str]], total: int) -> str:
    """One message about a data set's faulty rows; the first ten are shown."""
    lines = [f"{name}: {len(faulty)} of {total} rows can't be used (rows counted from 1):"]
    lines += [f"  row {i}: {text}" for i, text in faulty[:SHOWN_PROBLEMS]]
    if len(faulty) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(faulty) - SHOWN_PROBLEMS} more")
    return "\n".join(lines)


def apply_policy(name: str, rows: Dataset, sequence_len: int) -> Dataset:
    """Drop what is marked "long", say how many rows were touched, remove the marks.

    Raises:
        ValueError: no row is left.
    """
    lengths = list(rows["length"])
    cut, long = lengths.count("cut"), lengths.count("long")
    if cut or long:
        LOG.warning(
            f"{name}: sequence_len {sequence_len}, counting chosen, rejected and base: {cut} rows cut, "
            f"{long} dropped, {len(rows) - cut - long} untouched"
        )
    if long == len(rows):
        raise ValueError(
            f"{name}: all {long} rows are longer than sequence_len: {sequence_len}; raise sequence_len or "
            "set `excess_length_strategy: truncate`"
        )
    if long:
        rows = rows.select([i for i, length in enumerate(lengths) if length != "long"])
    return rows.remove_columns(["length", "problem"])


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered text, with BOS and EOS made single."""
    ids = list(tokenizer(text)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if eos is not None and ids[-2:] == [eos, eos]:
        ids = ids[:-1]
    return ids


def _with_eos(text: str, tokenizer: Any) -> str:
    eos = tokenizer.eos_token
    return text if not eos or text.endswith(eos) else text + eos


def _common_prefix(*sequences: list[int]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
