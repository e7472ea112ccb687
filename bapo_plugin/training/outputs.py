"""What a run leaves in output_dir: the adapter and nothing else of the model, and a card that says what it is."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate.utils import is_peft_model
from axolotl.utils.logging import get_logger
from huggingface_hub import ModelCard, ModelCardData
from peft.tuners.tuners_utils import BaseTunerLayer

from bapo_plugin.files import write_whole, writing
from bapo_plugin.runs import how_far, without_secrets

if TYPE_CHECKING:
    from bapo_plugin.training.trainer import BAPOTrainer

LOG = get_logger("axolotl." + __name__)

ELSEWHERE = "name another output_dir"
_MEASURED = (
    ("rewards/accuracies", "pairs ranked right", "{:.0%}"),
    ("drift/chosen", "drift of the chosen response, nats", "{:+.2f}"),
    ("drift/rejected", "drift of the rejected response, nats", "{:+.2f}"),
    ("drift/base", "drift of the base response (the former answer), nats", "{:+.2f}"),
)
_RETAINED = (
    ("retention/drift", "drift of former answers, nats", "{:+.2f}"),
    ("retention/agreement", "same likeliest token as before", "{:.0%}"),
    ("retention/kl", "KL(before ‖ after), nats a token", "{:.3f}"),
)


def leave_base_model_out(trainer: "BAPOTrainer") -> None:
    """Let `save_pretrained` of the model below the adapter save the adapter.

    In a preference run axolotl holds that model, not PEFT's: at the end, and when it is interrupted, it would store
    all of its weights beside the adapter, quantised ones in a form that nothing reads.
    """
    model = trainer.model
    if not is_peft_model(model):
        return

    _save_whole(model)
    base = model.get_base_model()
    original = base.save_pretrained

    def save_pretrained(save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            original(save_directory, *args, **kwargs)  # merged: a model of its own again
            return
        model.save_pretrained(save_directory, *args, **kwargs)
        if trainer.record.is_under_way and trainer.is_world_process_zero():
            step, last = trainer.state.global_step, trainer.state.max_steps
            LOG.warning(
                f"Interrupted at step {step} of {last}. {save_directory} has the adapter as it is now; with "
                "`auto_resume_from_checkpoints: true` in the YAML the same command goes on at the last checkpoint"
            )

    base.save_pretrained = save_pretrained


def _save_whole(model: Any) -> None:
    """Let an adapter be saved under another name first: a full disk leaves what was there before."""
    original = model.save_pretrained

    def save_pretrained(save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        folder = Path(save_directory)
        partial = folder / f".saving.{os.getpid()}"
        with writing(folder, ELSEWHERE):
            try:
                partial.mkdir(parents=True, exist_ok=True)
                if (folder / "README.md").is_file():  # PEFT goes on with it
                    shutil.copy(folder / "README.md", partial)
                original(partial, *args, **kwargs)
                for path in sorted(p for p in partial.rglob("*") if p.is_file()):
                    target = folder / path.relative_to(partial)
                    target.parent.mkdir(exist_ok=True)
                    os.replace(path, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    model.save_pretrained = save_pretrained


def tell_what_is_overwritten(output_dir: str | os.PathLike, goes_on: bool) -> None:
    """Say before training that a trained adapter lies where this run will save.

    Args:
        output_dir: of the run.
        goes_on: whether the run resumes what lies there.
    """
    folder = Path(output_dir)
    if not goes_on and (folder / "adapter_model.safetensors").is_file():
        LOG.warning(
            f"output_dir: {folder} has an adapter whose training {how_far(folder)}; this run will overwrite it. Another "
            "output_dir keeps both"
        )


def write_card(trainer: "BAPOTrainer", name: str | None) -> None:
    """README.md in output_dir: base model, what was measured last, how to load it, and the YAML."""
    base = str(trainer.model.config.name_or_path)
    folder = Path(trainer.args.output_dir)
    name = Path(name or folder).name  # axolotl gives the path
    on_hub = bool(base) and not Path(base).exists()
    adapter = is_peft_model(trainer.model)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base if on_hub else None,  # a path of this machine says nothing elsewhere
        tags=[*trainer.tag_names, "trl", "dpo"],
    )
    # through JSON: what is left are plain values, which YAML can write
    config = json.loads(json.dumps(without_secrets(trainer.record.config), default=str))
    of = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base).name}`"
    lines = [
        f"# {name}",
        "",
        f"{'An adapter of' if adapter else 'Trained from'} {of if base else 'a model without a name'}, by "
        "[Base-Anchored Preference Optimization](https://huggingface.co/papers/2407.00693) (BAPO): it learned to prefer the "
        "chosen responses of its data, held to what the model itself answered before.",
        "",
        *_measured(trainer),
        "## Use",
        "",
        "```python",
        *_loading(base if on_hub else Path(base).name, adapter, name),
        "```",
        "",
        "## How it was trained",
        "",
        "<details><summary>Configuration for axolotl</summary>",
        "",
        "```yaml",
        yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "</details>",
        "",
        "## Citation",
        "",
        "```bibtex",
        trainer._paper["citation"].rstrip(),
        "```",
        "",
    ]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)
    card = ModelCard(content, ignore_metadata_errors=True)
    write_whole(folder / "README.md", str(card), ELSEWHERE)


def _measured(trainer: "BAPOTrainer") -> list[str]:
    """A table of the last evaluation and of retention, where there were any."""
    log = trainer.state.log_history
    # of several named sets the first
    ends = [k for e in log for k in e if k.startswith("eval_") and k.endswith("drift/base")]
    prefix = ends[0].removesuffix("drift/base") if ends else "eval_"
    held_out: dict[str, Any] = next((e for e in reversed(log) if f"{prefix}drift/base" in e), {})
    kept: dict[str, Any] = next((e for e in reversed(log) if "retention/drift" in e), {})
    rows = [
        (label, form.format(held_out[f"{prefix}{key}"]))
        for key, label, form in _MEASURED
        if f"{prefix}{key}" in held_out
    ]
    rows += [
        (f"{label} (`bapo.retention`)", form.format(kept[key]))
        for key, label, form in _RETAINED
        if key in kept
    ]
    if not rows:
        return []
    step = (held_out or kept).get("step")
    return [
        f"Measured at step {step}, on held-out rows where nothing else is said; a drift of 0 is the model before training.",
        "",
        "| | |",
        "| --- | ---: |",
        *(f"| {label} | {value} |" for label, value in rows),
        "",
    ]


def _loading(base: str, adapter: bool, name: str) -> list[str]:
    if not adapter:
        return [
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(model, "{name}")',
    ]
