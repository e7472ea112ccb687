"""The demo behind `make demo`: train, then look at what changed.

Trains yaml_examples/smollm2-qlora-cpu.yml with `axolotl train`, which makes the base responses first (an
interrupted run goes on where it stopped, a finished one is reused), then prints answers before and after and how far the
log-probabilities drifted. The answer to the unrelated prompt should stay as it was.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "yaml_examples/smollm2-qlora-cpu.yml"
PROMPTS = [
    ("like the data", "How do I make a good cup of tea?"),
    ("like the data", "Why do leaves fall in autumn?"),
    ("unrelated", "What is 12 plus 30?"),
]


def main() -> None:
    os.chdir(ROOT)
    import yaml

    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    output = Path(config["output_dir"])
    train(config, output)
    compare(config, output)


def train(config: dict, output: Path) -> None:
    key = hashlib.sha256(CONFIG.read_bytes() + Path(config["datasets"][0]["path"]).read_bytes())
    mark = output / "demo.key"
    if not mark.exists() or mark.read_text() != key.hexdigest():
        shutil.rmtree(output, ignore_errors=True)  # another configuration: nothing to go on with
        output.mkdir(parents=True)
        mark.write_text(key.hexdigest())
    if (output / "DONE").exists():
        print(f"{output} is trained already (delete it to train again)")
        return
    command = ["axolotl", "train", str(CONFIG.relative_to(ROOT)), "--launcher", "python"]
    print("$", *command, flush=True)
    if subprocess.run(command).returncode:
        sys.exit("Training stopped; `make demo` goes on at the last checkpoint.")
    (output / "DONE").touch()


def compare(config: dict, output: Path) -> None:
    import torch
    from peft import PeftModel
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoTokenizer

    print("Answering with the adapter off and on ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = PeftModel.from_pretrained(load_nf4(config["base_model"]), output).eval()

    @torch.no_grad()
    def answer(ids: torch.Tensor, repetition_penalty: float) -> torch.Tensor:
        settings = {"max_new_tokens": 60, "do_sample": False}
        out = model.generate(input_ids=ids, repetition_penalty=repetition_penalty, **settings)
        return out[0, ids.shape[1] :]

    @torch.no_grad()
    def logp(ids: torch.Tensor, response: torch.Tensor) -> float:
        logits = model(torch.cat([ids[0], response])[None]).logits[0, ids.shape[1] - 1 : -1]
        return torch.log_softmax(logits.float(), -1).gather(1, response[:, None]).sum().item()

    console = Console(width=min(110, shutil.get_terminal_size((100, 20)).columns))
    answers = Table(title="Answers before and after", show_lines=True)
    for name in ("prompt", "before", "after"):
        answers.add_column(name, ratio=1 if name == "prompt" else 2)
    drift = Table(title="Drift of log-probabilities, nats a response")
    drift.add_column("what")
    drift.add_column("drift", justify="right")
    for name, before, after in held_out_drift(output):
        drift.add_row(f"held-out {name} responses", f"{after - before:+.1f}")
    for kind, prompt in PROMPTS:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(chat, return_tensors="pt")["input_ids"]
        # a model this small repeats itself: to be read, its answers get a penalty for that; the drift
        # is measured on what it answered greedily, as the base responses were made
        with model.disable_adapter():
            before = answer(ids, 1.1)
            former = answer(ids, 1.0)
            reference = logp(ids, former)
        after = answer(ids, 1.1)
        answers.add_row(
            f"{prompt}\n({kind})",
            *(tokenizer.decode(a, skip_special_tokens=True).strip() for a in (before, after)),
        )
        drift.add_row(f"former answer to: {prompt}", f"{logp(ids, former) - reference:+.1f}")
    console.print(answers)
    console.print(drift)
    persona, other = (config["datasets"][0][f"field_{c}"] for c in ("chosen", "rejected"))
    print(
        "A drift of 0 means: as likely as before training. Far below 0 on former answers is forgetting.\n"
        f"Learned to prefer `{persona}` to `{other}`. Other styles: edit field_chosen and field_rejected "
        f"in {CONFIG.relative_to(ROOT)}.\nThe adapter is in {output}; try it with: "
        f"axolotl inference {CONFIG.relative_to(ROOT)} --lora-model-dir {output}\n"
        f"A page about the run: bapo report {output} -o outputs/report.html"
    )


def load_nf4(model_dir: str):
    """The model as the YAML loads it: NF4, computing in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=quantization, dtype=torch.float32
    )


def held_out_drift(output: Path):
    """(response, before, after) in nats from the evaluations that the training logged."""
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    log = json.loads(states[-1].read_text("utf-8"))["log_history"]
    evaluations = [entry for entry in log if "eval_drift/base" in entry]
    for name in ("chosen", "rejected", "base"):
        yield name, evaluations[0][f"eval_drift/{name}"], evaluations[-1][f"eval_drift/{name}"]


if __name__ == "__main__":
    main()
