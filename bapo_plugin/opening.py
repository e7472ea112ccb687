"""The data sets of a configuration, opened: raw rows, and how each data set is read.

The chat formats (`chat_template.*`) are read into conversations and written by the chat template; all others go through
their prompt strategy. What ends an answer is known here too, since templates say a part of it.
"""

import inspect
import json
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.prompt_strategies.dpo import load as load_strategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset

from bapo_plugin.answers.prompts import read_prompts
from bapo_plugin.answers.stops import all_stops, named_stops, own_stops
from bapo_plugin.config import BAPOConfig, parse_block
from bapo_plugin.rows.chat import ChatRows, Prompts
from bapo_plugin.rows.conversation import fields_of
from bapo_plugin.rows.ends import StopTexts, special_texts
from bapo_plugin.rows.entries import NO_BASE
from bapo_plugin.rows.errors import RowError
from bapo_plugin.rows.origin import defined_by_axolotl, is_axolotls, source_of, takes_rendered
from bapo_plugin.rows.sources import Source, raw_rows
from bapo_plugin.rows.strategies import StrategyRows
from bapo_plugin.rows.template import ChatTemplate
from bapo_plugin.rows.tokens import Encoder
from bapo_plugin.rows.words import Words
from bapo_plugin.runs import hide
from bapo_plugin.store import Store

LOG = get_logger("axolotl." + __name__)

_CHAT = {"chat_template": False, "chat_template.default": False, "chat_template.argilla_chat": True}


def store_path(cfg: Any) -> Path:
    """Where base responses of a configuration are kept."""
    folder = Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH)
    return Path(parse_block(dict(cfg.bapo)).anchors.store or folder / "bapo-anchors.sqlite")


def template_date(cfg: Any) -> datetime | None:
    """What a template that writes the date got to hear in the rows of a configuration; None where none asked."""
    path = store_path(cfg)
    if not path.is_file():
        return None
    with Store(path, "base responses") as store:
        kept = store.get("date", ["now"]).get("now")
    return datetime.fromisoformat(kept.decode()) if kept else None


