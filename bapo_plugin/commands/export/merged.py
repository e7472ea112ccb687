"""The adapter written into the weights below it, by PEFT, and checks of what goes wrong there unnoticed.

An adapter that was trained on 4-bit weights has learned what to add to *rounded* weights. It is added to the base as published,
or, where that is asked for, to the weights that training saw; the drift of former answers says what the difference is.
"""

import dataclasses
import gc
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from bapo_plugin.answers.prompts import FormerAnswer
from bapo_plugin.commands.export.below import bytes_of_base, load, place_for
from bapo_plugin.commands.export.kept import (
    WHOLE,
    check_kept,
    former_answers,
    logps_off_and_on,
    token_logps,
)
from bapo_plugin.commands.export.result import ELSEWHERE, Command, Result, size
from bapo_plugin.commands.export.source import Source, compare_templates
from bapo_plugin.files import whole_folder

RECORD = "bapo_export.json"
# nats an answer: from here on it matters that training saw other weights
_MUCH = 1.0


def merge(
    source: Source,
    output: Path | None = None,
    *,
    dtype: str | None = None,
    rounded: bool = False,
    check: bool = True,
    named: str | None = None,
) -> Result:
    """Write the merged model to a folder, whole or not at all.

    Args:
        source: with an adapter; of a whole model nothing is written.
        output: a folder that doesn't exist or is empty. Default: `merged` in the run's.
        dtype: of the merged weights: bfloat16, float16 or float32. Default: that of the base as published.
        rounded: merge into the 4-bit weights that training saw, in that dtype again.
        check: compare log-probs of former answers before and after.
        named: the base as --base named it, for the next command.

    Returns:
        `found["folder"]` is the model's folder, `found["drift"]` what was measured, in nats.

    Raises:
        ValueError: the target isn't empty, disk or memory are too small, the base isn't there or doesn't fit the adapter,
            or the merged model isn't the trained one.
    """
    template = compare_templates(source)
    result = Result(source.facts(), [*source.notes(), *template.notes])
    if source.adapter is None:
        result.facts.append(("template", template.phrase))
        result.notes.append(f"There is nothing to merge: {source.folder} is the model itself")
        result.found["folder"] = str(source.folder)
        result.commands += _next_commands(source.folder, source, None)
        return result
    if rounded and source.bits != 4:
        raise ValueError(
            f"--rounded: {source.folder} wasn't trained on 4-bit weights as far as its record says; merge without it"
        )
    source.check_base_is_found_again()
    output = output or source.folder / "merged"
    base = source.base_folder()
    needed = bytes_of_base(source, base, dtype)
    _check_target(output, needed)
    device = place_for(needed)
    result.facts += [
        ("template", template.phrase),
        ("needs", f"{size(needed)} of memory and of disk"),
    ]

    tokenizer = AutoTokenizer.from_pretrained(
        str(source.tokenizer_folder or base), trust_remote_code=source.trusts
    )
    model = load(source, base, device, tokenizer, "rounded" if rounded else "published", dtype)
    if check:
        with model.disable_adapter():
            answers = former_answers(model, tokenizer)
        before, adapter = logps_off_and_on(model, answers)
    model = model.merge_and_unload(safe_merge=True)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"PEFT {source.adapter.get('peft_type')} left layers that it can't merge; serve the adapter itself"
        )
    drift: dict[str, float | int] = {}
    if check:
        merged = token_logps(model, answers)
        n = len(answers)
        drift = {
            "prompts": n,
            "tokens": len(merged),
            "adapter": float((adapter - before).sum()) / n,
            "merged": float((merged - before).sum()) / n,
            **dataclasses.asdict(check_kept(before, adapter, merged, model.dtype)),
        }
    dtype = str(model.dtype).removeprefix("torch.")
    with whole_folder(output, ELSEWHERE) as folder:
        result.notes += _save(model, tokenizer, base, folder)
        del model
        gc.collect()
        if check and source.bits and not rounded:
            result.notes += _measure_as_trained(source, base, device, tokenizer, answers, drift)
        record = {
            "format": 1,
            "base": source.base,
            "revision": source.revision,
            "adapter_sha256": adapter_hash(source),
            "rounded": rounded,
            "dtype": dtype,
            "drift": drift,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1), "utf-8")
    result.facts.append(("weights", _weights(source, dtype, rounded)))
    if drift:
        result.facts += _drift_facts(drift)
        if drift["share"] < WHOLE:
            result.notes.append(
                f"Rounding to {dtype} leaves about {drift['share']:.0%} of what the adapter changed: steps of the published weights "
                "are larger than it. --dtype float16 or float32 keeps it, and so does serving the adapter itself (--to vllm)"
            )
    else:
        result.notes.append("The merged model was not compared with the trained one (--no-check)")
    result.wrote.append(output)
    result.found |= {"folder": str(output), "drift": drift, "dtype": dtype}
    result.commands += _next_commands(output, source, named)
    return result


