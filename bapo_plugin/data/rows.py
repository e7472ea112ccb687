"""One preference row: text to token ids, checks, and one length policy over all three responses."""

from typing import Any, Literal

from bapo_plugin.data.formats import RowError

RESPONSES = ("chosen", "rejected", "base")
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
        row: "prompt", "chosen", "rejected", "base": rendered text.
        tokenizer: a `PreTrainedTokenizerBase`.

    Returns:
        "prompt_ids", "chosen_ids", "rejected_ids", "base_ids"; none is empty.

    Raises:
        RowError: a text is not a string, the prompt has no token of its own, or chosen and rejected
            are the same.
    """
    for name in ("prompt", *RESPONSES):
        if not isinstance(row.get(name), str):
            raise RowError(
                f"{name} is {type(row.get(name)).__name__}, not text; apply the chat template first"
            )
    if row["chosen"] == row["rejected"]:
        raise RowError(
            "chosen and rejected are identical: there is no preference in it; remove the row"
        )
    prompt = _encode(tokenizer, row["prompt"])
    full = [_encode(tokenizer, row["prompt"] + _with_eos(row[r], tokenizer)) for r in RESPONSES]
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


def _encode(tokenizer: Any, text: str) -> list[int]:
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