class Opening:
    """Opens the data sets of a configuration.

    Args:
        cfg: axolotl's validated configuration.
        tokenizer: axolotl's for this configuration.
    """

    def __init__(self, cfg: Any, tokenizer: Any):
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._bapo: BAPOConfig = parse_block(dict(cfg.bapo))
        #: ids of tokens that tokenizer and model name as ends of an answer
        self.named = named_stops(tokenizer, cfg.base_model, cfg.revision_of_model)
        #: text -> chat template, of the data sets that were opened
        self.templates: dict[str, ChatTemplate] = {}
        self._ends: set[int | None] = set()
        self._now: datetime | None = None

    def sources(self, split: str, index: int) -> list[Source]:
        """The data sets of an entry."""
        written = ((self._bapo.entries or {}).get(split) or [{}] * (index + 1))[index]
        entry = DictDefault({**self._cfg[split][index], **written})
        base = entry.get("field_base")
        base = self._bapo.field_base if base is None else base
        named = isinstance(base, str)
        name = f"{split}[{index}] ({hide(entry.path)})"
        fields = fields_of(
            entry, None if base is NO_BASE else base or "base", self._kind(entry) or False
        )
        own = own_stops(self._tokenizer, self._bapo.anchors.stop)
        found = []
        identity: Any
        is_users = False
        if self._kind(entry) is not None:
            template = self._template(entry, name)
            read = ChatRows(template, fields)
            ends = {*self.named, template.end_id, *own}
            encode = Encoder(self._tokenizer, True, template.words, ends)
            identity = [template.text, str(self._now), self._bapo.special_tokens_in_words]
        else:
            strategy = self._strategy(split, index, entry)
            ends = self._own_ends()
            self._ends |= ends
            stops = StopTexts(self._tokenizer, (self.named | ends) - {None})
            policy = self._bapo.special_tokens_in_words
            has_words = is_axolotls(strategy) and not takes_rendered(entry.get("type"))
            words = Words(self._tokenizer, policy) if has_words else None
            read = StrategyRows(strategy, fields, stops, entry, words)
            encode = Encoder(self._tokenizer, False, words, {*self.named, *ends, *own})
            identity = [source_of(strategy), self._tokenizer.chat_template, words and policy]
            is_users = not defined_by_axolotl(strategy)
        chat = None if self._kind(entry) is None else fields
        for part_name, rows in raw_rows(entry, name, self._cfg.hf_use_auth_token, chat):
            if named and base not in rows.column_names:
                raise ValueError(
                    f"{name}: there is no column {base!r} with the base response (columns: "
                    f"{', '.join(rows.column_names)}); mend `field_base:`, or remove it to have base responses generated"
                )
            if is_users:
                identity = [*identity, _examples(read, rows)]
            found.append(
                Source(
                    part_name,
                    rows,
                    read,
                    encode,
                    fields,
                    _kind_in_words(entry),
                    [dict(entry), base, identity, sorted(own)],
                )
            )
        return found

    def prompts(self, path: str, key: str) -> Source:
        """The prompts of a file, written by the template of the chat data sets, else that of the YAML.

        Args:
            path: see `read_prompts`.
            key: of the YAML, which names the file.

        Raises:
            ValueError: the file can't be used, or there is no chat template.
        """
        chats = read_prompts(path, key)
        texts = list(dict.fromkeys(json.dumps(chat) for chat in chats))
        if len(texts) < len(chats):
            LOG.info(f"{key}: {len(chats) - len(texts)} repeated prompts are left out")
        name = f"{key} ({path})"
        template = next(iter(self.templates.values()), None)
        if template is None:
            template = self._template(DictDefault({}), name)
        return Source(
            name,
            Dataset.from_dict({"chat": texts}),
            Prompts(template),
            Encoder(self._tokenizer, from_template=True, words=template.words),
            fields_of({}, None),
            "prompts",
            [template.text, str(self._now), self._bapo.special_tokens_in_words],
        )

    @staticmethod
    def _kind(entry: Any) -> bool | None:
        """Whether the entry is a chat format with whole conversations; None where it is no chat format."""
        kind = entry.get("type")
        return _CHAT.get(kind) if isinstance(kind, str) else None

    def _template(self, entry: Any, name: str) -> ChatTemplate:
        try:
            text = get_chat_template_from_config(self._cfg, entry, self._tokenizer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; set `chat_template:`") from error
        if text not in self.templates:
            if "strftime_now" in text and self._now is None:
                self._now = self._date()
            template = ChatTemplate(
                self._tokenizer, text, self.named, self._now, self._bapo.special_tokens_in_words
            )
            if template.end_id is None:
                LOG.warning(
                    f"The chat template ends turns with {template.end!r}, which is no token of this tokenizer, so nothing stops "
                    "the model there; add it to `tokens:` or use the model's own template"
                )
            self.templates[text] = template
            self._ends.add(template.end_id)
        return self.templates[text]

    def _date(self) -> datetime:
        """The time that templates get to hear: that of the first rendering, else a new day would make all
        prompts other ones."""
        with Store(store_path(self._cfg), "base responses") as store:
            kept = store.put_first("date", "now", datetime.now().isoformat().encode())
        now = datetime.fromisoformat(kept.decode())
        LOG.info(
            f"The chat template writes the date; it stays that of the first rendering, {now:%Y-%m-%d %H:%M} (kept in "
            f"{store_path(self._cfg)})"
        )
        return now

    def _strategy(self, split: str, index: int, entry: Any) -> Any:
        """The data set's own prompt strategy, bound to the tokenizer."""
        kind = entry.get("type")
        if not kind:
            return lambda row: row  # no type: the columns are rendered already
        if isinstance(kind, dict):
            kind = "user_defined.default"
        # strategies read cfg.datasets[index], also for a test data set
        entries = [entry if i == index else other for i, other in enumerate(self._cfg[split])]
        strategy = load_strategy(
            kind, DictDefault({**self._cfg, "datasets": entries}), dataset_idx=index
        )
        if isinstance(strategy, tuple):
            strategy = strategy[0]
        if strategy is None:
            raise ValueError(
                f"{split}[{index}].type: {kind!r} is not a DPO prompt strategy of axolotl or of yours "
                "(the warning above has the reason); examples are chat_template.default, chatml.intel"
            )
        if "tokenizer" in inspect.signature(strategy).parameters:
            strategy = partial(strategy, tokenizer=self._tokenizer)
        return strategy

    def _own_ends(self) -> set[int | None]:
        """Ends of turn that rows of other formats may bring: that of the tokenizer's chat template, and those that
        axolotl's own formats write whatever the template is."""
        special = special_texts(self._tokenizer)
        ends = {i for i, text in special.items() if text in ("<|im_end|>", "<|eot_id|>")}
        if text := self._tokenizer.chat_template:
            try:
                ends.add(ChatTemplate(self._tokenizer, text, self.named).end_id)
            except ValueError:
                pass  # these rows don't need it
        return ends

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer.

        Raises:
            ValueError: nothing does, or `bapo.anchors.stop` names something else.
        """
        own = own_stops(self._tokenizer, self._bapo.anchors.stop)
        return all_stops(self.named, self._ends, own)

    @property
    def end_id(self) -> int | None:
        """The token that ends a turn of the chat template, else the end of sequence."""
        ends = [template.end_id for template in self.templates.values()]
        return next(iter(ends), self._tokenizer.eos_token_id)


def _examples(read: StrategyRows, rows: Dataset) -> list[str]:
    """What some rows become, for a cache key: a strategy of the user's own may read any key of the YAML, or a file. Empty where
    it makes something else of them each time."""

    def texts() -> list[str]:
        found = []
        for place in sorted({i * (len(rows) - 1) // 7 for i in range(8)}):
            try:
                found.append(str(read(rows[place])))
            except RowError as error:
                found.append(str(error))
        return found

    first = texts()
    return first if texts() == first else []


def _kind_in_words(entry: Any) -> str:
    kind = entry.get("type")
    if isinstance(kind, str):
        return kind
    return "user_defined" if kind else "none: columns are rendered already"