def _next_commands(folder: Path, source: Source, named: str | None) -> list[Command]:
    base = [["--base", named]] if named else []
    return [
        Command(
            "Serve it with vLLM",
            [["vllm", "serve", str(folder)], ["--served-model-name", source.name]],
        ),
        Command(
            "For llama.cpp and Ollama",
            [["bapo", "export", str(source.folder)], ["--to", "gguf"], *base],
        ),
    ]


def adapter_hash(source: Source) -> str:
    """Of the adapter's weights and settings."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update(hashlib.sha256((source.folder / name).read_bytes()).digest())
    return digest.hexdigest()


def _check_target(output: Path, needed: int) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"--output: {output} isn't empty, and nothing is overwritten; remove it, or name another folder"
        )
    place = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"--output: {output} needs {size(needed)}, and {size(free)} are free there; name a folder on another disk"
        )


def _measure_as_trained(
    source: Source,
    base: Path,
    device: torch.device,
    tokenizer: Any,
    answers: Sequence[FormerAnswer],
    drift: dict[str, float | int],
) -> list[str]:
    """Adds the drift on the rounded weights of training to `drift`; returns what deserves a look."""
    try:
        model = load(source, base, device, tokenizer, "quantised")
        off, on = logps_off_and_on(model, answers)
    except Exception as error:  # of bitsandbytes, which not every machine has; what was merged is whole all the same
        return [
            f"The drift on {source.bits}-bit weights, as trained, couldn't be measured: {error}"
        ]
    drift["as_trained"] = float((on - off).sum()) / len(answers)
    if abs(drift["merged"] - drift["as_trained"]) < _MUCH or source.bits != 4:
        return []
    return [
        "Trained on 4-bit weights, the adapter drifts otherwise on the published ones. --rounded merges it into the weights "
        "that it was trained on"
    ]


def _save(model: Any, tokenizer: Any, base: Path, folder: Path) -> list[str]:
    """Write the model's folder; returns what deserves a look."""
    notes = []
    generation = base / "generation_config.json"
    settings = json.loads(generation.read_text("utf-8")) if generation.is_file() else {}
    ends = settings.get("eos_token_id", model.config.get_text_config().eos_token_id)
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if i is not None]
    if tokenizer.eos_token_id not in (None, *ends):
        settings["eos_token_id"] = [tokenizer.eos_token_id, *ends]
        notes.append(
            f"{tokenizer.eos_token!r}, which ends a turn in training, wasn't in the base's generation_config.json, and was added"
        )
    model.generation_config = (
        GenerationConfig()
    )  # a published one that is inconsistent can't be saved
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the merged model still names a quantisation in its config; report this")
    model.save_pretrained(str(folder))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if settings:
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    tokenizer.save_pretrained(str(folder))
    # converters of llama.cpp want SentencePiece's own file, which tokenizers don't save
    plain = base / "tokenizer.model"
    if plain.is_file() and not (folder / plain.name).exists():
        shutil.copyfile(plain, folder / plain.name)
    before, after = _names(base), _names(folder)
    if lost := sorted(before - after - {"lm_head.weight"}):
        notes.append(
            f"{len(lost)} tensors of the base are not in the merged model, such as {lost[0]}: look whether they are needed "
            "(parts for pictures, old buffers)"
        )
    return notes


def _names(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def _weights(source: Source, dtype: str, rounded: bool) -> str:
    if rounded:
        return f"{dtype}, the base rounded to 4 bits as in training and the adapter"
    if source.bits:
        return f"{dtype}, the base as published and an adapter that was trained on {source.bits}-bit weights"
    return f"{dtype}, the base as published and the adapter"


def _drift_facts(drift: dict[str, float | int]) -> list[tuple[str, str]]:
    text = (
        f"{drift['adapter']:+.2f} nats an answer with the adapter, {drift['merged']:+.2f} merged "
        f"({drift['prompts']} former answers)"
    )
    found = [("drift", text), ("kept", f"{drift['share']:.0%} of what the adapter changed")]
    if "as_trained" in drift:
        text = f"{drift['as_trained']:+.2f} nats an answer, with the adapter on the rounded weights of training"
        found.insert(1, ("as trained", text))
    return found
