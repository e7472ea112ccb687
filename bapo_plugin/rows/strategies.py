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
from typing import Any, NamedTuple

Row = dict[str, Any]
# columns that `bapo_plugin.anchors` adds: the generated response, and whether a limit cut it
GENERATED, GENERATED_CUT = "_bapo_base", "_bapo_base_cut"
Transform = Callable[[Row], Row]
Slot = tuple[Any, ...]  # keys that lead from the row to a string, e.g. ("chosen", -1, "content")

_MARKER = "bapobaseresponsemarker"
# where each part is looked for first; all other columns follow
_COLUMNS = {
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "prompt": ("prompt", "input", "question", "instruction", "messages", "conversations"),
}


class Source(NamedTuple):
    """One data set of the YAML: its name in messages, raw rows (a `datasets.Dataset`), how to render them."""

    name: str
    rows: Any
    renderer: "BaseRenderer"


class RowError(ValueError):
    """A row that can't be used; the text says what is wrong with it and what mends it."""


class Rendered(NamedTuple):
    """A row without its base response: texts; the prompt's own words, without template where that can
    be told; the chosen and rejected response's place and frame."""

    texts: Row
    words: str
    chosen: tuple[Slot, str, str]
    rejected: tuple[Slot, str, str] | None


class BaseRenderer:
    """Callable row -> {"prompt", "chosen", "rejected", "base"}, all strings as the model sees them,
    and "base_cut": whether the base response was cut by a limit, so that it has no end of turn.

    Args:
        transform: the strategy, already bound to its tokenizer.
        field_base: column with the base response.
        field_base_named: whether the user named it, so that it has to be there.
        entry: the data set's entry in the YAML; read are `field_chosen`, `field_rejected`,
            `field_prompt`, `field_messages`, `message_property_mappings` and `roles`, beside `type:`
            or inside it.
    """

    def __init__(
        self,
        transform: Transform,
        *,
        field_base: str,
        field_base_named: bool = False,
        entry: Mapping | None = None,
    ):
        self._transform = transform
        self.field_base = field_base
        self.field_base_named = field_base_named
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
        base, cut = self._base_text(row)
        texts, _, chosen, rejected = self.render_pair(row)
        slot, before, after = chosen
        if not base.strip():  # only a generated response may be empty; strategies refuse such text
            with_base = {**texts, "chosen": before + base + after}
        else:
            with_base = self._render(_replace(row, slot, base))
        if any(with_base[name] != texts[name] for name in ("prompt", "rejected")):
            raise RowError(
                "the prompt strategy renders another prompt when it renders the base response"
            )
        out = {**texts, "base": with_base["chosen"], "base_cut": cut}
        responses = {"chosen": (chosen, _get(row, slot)), "base": (chosen, base)}
        if rejected is not None:
            responses["rejected"] = (rejected, _get(row, rejected[0]))
        for name, ((_, before, after), text) in responses.items():
            # axolotl 0.19 cuts the response out of a rendered dummy conversation by looking for its
            # text; what also occurs in the template is cut too early, and more than the turn is left
            if out[name] != before + text + after and out[name].endswith(text + after):
                raise RowError(
                    f"{name} is so short that axolotl's chat template strategy finds it inside the "
                    "template itself and cuts at the wrong place; lengthen the response or remove the row"
                )
        if cut:
            out["base"] = out["base"].removesuffix(after)
        return out

    def render_pair(self, row: Row) -> Rendered:
        """Render a row that may lack its base response.

        Raises:
            RowError: as for the whole row.
        """
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
        texts = {name: rendered[name] for name in ("prompt", "chosen", "rejected")}
        words = _get(row, slots["prompt"][0]) if slots["prompt"] else texts["prompt"]
        return Rendered(texts, words, slots["chosen"], slots["rejected"])

    def lacks_base(self, row: Row) -> bool:
        """Whether the row has no base response: no such column, or nothing in it."""
        value = self._unwrap(row.get(self.field_base))
        return value is None or value == [] or (isinstance(value, str) and not value.strip())

    def wrap(self, text: str, like: Any) -> Any:
        """The text in the form that a column's other values have: text, a message, or messages."""
        if isinstance(like, Sequence) and not isinstance(like, str) and like:
            return [self.wrap(text, like[-1])]
        if isinstance(like, Mapping):
            role = next((k for k in self._role_keys if like.get(k)), None)
            content = next((k for k in self._content_keys if like.get(k) is not None), "content")
            return dict.fromkeys(like) | ({role: like[role]} if role else {}) | {content: text}
        return text

    def source(self) -> str:
        """Source text of the module that defines the strategy, for a cache key; "" where it has none."""
        function = self._transform
        while isinstance(function, functools.partial):
            function = function.func
        try:
            return inspect.getsource(inspect.getmodule(function))
        except (OSError, TypeError):
            return ""

    def _base_text(self, row: Row) -> tuple[str, bool]:
        if row.get(GENERATED) is not None:
            return row[GENERATED], bool(row[GENERATED_CUT])
        name = self.field_base
        if name not in row:
            raise RowError(
                f"there is no column {name!r} with the base response (columns: "
                f"{', '.join(c for c in map(str, row) if c not in (GENERATED, GENERATED_CUT))}); name it "
                "with `field_base:` in the data set's entry"
            )
        last = row[name]
        if isinstance(last, Sequence) and not isinstance(last, str) and last:
            last = last[-1]
        if isinstance(last, Mapping):
            role = next((last[k] for k in self._role_keys if last.get(k)), None)
            if role is not None and role not in self._assistant:
                raise RowError(f"{name} must end with a message of the assistant, not of {role!r}")
        value = self._unwrap(row[name])
        if self.lacks_base(row):
            raise RowError(
                f"{name} is {'missing' if value is None else 'empty'}; put there what the model answers to "
                "the prompt before training, have it generated (bapo.anchors.on_missing: generate), or "
                "remove the row"
            )
        if not isinstance(value, str):
            raise RowError(
                f"{name} is {_kind(value)}; it must be a string, a message or a list of messages"
            )
        return value, bool(row.get(f"{name}_cut"))

    def _unwrap(self, value: Any) -> Any:
        """The text of a column that holds text, a message, or messages, of which the last one counts."""
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            value = value[-1]
        if isinstance(value, Mapping):
            value = next((value[k] for k in self._content_keys if value.get(k) is not None), None)
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
        own = (self.field_base, f"{self.field_base}_cut", GENERATED, GENERATED_CUT)
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
