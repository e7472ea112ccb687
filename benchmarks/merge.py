"""What merging leaves of an adapter: of its margin on held-out pairs and of its drift on unrelated prompts.

    python benchmarks/merge.py outputs/smollm2-bapo/config.yml [--scale 1 0.3 0.1]

Published weights lie on bfloat16's grid, so a change of less than half a step is rounded away. The adapter is merged exactly, in
fp32, at several strengths; then the weights are rounded to a dtype and all is scored in fp32 again. Prints a Markdown row a strength
and dtype. Where the run trained on 4-bit weights, three merges of it are scored against the model as trained: into the base as
published, into the weights that training saw (`bapo export --rounded`), and axolotl's `merge-lora`.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bapo_plugin.answers.prompts import FormerAnswer
from bapo_plugin.commands.export import kept
from bapo_plugin.commands.export.merged import merge
from bapo_plugin.commands.export.source import read_source
from bapo_plugin.models import WHOLE
from bapo_plugin.prepare import prepare_rows

DTYPES = (torch.bfloat16, torch.float16)


def held_out(config: Path, tokenizer) -> list[FormerAnswer]:
    """Chosen responses of the held-out pairs, then rejected ones."""
    from axolotl.cli.config import load_cfg

    _, rows = prepare_rows(DictDefault(load_cfg(str(config), **WHOLE)), tokenizer)
    return [
        FormerAnswer("", row["prompt_ids"], row[f"{kind}_ids"])
        for kind in ("chosen", "rejected")
        for row in rows
    ]


def with_adapter(base: str, folder: Path, scale: float = 1.0, rounded: bool = False) -> PeftModel:
    """In fp32; `rounded`: over the 4-bit weights that training saw."""
    more = {}
    if rounded:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map={"": "cpu"}, **more
    )
    model = PeftModel.from_pretrained(
        model.dequantize(torch.float32) if rounded else model, folder
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(scale)
    return model


def share(before: torch.Tensor, adapter: torch.Tensor, merged: torch.Tensor) -> float:
    change = adapter - before
    return float((merged - before) @ change / (change @ change))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML of a finished run with held-out rows")
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0, 0.3, 0.1])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    source = read_source(args.config)
    base = str(source.base_folder())
    tokenizer = AutoTokenizer.from_pretrained(str(source.tokenizer_folder or base))
    pairs = held_out(args.config, tokenizer)
    count = len(pairs) // 2
    split = sum(len(answer.answer_ids) for answer in pairs[:count])

    def margin(change: torch.Tensor) -> float:
        return float(change[:split].sum() - change[split:].sum()) / count

    answers = None
    print("| strength | margin, nats | drift, nats | dtype | margin left | of the changes left |")
    print("| --- | --- | --- | --- | --- | --- |")
    for scale in args.scale:
        model = with_adapter(base, source.folder, scale)
        if answers is None:
            with model.disable_adapter():
                answers = kept.former_answers(model, tokenizer)
        both, size = answers + pairs, sum(len(answer.answer_ids) for answer in answers)
        before, on = kept.logps_off_and_on(model, both)
        model = model.merge_and_unload(safe_merge=True)
        exact = {name: weight.clone() for name, weight in model.state_dict().items()}
        for dtype in DTYPES:
            model.load_state_dict({k: v.to(dtype).float() for k, v in exact.items()})
            merged = kept.token_logps(model, both)
            left = margin((merged - before)[size:]) / margin((on - before)[size:])
            print(
                f"| {scale:g} | {margin((on - before)[size:]):+.1f} | {float((on - before)[:size].sum()) / len(answers):+.2f} "
                f"| {str(dtype).removeprefix('torch.')} | {left:.0%} | {share(before, on, merged):.0%} |",
                flush=True,
            )
        del model, exact
    if source.bits != 4:
        return

    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    trained = with_adapter(base, source.folder, rounded=True)
    before, on = kept.logps_off_and_on(trained, both)
    del trained
    print("\n| merge | margin, nats | drift, nats | from the trained model, nats a token |")
    print("| --- | --- | --- | --- |")

    def row(name: str, logps: torch.Tensor) -> None:
        change = logps - before
        print(
            f"| {name} | {margin(change[size:]):+.1f} | {float(change[:size].sum()) / len(answers):+.2f} "
            f"| {float((logps - on).abs().mean()):.3f} |",
            flush=True,
        )

    row("as trained", on)
    with tempfile.TemporaryDirectory() as folder:
        for name, rounded in (("bapo export", False), ("bapo export --rounded", True)):
            place = Path(folder) / name.replace(" ", "-")
            merge(source, place, rounded=rounded, check=False)
            row(name, kept.token_logps(plain(place), both))
        place = Path(folder) / "axolotl"
        merge_lora_sharded_efficient(
            base, str(source.folder), str(place), device="cpu", simulate_nf4=True
        )
        row("axolotl merge-lora", kept.token_logps(plain(place), both))


def plain(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
