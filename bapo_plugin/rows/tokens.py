"""Rendered rows to token ids, and one length policy over all three responses."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Features, Value
from datasets import Sequence as SequenceOf

from bapo_plugin.rows.columns import IDS, RESPONSES, TEXTS
from bapo_plugin.rows.ends import common_prefix
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.template import RenderedRow
from bapo_plugin.rows.words import Words

_MARKS = ("ask", "words", "row_hash", "length", "problem", "notice")
# of `prepare_batch`; given to `map` because it would keep the source's type for a column of the same name
FEATURES = Features(
    {name: Value("string") for name in (*TEXTS, *_MARKS)}
    | {name: SequenceOf(Value("int32")) for name in (*IDS, "open_ids")}
    | {"row": Value("int64"), "base_cut": Value("bool"), "lacks": Value("bool")}
    | {"asked": Value("int64")}
)
# columns of a row that is ready for training; open_tokens: how many tokens of base_ids the model was asked with;
# asked: `digest` of all that it was asked with, since prompt_ids ends earlier where a response merges with it
READY = (*TEXTS, *IDS, "open_tokens", "asked")
LengthStrategy = Literal["drop", "truncate", "raise"]


class Encoder:
    """Text to token ids, as the model will see it.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`.
        from_template: a chat template wrote the texts, with all special tokens that belong there. Else the
            tokenizer adds its own at the beginning; one that is there already is not doubled, and an end of
            sequence that the tokenizer would put after every text is left out: a text says itself where it ends.
        words: knows the stand-ins in texts for what is to become text (`rows.words`). Default: of a chat template's texts.
        ends: ids of tokens that end an answer, besides the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        from_template: bool,
        words: Words | None = None,
        ends: Iterable[int] = (),
    ):
        self._tokenizer = tokenizer
        self._from_template = from_template
        self._ends = {*ends, tokenizer.eos_token_id} - {None}
        self._words = Words(tokenizer) if words is None and from_template else words

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text.

        Raises:
            RowError: see `check`.
        """
        tokenizer = self._tokenizer
        found = tokenizer(list(texts), add_special_tokens=not self._from_template)["input_ids"]
        if self._words:
            apart = (self._words.encode(text, not self._from_template) for text in texts)
            found = [ids if own is None else own for ids, own in zip(found, apart, strict=True)]
            texts = [self._words.show(text) for text in texts]
        if self._from_template:
            return found
        return [self._single(ids, text) for ids, text in zip(found, texts, strict=True)]

    def check(self, text: str) -> None:
        """Refuse words that can't be written as text.

        Raises:
            RowError: they hold a special token that this tokenizer can't.
        """
        if self._words:
            self._words.encode(text, not self._from_template)

    def show(self, row: RenderedRow) -> RenderedRow:
        """The row as it was written, without stand-ins."""
        if self._words is None:
            return row
        texts = ("ask", "prompt", "chosen", "rejected", "base", "words")
        tokens = row.base_tokens and (row.base_tokens[0], self._words.show(row.base_tokens[1]))
        shown = {name: self._words.show(text) for name in texts if (text := getattr(row, name))}
        return row._replace(base_tokens=tokens, **shown)

    def tell(self, error: RowError) -> str:
        """What an error says, without stand-ins."""
        return self._words.tell(str(error)) if self._words else str(error)

    def spells(self, ids: Sequence[int], text: str, cut: bool) -> bool:
        """Whether ids are this text and a token that ends an answer; where a limit cut it, the text alone."""
        ended = ids[-1] in self._ends
        if ended == cut:
            return False
        try:
            # the text may have its end too
            return any(
                self._tokenizer.decode(part) == text for part in (ids[: len(ids) - ended], ids)
            )
        except (OverflowError, TypeError, IndexError):  # ids of another tokenizer
            return False

    def _single(self, ids: list[int], text: str) -> list[int]:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and ids and ids[-1] == eos:
            written = text.endswith(self._tokenizer.eos_token)
            if not written or ids[-2:] == [eos, eos]:
                ids = ids[:-1]
        return ids


def split_ids(ask: list[int], wholes: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
    """The beginning that all share, and the rest of each whole.

    Prompt and prompt + response are tokenised as whole texts. Where the last characters of the prompt
    merge with the first of a response into one token, the prompt ends earlier, so that no response has a
    token that its text doesn't give.

    Raises:
        RowError: nothing is shared, or a response has no token of its own.
    """
    prompt = common_prefix([ask, *wholes])
    if not prompt:
        raise RowError(
            "the prompt is empty or no token of it stays the same before all responses; fill it or remove the row"
        )
    rest = [whole[len(prompt) :] for whole in wholes]
    for name, ids in zip(RESPONSES, rest, strict=False):
        if not ids:
            raise RowError(f"{name} has no token after the prompt; fill it or remove the row")
    return prompt, rest


def fit_length(
    row: Mapping[str, Any], sequence_len: int, strategy: LengthStrategy
) -> tuple[dict[str, list[int]], str]:
    """Apply the length policy to a row's token ids, looking at all three responses.

    Args:
        row: with `prompt_ids`, `chosen_ids`, `rejected_ids`, `base_ids`, and perhaps `open_ids`, with which `base_ids` begins.
        sequence_len: most tokens of prompt + response.
        strategy: "truncate" cuts responses at their end; a row whose prompt leaves no room, or whose
            chosen and rejected are the same once cut, or whose base response has no token of its own then, can't be mended and
            is "long". "drop" and
            "raise" leave long rows to the caller.

    Returns:
        The ids and "fits", "cut" or "long".
    """
    ids = {key: row[key] for key in IDS}
    room = sequence_len - len(ids["prompt_ids"])
    responses = IDS[1:]
    if all(len(ids[key]) <= room for key in responses):
        return ids, "fits"
    if strategy != "truncate" or room <= 0:
        return ids, "long"
    cut = {**ids, **{key: ids[key][:room] for key in responses}}
    # of the base response nothing but what the model was asked with
    empty = ids["base_ids"] and len(row.get("open_ids") or ()) >= room
    return cut, "long" if empty or cut["chosen_ids"] == cut["rejected_ids"] else "cut"


def prepare_batch(
    batch: Mapping[str, list],
    indices: Sequence[int],
    read: Callable[[dict], RenderedRow],
    encode: Encoder,
    sequence_len: int,
    strategy: LengthStrategy,
) -> dict[str, list]:
    """Render and tokenise rows, for `Dataset.map(batched=True, with_indices=True)` with `FEATURES`.

    Args:
        batch: column -> values.
        indices: of the rows in the data set.
        read: row -> text.
        encode: text -> ids.
        sequence_len, strategy: see `fit_length`.

    Returns:
        `FEATURES`: texts and ids; `open_ids`, what the model is asked with beyond `prompt_ids`; `asked`, see `READY`; `row`, the row's number
        from 1; `lacks`, no base response (then `base_ids` is empty, `ask` is the text that asks for it, and `row_hash`
        names the row whatever its template is); `length`, "fits", "cut" or "long" ("" where a base
        response is still to come); `problem`, what makes the row unusable, and `notice`, what is odd in it, ""
        where nothing is.
    """
    names = list(batch)
    columns = [batch[name] for name in names]
    blank: dict[str, Any] = dict.fromkeys((*TEXTS, *_MARKS), "")
    blank |= {key: [] for key in (*IDS, "open_ids")}
    blank |= {"base_cut": False, "lacks": False, "asked": 0}
    out = [blank | {"row": i + 1} for i in indices]
    rendered: list[RenderedRow | None] = []
    texts: list[str] = []
    for made, values in zip(out, zip(*columns, strict=True), strict=True):
        try:
            row = read(dict(zip(names, values, strict=True)))
            check_text(row)
            for text in (row.ask, *(row.prompt + text for text in _responses(row))):
                encode.check(text)
        except RowError as error:
            made["problem"] = encode.tell(error)
            rendered.append(None)
            continue
        rendered.append(row)
        texts.append(row.ask)
        texts += [row.prompt + text for text in _responses(row)]
    ids = iter(encode(texts) if texts else ())
    for i, (made, row) in enumerate(zip(out, rendered, strict=True)):
        if row is None:
            continue
        ask = next(ids)
        wholes = [next(ids) for _ in _responses(row)]
        row = encode.show(row)
        notices = list(row.notices)
        if row.base_tokens is not None:
            given, said = row.base_tokens
            if encode.spells(given, said, row.base_cut):
                wholes[2] = [*ask, *given]
            else:
                notices.append("the tokens that base brings don't spell it and are left aside")
        try:
            made |= _row_of(row, ask, wholes) | {"notice": "; ".join(notices)}
        except RowError as error:
            made["problem"] = str(error)
            continue
        if made["lacks"]:
            made |= {"ask": row.ask, "row_hash": _hash_of(names, [c[i] for c in columns])}
        _fit(made, sequence_len, strategy)
    return {key: [row[key] for row in out] for key in FEATURES}


def check_text(row: RenderedRow) -> None:
    """Refuse what no tokenizer can read.

    Raises:
        RowError: half of a surrogate pair, as broken JSON escapes leave it.
    """
    try:
        "".join((row.ask, *_responses(row))).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"the text holds {error.object[error.start]!r}, which is no character; mend it"
        ) from None


def _responses(row: RenderedRow) -> list[str]:
    """The responses that there are: chosen, rejected, base."""
    return [text for text in (row.chosen, row.rejected, row.base) if text is not None]


def _row_of(row: RenderedRow, ask: list[int], wholes: list[list[int]]) -> dict[str, Any]:
    prompt, rest = split_ids(ask, wholes)
    chosen, rejected = rest[:2] if row.chosen is not None else ([], [])
    return {
        "prompt": row.prompt,
        "chosen": row.chosen or "",
        "rejected": row.rejected or "",
        "base": row.base or "",
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "base_ids": [] if row.base is None else rest[2],
        # a base response that goes on from what the model is asked with
        "open_ids": ask[len(prompt) :] if row.base is None or wholes[2][: len(ask)] == ask else [],
        "asked": digest(ask),
        "words": row.words,
        "base_cut": row.base_cut,
        "lacks": row.base is None,
    }


def digest(ids: Any) -> int:
    """64 bits of token ids, as a number with a sign."""
    raw = np.asarray(ids, dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big", signed=True)


def _hash_of(names: Sequence[str], values: Sequence[Any]) -> str:
    filled = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    text = json.dumps(filled, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _fit(row: dict[str, Any], sequence_len: int, strategy: LengthStrategy) -> None:
    if not row["lacks"]:
        ids, row["length"] = fit_length(row, sequence_len, strategy)
        row |= ids
        return
    # without its base response: whether that could still make it fit
    room = sequence_len - len(row["prompt_ids"])
    if len(row["open_ids"]) >= room or fit_length(row, sequence_len, strategy)[1] == "long":
        row["length"] = "long"


def complete_batch(
    batch: Mapping[str, list],
    answers: Callable[[Mapping[str, int]], Mapping[str, tuple[Sequence[int], bool]]],
    decode: Callable[[list[int]], str],
    sequence_len: int,
    strategy: LengthStrategy,
) -> dict[str, list]:
    """Put generated base responses into rows of `prepare_batch`, for `Dataset.map(batched=True)`.

    Args:
        batch: `FEATURES`, `key` of the answer, "" where none is needed, and `limit`, its most tokens.
        answers: {key: limit} -> {key: (token ids as the model gave them, whether the limit cut them)}.
        decode: token ids -> text, special tokens included.
        sequence_len, strategy: see `fit_length`.

    Raises:
        ValueError: an answer isn't there.
    """
    found = answers({k: n for k, n in zip(batch["key"], batch["limit"], strict=True) if k})
    out = []
    for values in zip(*(batch[name] for name in FEATURES), strict=True):
        out.append(dict(zip(FEATURES, values, strict=True)))
    for row, key in zip(out, batch["key"], strict=True):
        if not key:
            continue
        if key not in found:
            raise ValueError(
                f"the base response of row {row['row']} has left the store meanwhile; start again to make it anew"
            )
        ids, row["base_cut"] = found[key]
        row["base"] = decode([*row["open_ids"], *ids])
        row["base_ids"] = [*row["open_ids"], *ids]
        row["lacks"] = False
        _fit(row, sequence_len, strategy)
    return {key: [row[key] for row in out] for key in FEATURES}
