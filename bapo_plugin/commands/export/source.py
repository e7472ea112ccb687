"""What is exported: the folder of a run, the model below its adapter, and the chat template that it was trained with."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bapo_plugin.runs import (
    adapter_settings,
    base_model,
    check_adapter,
    check_all_whole,
    has_adapter,
    is_finished,
    is_hub_name,
    recorded_config,
    unfinished,
)

_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# beginnings of init_lora_weights
_OUT_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# what a tokenizer's own files are called
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja"),
)


@dataclass(frozen=True)
class Source:
    """A run as it lies on this machine.

    Args:
        folder: with an adapter or a whole model.
        adapter: adapter_config.json; None: the run trained all weights, and the folder is a model of its own.
        config: the YAML, as the run recorded it.
        base: name or folder of the model below the adapter, as it is to be shown to others.
        revision: of a base on the hub; None: the newest.
    """

    folder: Path
    adapter: Mapping[str, Any] | None
    config: Mapping[str, Any]
    base: str
    revision: str | None

    @property
    def name(self) -> str:
        """For servers: letters, digits, dots, dashes and underscores."""
        folder = self.folder.resolve()
        name = folder.name
        if name.startswith("checkpoint-"):
            name = f"{folder.parent.name}-{name}"
        return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"

    @property
    def changed_base(self) -> str | None:
        """The `init_lora_weights` that took what the adapter starts with out of the base; None where the base stayed itself."""
        init = str((self.adapter or {}).get("init_lora_weights")).lower()
        return init if init.startswith(_OUT_OF_THE_BASE) else None

    def check_base_is_found_again(self) -> None:
        """PEFT takes the same out of the base again for PiSSA and OLoRA. The others need what only training had: random
        numbers, gradients, activations or quantised weights.

        Raises:
            ValueError: PEFT can't make the weights again that the adapter was trained on.
        """
        if self.changed_base not in (None, "pissa", "olora"):
            raise ValueError(
                f"the adapter in {self.folder} was trained on a base that init_lora_weights: {self.changed_base} had changed, "
                "and PEFT can't change it the same way again. Train without it, or let training save plain LoRA by PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=...)"
            )

    @property
    def bits(self) -> int | None:
        """4 or 8, where the weights below the adapter were rounded in training."""
        return (
            4 if self.config.get("load_in_4bit") else 8 if self.config.get("load_in_8bit") else None
        )

    @property
    def trusts(self) -> bool:
        """Whether the YAML let the model bring code of its own."""
        return bool(self.config.get("trust_remote_code"))

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer lies that training used: here, or above a checkpoint."""
        for place in (self.folder, self.folder.resolve().parent):
            if (place / "tokenizer_config.json").is_file():
                return place
            if not self.folder.name.startswith("checkpoint-"):
                break
        return None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the adapter's tensors."""
        from safetensors import safe_open

        with safe_open(self.folder / "adapter_model.safetensors", "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

    def base_folder(self) -> Path:
        """Where the base model's files lie on this machine; nothing is fetched.

        Raises:
            ValueError: it isn't here.
        """
        if not self.base:
            raise ValueError(f"{self.folder} names no base model; name it with --base")
        folder = Path(self.base)
        if not folder.is_dir():
            folder = self._cached()
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"base model: {folder} has no config.json; name its folder with --base"
            )
        check_all_whole(folder)
        return folder

    def _cached(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        at = f" --revision {self.revision}" if self.revision else ""
        try:
            return Path(snapshot_download(self.base, revision=self.revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            fetch = (
                f", or fetch it first: hf download {self.base}{at}"
                if is_hub_name(self.base)
                else ""
            )
            raise ValueError(
                f"base model: {self.base!r}, which {self.folder} was trained on, is no folder and not in the hub's "
                f"cache on this machine. Name the folder where it lies now with --base{fetch}"
            ) from None

    def facts(self) -> list[tuple[str, str]]:
        """What the screen says of it."""
        kind = "an adapter" if self.adapter is not None else "a whole model"
        state = " trained to its end" if is_finished(self.folder) else ""
        found = [("run", f"{self.folder}, {kind}{state}")]
        if self.adapter is not None:
            at = f", revision {self.revision}" if self.revision else ""
            found.append(("base", f"{self.base}{at}"))
        return found

    def notes(self) -> list[str]:
        """What deserves a look before it is used."""
        found = [text] if (text := unfinished(self.folder)) else []
        own = [
            (i, entry["chat_template"])
            for i, entry in enumerate(self.config.get("datasets") or [])
            if isinstance(entry, Mapping) and entry.get("chat_template")
        ]
        found += [
            f"datasets[{i}] was written by a chat template of its own ({str(name)[:40]}); what is exported is that of the "
            "tokenizer. Ask the model as its rows were written"
            for i, name in own
            if name not in (self.config.get("chat_template"), "tokenizer_default")
        ]
        return found


def read_source(target: Path, base: str | None = None) -> Source:
    """The run that a folder, a checkpoint in it, or its YAML names.

    Args:
        target: folder or YAML.
        base: of `--base`: overrides the base model that the run recorded.

    Raises:
        ValueError: there is nothing trained, or the YAML can't be read.
    """
    folder = _output_dir(target) if target.suffix in (".yml", ".yaml") else target
    config = recorded_config(folder) or {}
    if not has_adapter(folder) and _is_whole(folder):
        check_all_whole(folder)
        return Source(folder, None, config, str(folder), None)
    check_adapter(folder)
    adapter = adapter_settings(folder)
    revision = None if base else config.get("revision_of_model") or adapter.get("revision")
    return Source(folder, adapter, config, base or base_model(folder), revision)


def chat_template(folder: Path | None, trust: bool) -> str | None:
    """The template of the tokenizer in a folder; None where there is no tokenizer or no template."""
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=trust, local_files_only=True
    ).chat_template
    return found.get("default") if isinstance(found, dict) else found


@dataclass(frozen=True)
class Template:
    """The chat template that a run was trained with.

    Args:
        text: of it; None: there is none.
        is_base: whether it is the base's.
        phrase: for the screen.
        notes: what deserves a look.
    """

    text: str | None
    is_base: bool
    phrase: str
    notes: tuple[str, ...] = ()


def compare_templates(source: Source) -> Template:
    """Which chat template the run was trained with, beside that of its base."""
    own = chat_template(source.tokenizer_folder, source.trusts)
    if source.adapter is None:
        return Template(own, True, "the model's own" if own else "none")
    try:
        base = chat_template(source.base_folder(), source.trusts)
    except ValueError:
        note = f"{source.base} isn't on this machine: its chat template couldn't be compared with the run's"
        return Template(own, False, "the run's" if own else "none", (note,))
    if source.tokenizer_folder is None:
        note = (
            f"{source.folder} has no tokenizer: that of the base is taken. If the YAML set chat_template or special_tokens, the "
            "model was trained with others"
        )
        return Template(base, True, "the base's", (note,))
    if own is None:
        note = "There is no chat template: ask for completions, of text written as in training"
        return Template(None, base is None, "none", (note,))
    if base is None:
        return Template(own, False, "the run's; the base has none")
    if own == base:
        return Template(own, True, "the run's, which is the base's")
    note = "Trained with another chat template than the base's: what is exported has the run's"
    return Template(own, False, "the run's, which differs from the base's", (note,))


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in _WHOLE)


def _output_dir(path: Path) -> Path:
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read as YAML: {error}") from None
    if not isinstance(config, Mapping) or not config.get("output_dir"):
        raise ValueError(f"{path} has no output_dir; name the folder of the run")
    folder = Path(config["output_dir"])
    if not folder.is_dir():
        raise ValueError(f"{path}: output_dir: {folder} isn't there; train first")
    return folder
