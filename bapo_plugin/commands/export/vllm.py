"""Adapters for vLLM, which serves them on one base without merging: will it take them, and the command that serves them.

What it takes stands in vLLM's `config/lora.py`, `lora/peft_helper.py` and `lora/lora_model.py`. Part of it is refused there when
the adapter is first asked, and part is left out without a word.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from bapo_plugin.commands.export.result import ELSEWHERE, Command, Result
from bapo_plugin.commands.export.source import (
    TOKENIZER_FILES,
    Source,
    Template,
    compare_templates,
)
from bapo_plugin.files import whole_folder, write_whole
from bapo_plugin.runs import is_hub_name, same_place

# of --max-lora-rank, from the smallest that fits
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TEMPLATE = "chat_template.jinja"
_TAKEN = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")


def serve(sources: Sequence[Source], output: Path | None = None) -> Result:
    """The command that serves adapters of one base, each as a model of its own.

    Args:
        sources: adapters, or one whole model.
        output: copy adapter and tokenizer to this folder, or to one below it for each of several. Default: they are
            served from where they are.

    Raises:
        ValueError: vLLM doesn't take an adapter as it was trained, or they have different bases or templates.
    """
    first = sources[0]
    templates = [compare_templates(source) for source in sources]
    result = Result()
    for source, template in zip(sources, templates, strict=True):
        result.facts += [*source.facts(), ("template", template.phrase)]
        notes = [*source.notes(), *template.notes]
        result.notes += [note for note in notes if note not in result.notes]
    if whole := next((source for source in sources if source.adapter is None), None):
        if len(sources) > 1:
            raise ValueError(
                f"{whole.folder} is a whole model, which vLLM serves alone; export it alone"
            )
        words = [["vllm", "serve", str(whole.folder)], ["--served-model-name", whole.name]]
        result.commands = [Command("Serve it with vLLM", words), _ask(whole.name)]
        return result
    ranks = [check(source) for source in sources]
    _check_together(sources, templates)
    several = len(sources) > 1
    folders = [source.folder for source in sources]
    if output is not None:
        folders = [output / source.name if several else output for source in sources]
        for source, folder in zip(sources, folders, strict=True):
            _copy(source, folder)
            result.wrote.append(folder)
    words = [["vllm", "serve", first.base]]
    if first.revision:
        words.append(["--revision", first.revision])
    words += [["--enable-lora"], ["--max-lora-rank", str(max(ranks))]]
    if several:
        words.append(["--max-loras", str(len(sources))])
    words.append(["--lora-modules"])
    words += [[_module(source.name, f)] for source, f in zip(sources, folders, strict=True)]
    if templates[0].text and not templates[0].is_base:
        path, is_new = _template_file(first, folders[0], templates[0].text)
        words.append(["--chat-template", str(path)])
        result.wrote += [path] if is_new else []
    if first.bits:
        result.notes.append(
            f"Trained on {first.bits}-bit weights, served on the base as published: answers differ a little"
        )
    if not is_hub_name(first.base):
        result.notes.append(
            f"{first.base} is a folder of this machine; elsewhere name its own path"
        )
    result.commands = [Command("Serve it with vLLM", words), _ask(first.name)]
    result.found |= {"max_lora_rank": max(ranks)}
    return result


def check(source: Source) -> int:
    """The smallest `--max-lora-rank` for an adapter.

    Raises:
        ValueError: vLLM would refuse it, or serve something else than was trained.
    """
    adapter = source.adapter or {}
    rank = int(adapter.get("r") or 0)
    source.check_base_is_found_again()
    if reason := not_plain(source):
        raise ValueError(_no(source, reason))
    if others := [name for name in source.tensors() if not name.endswith(_TAKEN)]:
        raise ValueError(_no(source, f"it holds weights beside LoRA's, such as {others[0]}"))
    for key in ("rank_pattern", "alpha_pattern"):
        if adapter.get(key):
            raise ValueError(_no(source, f"it ignores {key}, and scales all layers alike"))
    allowed = [number for number in _RANKS if number >= rank]
    if not allowed:
        raise ValueError(_no(source, f"its rank is {rank}, and at most {_RANKS[-1]} is allowed"))
    return allowed[0]


def not_plain(source: Source) -> str | None:
    """Why an adapter isn't LoRA's two matrices on whole layers; None where it is."""
    adapter = source.adapter or {}
    if adapter.get("peft_type") != "LORA":
        return f"it is {adapter.get('peft_type')}, not LoRA"
    if adapter.get("use_dora"):
        return "it is DoRA"
    if adapter.get("modules_to_save"):
        return (
            f"it trained whole modules (modules_to_save: {', '.join(adapter['modules_to_save'])})"
        )
    if adapter.get("target_parameters"):
        return (
            f"it trained parameters (target_parameters: {', '.join(adapter['target_parameters'])})"
        )
    if adapter.get("trainable_token_indices"):
        return "it trained embeddings of single tokens (trainable_token_indices)"
    if (adapter.get("bias") or "none") != "none" or adapter.get("lora_bias"):
        return "it trained biases"
    if init := source.changed_base:
        return f"it was trained on what init_lora_weights: {init} left of the base"
    return None


def _no(source: Source, reason: str) -> str:
    return (
        f"vLLM doesn't serve the adapter in {source.folder} as it was trained: {reason}. Merge it: bapo export "
        f"{source.folder} --to merged"
    )


def _check_together(sources: Sequence[Source], templates: Sequence[Template]) -> None:
    first, *others = sources
    bases = {(source.base, source.revision) for source in sources}
    if any(
        not same_place(first.base, other.base) or first.revision != other.revision
        for other in others
    ):
        shown = ", ".join(
            f"{base} {revision or ''}".strip() for base, revision in sorted(bases, key=str)
        )
        raise ValueError(
            f"the adapters have different bases ({shown}); vLLM serves one: export them apart"
        )
    if len({template.text for template in templates}) > 1:
        raise ValueError(
            "the adapters were trained with different chat templates, and vLLM uses one for all; export them apart"
        )
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"adapters have the same name ({', '.join(names)}); rename a folder")


def _copy(source: Source, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--output: {folder} isn't empty, and nothing is overwritten; name another folder"
        )
    files = [source.folder / name for name in _WEIGHTS]
    if source.tokenizer_folder:
        files += [source.tokenizer_folder / name for name in TOKENIZER_FILES]
    with whole_folder(folder, ELSEWHERE) as partial:
        for path in files:
            if path.is_file():
                shutil.copy2(path, partial / path.name)


def _template_file(source: Source, folder: Path, text: str) -> tuple[Path, bool]:
    """A file with the template, and whether it was written now: older tokenizers keep it among their settings."""
    for place in (folder, source.tokenizer_folder):
        if place and (place / _TEMPLATE).is_file():
            return place / _TEMPLATE, False
    write_whole(folder / _TEMPLATE, text, ELSEWHERE)
    return folder / _TEMPLATE, True


def _module(name: str, folder: Path) -> str:
    path = str(folder)
    if "=" in path or "," in path:  # the short form is split there
        return json.dumps({"name": name, "path": path})
    return f"{name}={path}"


def _ask(name: str) -> Command:
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    return Command(
        "Ask it",
        [
            ["curl", "localhost:8000/v1/chat/completions"],
            ["-H", "Content-Type: application/json"],
            ["-d", json.dumps(body)],
        ],
    )
