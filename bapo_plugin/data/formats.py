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
# where each part is looked for first; all other columns follow
_COLUMNS = {
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "prompt": ("prompt", "input", "question", "instruction", "messages", "conversations"),
}


class RowError(ValueError):
    """A row that can't be used; the text says what is wrong with it and what mends it."""


class BaseRenderer:
    """Callable row -> {"prompt", "chosen", "rejected", "base"}, all strings as the model sees them.

    Args:
        transform: the strategy, already bound to its tokenizer.
        field_base: column with the base response.
        entry: the data set's entry in the YAML; read are `field_chosen`, `field_rejected`,
            `field_prompt`, `field_messages`, `message_property_mappings` and `roles`, beside `type:`
            or inside it.
    """

    def __init__(self, transform: Transform, *, field_base: str, entry: Mapping | None = None):
        self._transform = transform
        self.field_base = field_base
        inner = (entry or {}).get("type")
        settings = {**(entry or {}), **(inner if isinstance(inner, Mapping) else {})}
        names = {part: [settings.get(f"field_{part}")] for part in _COLUMNS}
        names["prompt"].append(settings.get("field_messages"))
        self._columns = {
            part: tuple(filter(None, names[part])) + known for part, known in _COLUMNS.items()
        }
        mapping = settings.get("message_property_mappings") or {}
        self._role_keys = (mapping.get("role"), "role", "from")
        self._content_keys = (mapping.get("content"), "content", "value")
        roles = (settings.get("roles") or {}).get("assistant") or []
        self._assistant = {"assistant", "gpt", "model", "chatgpt", *roles}
        self._last_slot: dict[str, Slot] = {}

    def __call__(self, row: Row) -> Row:
        """Render one row.

        Raises:
            RowError: a response is missing, empty or of a wrong type, the strategy fails on the row,
                or it gives no place for the base response.
        """
        base = self._base_text(row)
        rendered = self._render(row)
        for name in _COLUMNS:
            value = rendered.get(name)
            if not isinstance(value, str):
                raise RowError(
                    f"{name} is {_kind(value)} after the prompt strategy, not text; check the columns "
                    "that `field_...` and `type` name"
                )
            if not value.strip():
                raise RowError(f"{name} is empty; fill it or remove the row")
        slots = {name: self._find_slot(row, rendered, name) for name in _COLUMNS}
        for name, found in slots.items():
            if found is not None:
                self._check_source(row, rendered, name, found[0])
        if slots["chosen"] is None:
            raise RowError(
                "found no place for the base response: no column can be changed such that only the "
                "rendered chosen response changes; name the column of the chosen response with "
                "`field_chosen:`"
            )
        slot = slots["chosen"][0]
        with_base = self._render(_replace(row, slot, base))
        same = all(with_base[name] == rendered[name] for name in ("prompt", "rejected"))
        if not same:
            raise RowError(
                "the prompt strategy renders another prompt when it renders the base response"
            )
        out = {name: rendered[name] for name in ("prompt", "chosen", "rejected")}
        out["base"] = with_base["chosen"]
        for name, found in (
            ("chosen", slots["chosen"]),
            ("rejected", slots["rejected"]),
            ("base", slots["chosen"]),
        ):
            if found is None:
                continue
            # axolotl 0.19 cuts the response out of a rendered dummy conversation by looking for its
            # text; what also occurs in the template is cut too early, and more than the turn is left
            source, before, after = found
            text = base if name == "base" else _get(row, source)
            if out[name] != before + text + after and out[name].endswith(text + after):
                raise RowError(
                    f"{name} is so short that axolotl's chat template strategy finds it inside the "
                    "template itself and cuts at the wrong place; lengthen the response or remove the row"
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
        name = self.field_base
        if name not in row:
            raise RowError(
                f"there is no column {name!r} with the base response (columns: "
                f"{', '.join(map(str, row))}); name it with `field_base:` in the data set's entry"
            )
        value = row[name]
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            value = value[-1]
        if isinstance(value, Mapping):
            role = next((value[k] for k in self._role_keys if value.get(k)), None)
            if role is not None and role not in self._assistant:
                raise RowError(f"{name} must end with a message of the assistant, not of {role!r}")
            value = next((value[k] for k in self._content_keys if value.get(k) is not None), None)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise RowError(
                f"{name} is {'missing' if value is None else 'empty'}; put there what the model answers to "
                "the prompt before training, or remove the row"
            )
        if not isinstance(value, str):
            raise RowError(
                f"{name} is {_kind(value)}; it must be a string, a message or a list of messages"
            )
        return value

    def _render(self, row: Row) -> Row:
        # strategies change the row they are given
        try:
            rendered = self._transform(copy.deepcopy(row))
        except Exception as error:
            empty = [column for column, value in row.items() if value in (None, "", [])]
            raise RowError(
                f"the prompt strategy failed with {type(error).__name__}: {error}; check that the columns "
                "it reads are there and filled" + (f" (empty: {', '.join(empty)})" if empty else "")
            ) from error
        if not isinstance(rendered, Mapping):
            raise RowError(
                f"the prompt strategy returned {_kind(rendered)}, not prompt, chosen and rejected"
            )
        return rendered

    def _find_slot(self, row: Row, rendered: Row, name: str) -> tuple[Slot, str, str] | None:
        """Where the text of `name` stands in the row, and what the strategy puts before and after it."""
        candidates = dict.fromkeys(self._slots(row, name))
        last = self._last_slot.get(name)
        if last in candidates:
            candidates = dict.fromkeys((last, *candidates))
        others = [other for other in _COLUMNS if other != name]
        for slot in candidates:
            try:
                trial = self._render(_replace(row, slot, _MARKER))
            except RowError:
                continue
            text = str(trial.get(name))
            if _MARKER in text and all(trial.get(o) == rendered[o] for o in others):
                self._last_slot[name] = slot
                before, _, after = text.partition(_MARKER)
                return slot, before, after
        return None

    def _check_source(self, row: Row, rendered: Row, name: str, slot: Slot) -> None:
        """What a strategy wraps into a template looks like text even if there was none."""
        value, column = _get(row, slot), slot[0]
        if value is None or (isinstance(value, str) and not value.strip()):
            state = "missing" if value is None else "empty"
            raise RowError(f"{name} is {state} (column {column!r}); fill it or remove the row")
        if not isinstance(value, str):
            raise RowError(f"{name} is {_kind(value)} (column {column!r}); it must be text")
        if len(slot) > 1 and str(row[column]) in rendered[name]:
            raise RowError(
                f"{name} is {_kind(row[column])} (column {column!r}), but this `type:` takes text there; use "
                "one for messages, such as chat_template.default"
            )

    def _slots(self, row: Row, name: str) -> Iterator[Slot]:
        columns = [c for c in self._columns[name] if c in row]
        columns += [c for c in row if c not in columns and c != self.field_base]
        for column in columns:
            if not (name == "prompt" and "system" in str(column)):
                yield from _leaves(row[column], (column,))


def _leaves(value: Any, path: Slot) -> Iterator[Slot]:
    """Paths of all values inside a value; lists from their end, since a response comes last."""
    if isinstance(value, Mapping):
        # the text of a message before its role and whatever else it has
        for key in sorted(value, key=lambda k: k not in ("content", "value", "answer", "text")):
            yield from _leaves(value[key], (*path, key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i in range(1, len(value) + 1):
            yield from _leaves(value[-i], (*path, -i))
    else:
        yield path


def _get(row: Row, slot: Slot) -> Any:
    value: Any = row
    for key in slot:
        value = value[key]
    return value


def _replace(row: Row, slot: Slot, text: str) -> Row:
    row = copy.deepcopy(row)
    _get(row, slot[:-1])[slot[-1]] = text
    return row


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
