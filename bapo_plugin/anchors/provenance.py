"""What a base response depends on: the reference model as it is loaded, the tokenizer, the settings.

Two responses are the same response only if all of this is the same, so its fingerprint is part of
every response's key in the store. Names of folders are not: a model that was moved is the same model.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from bapo_plugin import __version__
from bapo_plugin.blocks import AnchorsConfig
from bapo_plugin.runs import hide
from bapo_plugin.store import Store

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# what a response means, and how it is kept; responses of another format are not read
FORMAT = 2


@dataclass(frozen=True)
class ReferenceSpec:
    """The reference model, as training loads it.

    Args:
        model: folder or name on the hub.
        revision: of the name.
        adapter: folder or name of the adapter that is part of the reference, or None.
        config: folder or name of the model's configuration, where it is another one.
        remote_code: whether code that comes with the model runs.
        loading: other settings that change what the loaded model computes.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    config: str | None = None
    remote_code: bool = False
    loading: Mapping[str, Any] = field(default_factory=dict)


def provenance(
    reference: ReferenceSpec,
    tokenizer: Any,
    templates: list[str],
    anchors: AnchorsConfig,
    stop_ids: list[int],
    store: Store,
) -> dict[str, Any]:
    """Everything a base response depends on besides its prompt, as plain values that JSON can hold.

    Args:
        reference: the model.
        tokenizer: the one that training uses.
        templates: the chat templates of the rows.
        anchors: settings of the generation.
        stop_ids: tokens that end a response.
        store: keeps hashes of model files, so that they are read only once.
    """
    sampled = anchors.temperature > 0
    model, code = reference.model, ("*.py",) if reference.remote_code else ()
    return {
        "model": _identity(model, reference.revision, store, code),
        "config": reference.config and _identity(reference.config, None, store, code),
        "loading": {key: _plain(value) for key, value in reference.loading.items() if value},
        "adapter": reference.adapter and _identity(reference.adapter, None, store),
        "tokenizer": tokenizer_hash(tokenizer),
        "template": _hash(templates),
        "generation": {
            "temperature": anchors.temperature,
            "top_p": anchors.top_p if sampled else None,
            "seed": anchors.seed if sampled else None,
            "stop_ids": stop_ids,
        },
        "engine": {"name": anchors.engine}
        | (
            {"url": hide(anchors.server.url), "model": anchors.server.model or model}
            if anchors.server
            else {}
        ),
        "versions": {"bapo": __version__, "format": FORMAT}
        | ({} if anchors.server else _versions(reference)),
    }


def fingerprint(provenance: dict[str, Any]) -> str:
    """Of what makes a difference: names and addresses are left out, and the template, which shows in
    the prompt's tokens."""
    kept = json.loads(json.dumps({k: v for k, v in provenance.items() if k != "template"}))
    for part in ("model", "adapter", "config"):
        if kept[part] and kept[part].get("content"):
            kept[part].pop("name")
    kept["engine"].pop("url", None)
    return _hash(kept)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two provenances, as "part: old -> new"."""
    found = []
    for part in new:
        before, after = old.get(part), new[part]
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            for key in dict.fromkeys((*before, *after)):
                if before.get(key) != after.get(key):
                    found.append(
                        f"{part}.{key}: {_short(before.get(key))} -> {_short(after.get(key))}"
                    )
        else:
            found.append(f"{part}: {_short(before)} -> {_short(after)}")
    return found


def tokenizer_hash(tokenizer: Any) -> str:
    """Of vocabulary, merges, normalisation and special tokens; not of the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return _hash([type(tokenizer).__name__, tokenizer.special_tokens_map, vocabulary])


def _identity(
    name: str, revision: str | None, store: Store, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Of a model, an adapter or a configuration: a folder's content, or a commit of the hub."""
    if Path(name).is_dir():
        return _folder_identity(name, store, more)
    for file in ("config.json", "adapter_config.json"):
        try:
            found = cached_file(name, file, revision=revision)
        except OSError:
            continue
        if commit := extract_commit_hash(found, None):
            return {"name": name, "revision": commit}
        return {"name": name} | _folder_identity(str(Path(found).parent), store, more)
    raise ValueError(
        f"{name} is neither a folder nor a model or adapter that the hub's cache or the hub has; check the name"
    )


def _folder_identity(folder: str, store: Store, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Name and content hash of a folder with a model or an adapter.

    Reading many gigabytes takes a while, so a file's hash is kept under its path, size and time of
    last change.
    """
    files = sorted(
        path
        for pattern in (*_WEIGHTS, "config.json", "adapter_config.json", *more)
        for path in Path(folder).glob(pattern)
    )
    stamps = {}
    for path in files:
        stat = path.stat()
        stamps[path] = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    known = store.get("file", stamps.values())
    content = hashlib.sha256()
    for path in files:
        if stamps[path] not in known:
            known[stamps[path]] = _file_hash(path)
            store.put("file", {stamps[path]: known[stamps[path]]})
        content.update(path.name.encode() + known[stamps[path]])
    return {"name": str(folder), "content": content.hexdigest()[:32]}


def _file_hash(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.digest()


def _versions(reference: ReferenceSpec) -> dict[str, str]:
    names = ["torch", "transformers", "axolotl"]
    loading = reference.loading
    names += ["bitsandbytes"] if loading.get("load_in_4bit") or loading.get("load_in_8bit") else []
    names += ["peft"] if reference.adapter else []
    found = {}
    for name in names:
        try:
            found[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:8]}…"
