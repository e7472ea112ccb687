"""The data sets of a configuration: their raw rows, and how these are read."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config
from axolotl.utils.dict import DictDefault
from datasets import Dataset, DatasetDict

from bapo_plugin.rows.conversation import Fields, is_blank
from bapo_plugin.rows.exact import with_text_calls
from bapo_plugin.rows.files import check_files, check_utf8, local_files, what_is_wrong
from bapo_plugin.rows.template import RenderedRow
from bapo_plugin.rows.tokens import Encoder


@dataclass(frozen=True)
class Source:
    """One data set of the YAML.

    Args:
        name: in messages.
        rows: raw rows.
        read: row -> text.
        encode: text -> ids.
        fields: columns and keys.
        kind: `type:` of its entry, for messages.
        identity: everything that its rendered rows depend on besides rows and tokenizer, for a cache key.
    """

    name: str
    rows: Dataset
    read: Callable[[dict], RenderedRow]
    encode: Encoder
    fields: Fields
    kind: str
    identity: Any


def raw_rows(
    entry: DictDefault, name: str, token: Any = None, fields: Fields | None = None
) -> Iterator[tuple[str, Dataset]]:
    """(name, rows) of the parts that an entry stands for.

    Args:
        entry: with all the keys of the YAML.
        name: for messages.
        token: for data sets on the hub.
        fields: of a chat format, whose tools and tool calls come as JSON text from JSON files.

    Raises:
        ValueError: it can't be loaded, has no rows, or not the split.
    """
    check_files(entry, name)
    for config in datasets_with_name_generator([entry]):
        try:
            rows = load_dataset_with_config(config, token, streaming=False)
        except Exception as error:  # whatever axolotl, `datasets`, or a hub runs into
            if wrong := next(filter(None, map(what_is_wrong, local_files(entry))), ""):
                raise ValueError(f"{name} can't be loaded: {wrong}") from error
            cause = error.__cause__ or error
            raise ValueError(
                f"{name} can't be loaded: {type(cause).__name__}: {' '.join(str(cause).split())}; check `path:`, `split:` and "
                "`ds_type:`, and the file itself"
            ) from error
        if isinstance(rows, DatasetDict):
            if "train" not in rows:
                raise ValueError(
                    f"{name} has no split 'train' but {', '.join(rows)}: name one with `split:`"
                )
            rows = rows["train"]
        if fields is not None:
            rows = with_text_calls(rows, config, fields, name)
        if config.get("shards"):
            rows = rows.shard(config["shards"], config.get("shards_idx") or 0)
        if len(rows) == 0:
            raise ValueError(f"{name} has no rows: check the file and `split:`")
        check_utf8(rows, name)
        yield name, rows


def lacks_bases(source: Source) -> bool:
    """Whether a row of the source may have no base response."""
    column = source.fields.base
    if column is None or column not in source.rows.column_names:
        return True
    for part in source.rows.select_columns([column]).iter(batch_size=1000):
        if any(
            is_blank(value) or (isinstance(value, (list, dict)) and _is_empty(value))
            for value in part[column]
        ):
            return True
    return False


def _is_empty(value: Any) -> bool:
    """A message or messages without words."""
    last = value[-1] if isinstance(value, list) else value
    if not isinstance(last, Mapping):
        return False
    return not any(
        isinstance(v, str) and v.strip() for k, v in last.items() if k not in ("role", "from")
    )


def content_hash(rows: Dataset) -> str:
    """Of what the rows say; the fingerprint of `datasets` follows the file's time stamp instead."""
    digest = hashlib.sha256(str(rows.features).encode())
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
