"""Rows through a DPO prompt strategy that isn't a chat template's: axolotl's `chatml.*`, `llama3.*`, `zephyr.*`,
`passthrough`, `user_defined`, or a user's own.

A strategy is a function row -> {prompt, chosen, rejected}, texts, that knows nothing of base responses. A base
response that a row brings is rendered by calling it a second time, with the base response where the chosen one
stood. Where that is differs from strategy to strategy (a column, the last message of a list, an answer of the
highest rank). So it is looked for: a place in the row is the right one if a marker put there turns up in the
rendered chosen response and nowhere else.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bapo_plugin.rows.conversation import (
    MESSAGES_AS_TEXT,
    BaseResponse,
    Fields,
    read_base,
)
from bapo_plugin.rows.ends import StopTexts
from bapo_plugin.rows.errors import RowError, kind_of
from bapo_plugin.rows.oddities import (
    IDENTICAL,
    check_repeat,
    check_system,
    check_words_alone,
    repeats,
)
from bapo_plugin.rows.template import RenderedRow, has_words, tokens_of
from bapo_plugin.rows.words import Words

Row = dict[str, Any]
Transform = Callable[[Row], Row]
Slot = tuple[Any, ...]  # keys that lead from the row to a string, e.g. ("chosen", -1, "content")

_MARKERS = {
    "prompt": "bapopromptmarker",
    "chosen": "bapochosenmarker",
    "rejected": "baporejectedmarker",
}
# where each part is looked for first; all other columns follow
_COLUMNS = {
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "prompt": ("prompt", "input", "question", "instruction", "messages", "conversations"),
}


class _Place(NamedTuple):
    """Where a part stands in the row, and what the strategy puts before and after it."""

    slot: Slot
    before: str
    after: str


class StrategyRows:
    """Callable row -> `RenderedRow`, through a prompt strategy.

    Args:
        transform: the strategy, already bound to its tokenizer.
        fields: columns and keys of messages; `fields.base` is the column with the base response.
        stops: ends of turn, for responses that bring one, or lack it.
        entry: the data set's entry in the YAML; `field_chosen`, `field_rejected`, `field_prompt` and
            `field_messages` name the columns to look at first.
        words: of special tokens in the row's own words; None: the row or the strategy says itself what is a token.
    """

    def __init__(
        self,
        transform: Transform,
        fields: Fields,
        stops: StopTexts,
        entry: Mapping[str, Any] | None = None,
        words: Words | None = None,
    ):
        self._transform = transform
        self._fields = fields
        self._stops = stops
        self._words = words
        inner = (entry or {}).get("type")
        settings = {**(entry or {}), **(inner if isinstance(inner, Mapping) else {})}
        names = {part: [settings.get(f"field_{part}")] for part in _COLUMNS}
        names["prompt"].append(settings.get("field_messages"))
        self._columns = {
            part: tuple(filter(None, names[part])) + known for part, known in _COLUMNS.items()
        }
        self._last: dict[str, _Place] = {}
        self._only_place: _Place | None = None

    def __call__(self, row: Mapping[str, Any]) -> RenderedRow:
        """Render one row.

        Raises:
            RowError: a response is missing, empty, of a wrong type or not the assistant's, the strategy
                fails on the row, changes its words, or gives no place for the base response.
        """
        row = self._own_words(dict(row))
        self._check_columns(row)
        texts = self._render(row)
        for name in _COLUMNS:
            value = texts.get(name)
            if not isinstance(value, str):
                raise RowError(
                    f"{name} is {kind_of(value)} after the prompt strategy, not text; check the columns that "
                    "`field_...` and `type` name"
                )
            if not value.strip():
                raise RowError(f"{name} is empty; fill it or remove the row")
            if self._words:
                self._words.check(value, name)
                if end := name != "prompt" and self._stops.first_inside(self._stops.strip(value)):
                    raise RowError(
                        f"{name} goes on behind an end of turn ({end!r}), as if it held several turns; leave one answer in it"
                    )
        places = self._places(row, texts)
        for name, place in places.items():
            if place is not None:
                self._check_source(row, texts[name], name, place)
                self._check_messages(row, texts["prompt"] + texts[name], name, place)
        if places["chosen"] is None:
            raise RowError(
                "found no place for the base response: no column can be changed such that only the rendered chosen "
                "response changes; name the column of the chosen response with `field_chosen:`"
            )
        if texts["chosen"] == texts["rejected"]:
            raise RowError(IDENTICAL)
        words = _get(row, places["prompt"].slot) if places["prompt"] else texts["prompt"]
        check_system(row, texts["prompt"].__contains__)
        for prompt in (words, texts["prompt"]):
            check_repeat(prompt, texts["chosen"], texts["rejected"])
        notices = [repeats(words, (texts["chosen"], texts["rejected"]))]
        if self._words:
            notices.append(self._words.notice([texts[name] for name in _COLUMNS]))
        base = read_base(row, self._fields)
        return RenderedRow(
            ask=texts["prompt"],
            prompt=texts["prompt"],
            chosen=self._stops.close(texts["chosen"]),
            rejected=self._stops.close(texts["rejected"]),
            base=base and self._base(row, texts, places["chosen"], base),
            base_cut=base is not None and base.cut,
            base_tokens=tokens_of(base),
            words=words,
            notices=tuple(filter(None, notices)),
        )

    @property
    def places(self) -> dict[str, str]:
        """Part -> where it stood in the last row, as "column" or "column.-1.content"."""
        return {name: ".".join(map(str, place.slot)) for name, place in self._last.items()}

    def _own_words(self, row: Row) -> Row:
        """The row with stand-ins for special tokens; the end of turn that a response brings is none of them."""
        if self._words is None:
            return row
        base = self._fields.base  # what a model said: its special tokens are those that it gave
        own = (base, f"{base}_cut", f"{base}_tokens") if base else ()
        responses = {*self._columns["chosen"], *self._columns["rejected"]}
        found = {}
        for column, value in row.items():
            if column in own:
                found[column] = value
            elif column not in responses:
                found[column] = self._words.hide(value, column)
            elif isinstance(value, list):  # the last message is the response
                found[column] = [
                    *self._words.hide(value[:-1], column),
                    *self._words.hide(value[-1:], column, self._stops.strip),
                ]
            else:
                found[column] = self._words.hide(value, column, self._stops.strip)
        return found

    def _check_columns(self, row: Row) -> None:
        if self._words:  # axolotl's own formats write a message's words and nothing else
            columns = set().union(*self._columns.values()) & row.keys()
            check_words_alone({c: row[c] for c in sorted(columns)}, row, self._fields.tools)
        for name in ("chosen", "rejected"):
            column = next((c for c in self._columns[name] if c in row), None)
            value = row.get(column)
            if isinstance(value, str) and MESSAGES_AS_TEXT.match(value):
                raise RowError(
                    f"{name} is messages written as text (column {column!r}: {value[:60]!r}...); turn the column into "
                    "lists of messages first, for example with json.loads, and use a `type:` for messages"
                )
            if isinstance(value, Sequence) and not isinstance(value, str) and value:
                last = value[-1]
                role = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
                if isinstance(role, str) and self._fields.roles.get(role, role) != "assistant":
                    raise RowError(
                        f"{name} must end with a message of the assistant, not of {role!r:.60}; remove what comes after "
                        "the response, or the row"
                    )

    def _base(self, row: Row, texts: Row, place: _Place, base: BaseResponse) -> str:
        check_words_alone({"base": base.said}, {}, None)
        said = self._stops.strip(base.text) if self._words and base.tokens is None else ""
        if end := self._stops.first_inside(said):
            raise RowError(f"base goes on behind an end of turn ({end!r}); cut it there")
        if place != self._only_place:
            self._check_only_place(row, place)
            self._only_place = place
        changed = self._render(_replace(row, {place.slot: base.text}))
        if any(changed[name] != texts[name] for name in ("prompt", "rejected")):
            raise RowError(
                "the prompt strategy renders another prompt when it renders the base response"
            )
        text = changed["chosen"]
        return text.removesuffix(place.after) if base.cut else self._stops.close(text)

    def _render(self, row: Row) -> Row:
        # strategies change the row they are given
        try:
            rendered = self._transform(copy.deepcopy(row))
        except Exception as error:
            empty = [column for column, value in row.items() if value in (None, "", [])]
            raise RowError(
                f"the prompt strategy failed with {type(error).__name__}: {error}; check that the columns it reads are "
                "there and filled" + (f" (empty: {', '.join(empty)})" if empty else "")
            ) from error
        if not isinstance(rendered, Mapping):
            raise RowError(
                f"the prompt strategy returned {kind_of(rendered)}, not prompt, chosen and rejected"
            )
        return rendered

    def _places(self, row: Row, texts: Row) -> dict[str, _Place | None]:
        """Where each part stands: as in the row before, where all three still do, else looked for."""
        if len(self._last) == len(_COLUMNS) and (places := self._as_before(row, texts)):
            return places
        places = {name: self._find(row, texts, name) for name in _COLUMNS}
        self._last = {name: place for name, place in places.items() if place is not None}
        return places

    def _as_before(self, row: Row, texts: Row) -> dict[str, _Place | None] | None:
        try:
            slots = {place.slot: _MARKERS[name] for name, place in self._last.items()}
            rendered = self._render(_replace(row, slots))
        except (RowError, LookupError, TypeError):
            return None
        for name, place in self._last.items():
            if rendered.get(name) != place.before + _MARKERS[name] + place.after:
                return None
        return dict(self._last)

    def _find(self, row: Row, texts: Row, name: str) -> _Place | None:
        candidates = dict.fromkeys(self._slots(row, name))
        if (last := self._last.get(name)) and last.slot in candidates:
            candidates = dict.fromkeys((last.slot, *candidates))
        others = [other for other in _COLUMNS if other != name]
        marker = _MARKERS[name]
        for slot in candidates:
            try:
                trial = self._render(_replace(row, {slot: marker}))
            except RowError:
                continue
            text = str(trial.get(name))
            if marker in text and all(trial.get(o) == texts[o] for o in others):
                before, _, after = text.partition(marker)
                return _Place(slot, before, after)
        return None

    def _check_only_place(self, row: Row, place: _Place) -> None:
        """Nothing else of the row may get into the chosen response: the base response would get it too."""
        for slot in self._slots(row, "chosen"):
            value = _get(row, slot)
            if slot == place.slot or not isinstance(value, str) or not value.strip():
                continue
            try:
                trial = self._render(_replace(row, {slot: "bapoothermarker"}))
            except RowError:
                continue
            if "bapoothermarker" in str(trial.get("chosen")):
                one, other = (".".join(map(str, s)) for s in (place.slot, slot))
                raise RowError(
                    f"the prompt strategy makes the chosen response of two places of the row, {one} and {other}, so that "
                    f"the base response would get the {other} of the chosen one; put both into one column, or let base "
                    "responses be generated (`field_base: false`)"
                )

    def _check_source(self, row: Row, text: str, name: str, place: _Place) -> None:
        """What a strategy wraps into a template looks like text even if there was none."""
        value, column = _get(row, place.slot), place.slot[0]
        if value is None or (isinstance(value, str) and not value.strip()):
            state = "missing" if value is None else "empty"
            raise RowError(f"{name} is {state} (column {column!r}); fill it or remove the row")
        if not isinstance(value, str):
            raise RowError(f"{name} is {kind_of(value)} (column {column!r}); it must be text")
        if len(place.slot) > 1 and str(row[column]) in text:
            raise RowError(
                f"{name} is {kind_of(row[column])} (column {column!r}), but this `type:` takes text there; use one for "
                "messages, such as chat_template.default"
            )
        if not has_words(text, value):
            raise RowError(
                f"the prompt strategy does not write {name} as the row has it: {value.strip()[:60]!r} became "
                f"{text[:60]!r}; use another `type:`, or mend the row"
            )

    def _check_messages(self, row: Row, text: str, name: str, place: _Place) -> None:
        """A conversation arrives as a whole: some strategies take two messages of it, however many there are."""
        column = place.slot[0]
        messages = row[column]
        if column not in self._columns[name] or not isinstance(messages, list):
            return
        for i, message in enumerate(messages, start=1):
            said = message
            if isinstance(message, Mapping):
                said = message.get("content", message.get("value"))
            if said is not None and not isinstance(said, str):
                raise RowError(f"message {i} of {name} is {kind_of(said)}; it must be text")
            if said and not has_words(text, said):
                raise RowError(
                    f"the prompt strategy leaves out message {i} of {name} ({said.strip()[:60]!r}); use one for whole "
                    "conversations, such as chat_template.argilla_chat, or remove the message"
                )

    def _slots(self, row: Row, name: str) -> Iterator[Slot]:
        columns = [c for c in self._columns[name] if c in row]
        own = [f"{self._fields.base}{tail}" for tail in ("", "_cut", "_tokens")]
        columns += [c for c in row if c not in columns and c not in own]
        for column in columns:
            if not (name == "prompt" and "system" in str(column)):
                yield from _leaves(row[column], (column,))


def _leaves(value: Any, path: Slot) -> Iterator[Slot]:
    """Paths of all values inside a value; lists from their end, since a response comes last."""
    if isinstance(value, Mapping):
        # the text of a message before its role and whatever else it has
        for key in sorted(value, key=lambda k: k not in ("content", "value", "answer", "text")):
            yield from _leaves(value[key], (*path, key))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for i in range(1, len(value) + 1):
            yield from _leaves(value[-i], (*path, -i))
    else:
        yield path


def _get(row: Row, slot: Slot) -> Any:
    value: Any = row
    for key in slot:
        value = value[key]
    return value


def _replace(row: Row, texts: Mapping[Slot, str]) -> Row:
    row = copy.deepcopy(row)
    for slot, text in texts.items():
        _get(row, slot[:-1])[slot[-1]] = text
    return row
