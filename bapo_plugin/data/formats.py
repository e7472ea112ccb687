"""Render the base response through any DPO prompt strategy of axolotl.

A strategy is a function row -> {prompt, chosen, rejected} that knows nothing of base responses. We
don't teach it: we call it a second time on a copy of the row in which the base response stands
where the chosen one stood. Template, EOS and stripping are then the same by construction, for
axolotl's strategies and for a user's own.

Where the chosen response stands in a row differs from strategy to strategy (a column, the last
message of a list, an answer of the highest rank). So it is looked for: a place in the row is the
right one if a marker put there turns up in the rendered chosen response and leaves the rendered
prompt and rejected response as they were.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Transform = Callable[[Row], Row]
Slot = tuple[Any, ...]  # keys that lead from the row to a string, e.g. ("chosen", -1, "content")

_MARKER = "bapobaseresponsemarker"
# axolotl's chat_template strategies cut the response out of a rendered dummy conversation by looking
# for its text; a response that also occurs in the template is cut at the wrong place
_DUMMY = "[[dummy_message]]"
_PREFERRED_COLUMNS = ("chosen", "chosen_response")


class RowError(ValueError):
    """A row that can't be used; the text says what is wrong with it and what mends it."""


class BaseRenderer:
    """Callable row -> {"prompt", "chosen", "rejected", "base"}, all strings as the model sees them.

    Args:
        transform: the strategy, already bound to its tokenizer.
        field_base: column with the base response.
        field_chosen: column with the chosen response, where the YAML names it.
    """

    def __init__(self, transform: Transform, *, field_base: str, field_chosen: str | None = None):
        self._transform = transform
        self.field_base = field_base
        self._columns = ((field_chosen,) if field_chosen else ()) + _PREFERRED_COLUMNS
        self._last_slot: Slot | None = None

    def __call__(self, row: Row) -> Row:
        """Render one row.

        Raises:
            RowError: a response is missing, empty or of a wrong type, the strategy fails on the row,
                or it gives no place for the base response.
        """
        base = self._base_text(row)
        rendered = self._render(row)
        for name in ("prompt", "chosen", "rejected"):
            value = rendered.get(name)
            if not isinstance(value, str):
                raise RowError(
                    f"{name} is {_kind(value)} after the prompt strategy, not text; check the columns "
                    "that `field_...` and `type` name"
                )
            if not value.strip():
                raise RowError(f"{name} is empty; fill it or remove the row")
        slot = self._find_slot(row, rendered)
        with_base = self._render(_replace(row, slot, base))
        if (with_base["prompt"], with_base["rejected"]) != (
            rendered["prompt"],
            rendered["rejected"],
        ):
            raise RowError(
                "the prompt strategy renders another prompt when it renders the base response"
            )
        out = {
            "prompt": rendered["prompt"],
            "chosen": rendered["chosen"],
            "rejected": rendered["rejected"],
            "base": with_base["chosen"],
        }
        for name, text in out.items():
            if name != "prompt" and _DUMMY in text:
                raise RowError(
                    f"{name} is so short that axolotl's chat template strategy finds it inside the template "
                    "itself and cuts at the wrong place; lengthen the response or remove the row"
                )
        return out

    def source(self) -> str:
        """Source text of the module that defines the strategy, for a cache key; "" where it has none."""
        function = self._transform
        while isinstance(function, functools.partial):
            function = function.func
        try:
            return inspect.getsource(inspect.getmodule(function))
        except (OSError, TypeError):
            return ""

    def _base_text(self, row: Row) -> str:
        if self.field_base not in row:
            raise RowError(
                f"there is no column {self.field_base!r} with the base response (columns: "
                f"{', '.join(map(str, row))}); name it with `field_base:` in the data set's entry"
            )
        value = row[self.field_base]
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            value = value[-1]
        if isinstance(value, Mapping):
            role = value.get("role") or value.get("from")
            if role is not None and role not in ("assistant", "gpt", "model", "chatgpt"):
                raise RowError(
                    f"{self.field_base} must end with a message of the assistant, not of {role!r}"
                )
            value = value.get("content", value.get("value"))
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise RowError(
                f"{self.field_base} is {'missing' if value is None else 'empty'}; put there what the model "
                "answers to the prompt before training, or remove the row"
            )
        if not isinstance(value, str):
            raise RowError(
                f"{self.field_base} is {_kind(value)}; it must be a string, a message or a list of messages"
            )
        return value

    def _render(self, row: Row) -> Row:
        # strategies change the row they are given
        try:
            return self._transform(copy.deepcopy(row))
        except Exception as error:
            raise RowError(
                f"the prompt strategy failed with {type(error).__name__}: {error}; check that the columns "
                "it reads are there and filled"
            ) from error

    def _find_slot(self, row: Row, rendered: Row) -> Slot:
        candidates = dict.fromkeys(self._slots(row))
        if self._last_slot in candidates:
            candidates = dict.fromkeys((self._last_slot, *candidates))
        for slot in candidates:
            try:
                trial = self._render(_replace(row, slot, _MARKER))
            except RowError:
                continue
            same = (trial.get("prompt"), trial.get("rejected")) == (
                rendered["prompt"],
                rendered["rejected"],
            )
            if same and _MARKER in str(trial.get("chosen")):
                self._last_slot = slot
                return slot
        raise RowError(
            "found no place for the base response: no column can be changed such that only the rendered "
            "chosen response changes; name the column of the chosen response with `field_chosen:`"
        )

    def _slots(self, row: Row) -> Iterator[Slot]:
        columns = [c for c in self._columns if c in row]
        columns += [c for c in row if c not in columns and c != self.field_base]
        for column in columns:
            yield from _strings(row[column], (column,))


def _strings(value: Any, path: Slot) -> Iterator[Slot]:
    """Paths of all strings inside a value; lists from their end, since a response comes last."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, Mapping):
        # the text of a message before its role and whatever else it has
        for key in sorted(value, key=lambda k: k not in ("content", "value", "answer", "text")):
            yield from _strings(value[key], (*path, key))
    elif isinstance(value, Sequence):
        for i in range(1, len(value) + 1):
            yield from _strings(value[-i], (*path, -i))


def _replace(row: Row, slot: Slot, text: str) -> Row:
    row = copy.deepcopy(row)
    *parents, last = slot
    target: Any = row
    for key in parents:
        target = target[key]
    target[last] = text
    return row


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
