"""Does BAPO forget less? One user's taste on SmolLM2-135M-Instruct, by DPO, its remedies, and BAPO.

    python benchmarks/forgetting.py --json forgetting.json --plot forgetting      # at most 25 minutes, 2 cores
    python benchmarks/forgetting.py --quick --json quick.json                     # at most 6
    python benchmarks/forgetting.py --data FOLDER ...     # also dsp.jsonl (personas) and mmlu.jsonl (knowledge)

Every method trains a fresh LoRA adapter on the same pairs, in the same order, for the same steps, anchored to
what the model itself answered. Measured on prompts that are not in training, at several points of the run:

  accuracy, margin    held-out pairs of the persona: how often Δ_chosen > Δ_rejected, and by how much (nats)
  drift, agreement,   the model's own former answers to unrelated prompts; see bapo_plugin/scoring/retention.py
    kl
  knowledge           accuracy on easy three-choice questions (benchmarks/data), and on MMLU with --data, by
                      the likelihood of the answer per byte, before and after, the same questions
  probe               share of prompts at which the honest or harmless answer is more likely, per byte

Methods learn at different speed, so they are compared at matched held-out accuracy and at matched margin:
`matched` is where the drift curve of a run passes the level that both it and DPO reach (linear between points).
Runs that --json has are not trained again.
"""

import argparse
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from datasets import Dataset, disable_progress_bars
from forgetting_data import (
    Pair,
    Question,
    easy_questions,
    mmlu,
    pairs,
    probe,
    unrelated_prompts,
)
from forgetting_methods import DEFAULT, METHODS
from forgetting_results import add_matched, plot, table, verdict
from peft import LoraConfig
from peft.helpers import rescale_adapter_scale
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, logging

from bapo_plugin import BAPOConfig, BAPOTrainer
from bapo_plugin.answers.prompts import Asker, FormerAnswer, read_prompts
from bapo_plugin.scoring.collator import SharedPrefixCollator, split_by_tokens
from bapo_plugin.scoring.forward import ResponseForward, response_logits
from bapo_plugin.scoring.reference import COLUMN, TOKENS_COLUMN, reference_mode
from bapo_plugin.scoring.retention import mean_and_error, measure
from bapo_plugin.scoring.shared_prefix import install, uninstall

ROOT = Path(__file__).parents[1]
# no system message: it would be a third of the tokens
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BETA = 0.1
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Bench:
    """The model, and what is measured with it; rows are token ids, as the trainer takes them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.tokenizer.chat_template = TEMPLATE
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        self.pad = self.tokenizer.pad_token_id
        self.forward = ResponseForward(log=lambda text: None, base_tokens=True)
        prompts = unrelated_prompts()
        self.unrelated = self.answers(prompts[: args.unrelated], "Unrelated prompts")
        self._kept: dict[str, list[FormerAnswer]] = {}
        self._to_keep = {
            "unrelated": prompts[args.unrelated :][: args.kept],
            "general": [chat[0]["content"] for chat in read_prompts("general")],
        }
        self._reference_logits: dict[int, torch.Tensor] = {}

    def kept(self, name: str) -> list[FormerAnswer]:
        if name not in self._kept:
            self._kept[name] = self.answers(self._to_keep[name], f"Prompts to keep ({name})")
        return self._kept[name]

    def answers(self, prompts: Sequence[str], name: str) -> list[FormerAnswer]:
        with tqdm(total=len(prompts), desc=f"Former answers: {name}", unit="prompt") as bar:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            asker = Asker(self.model, self.tokenizer)
            return asker.ask(chats, self.args.base_tokens, bar.update)

    def prompt_ids(self, prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text)["input_ids"]

    def response_ids(self, text: str, ended: bool = True) -> list[int]:
        return self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id] * ended

    def rows(self, found: Sequence[Pair], base: Sequence[FormerAnswer] | None) -> list[dict]:
        """Rows with log π_ref, also of each token of the base response; without `base`, one token stands for it."""
        ended = not self.args.words
        rows = [
            {
                "prompt_ids": self.prompt_ids(pair.prompt),
                "chosen_ids": self.response_ids(pair.chosen, ended),
                "rejected_ids": self.response_ids(pair.rejected, ended),
                "base_ids": list(base[i].answer_ids) if base else [self.tokenizer.eos_token_id],
            }
            for i, pair in enumerate(found)
        ]
        found, tokens = self.score_tokens(self.model, rows)
        return [
            row | {COLUMN: found[i].tolist(), TOKENS_COLUMN: tokens[i]}
            for i, row in enumerate(rows)
        ]

    def score(self, model, rows: list[dict]) -> torch.Tensor:
        """Log-probs of each row's three responses, nats, [n, 3]; the prompt is computed once."""
        return self.score_tokens(model, rows)[0]

    @torch.no_grad()
    def score_tokens(self, model, rows: list[dict]) -> tuple[torch.Tensor, list[list[float]]]:
        """The same, and of each token of the base responses."""
        install(model)
        model.eval()
        collator, found = SharedPrefixCollator(pad_token_id=self.pad), torch.empty(len(rows), 3)
        tokens: list[list[float]] = [[] for _ in rows]
        # packs take rows in an order of their own
        for part in split_by_tokens(rows, 2048):
            out = self.forward(model, model, collator.pack([rows[i] for i in part]))
            found[part] = out.logps.view(3, len(part)).T
            lengths = [len(rows[i]["base_ids"]) for i in part]
            for i, logps in zip(part, out.base_tokens.split(lengths), strict=True):
                tokens[i] = logps.tolist()
        return found, tokens

    def questions(self, model, questions: Sequence[Question]) -> list[bool]:
        """Whether the right choice is the likeliest, by log-prob per byte."""
        rows, owners = [], []
        for i, question in enumerate(questions):
            # without an end of turn, which weighs most on short choices
            choices = [self.response_ids(choice, ended=False) for choice in question.choices]
            for start in range(0, len(choices), 3):
                three = choices[start : start + 3]
                three += [[self.tokenizer.eos_token_id]] * (3 - len(three))
                names = ("chosen_ids", "rejected_ids", "base_ids")
                rows.append(
                    {"prompt_ids": self.prompt_ids(question.prompt)}
                    | dict(zip(names, three, strict=True))
                )
                owners.append((i, start))
        best: list[list[float]] = [[-math.inf] * len(q.choices) for q in questions]
        for (i, start), logps in zip(owners, self.score(model, rows).tolist(), strict=True):
            for k in range(start, min(start + 3, len(questions[i].choices))):
                best[i][k] = logps[k - start] / len(questions[i].choices[k].encode())
        return [scores[0] > max(scores[1:]) for scores in best]

    def retention(self, model):
        """Against the model without adapter, whose logits are kept from the first time on."""

        def reference(batch):
            key = int(batch["input_ids"].sum())
            if key not in self._reference_logits:
                with reference_mode(model):
                    self._reference_logits[key] = response_logits(model, batch)
            return self._reference_logits[key]

        model.eval()
        return measure(
            self.unrelated,
            reference,
            {"policy": lambda batch: response_logits(model, batch)},
            pad_token_id=self.pad,
            vocab_size=model.config.vocab_size,
            device=model.device,
        )["policy"]


class Curve(TrainerCallback):
    """Measures accuracy, margin and drift at some steps."""

    def __init__(self, bench: Bench, held_out: list[dict], every: int, scale: float):
        self.bench, self.held_out, self.every, self.scale = bench, held_out, every, scale
        self.points = [{"step": 0, "accuracy": 0.5, "margin": 0.0, "drift": 0.0, "kl": 0.0}]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        reference = torch.tensor([row[COLUMN] for row in self.held_out])
        with rescale_adapter_scale(model, self.scale):
            drift = self.bench.score(model, self.held_out) - reference
            self.retention = self.bench.retention(model)
        margins = (drift[:, 0] - drift[:, 1]).double()
        model.train()
        self.points.append(
            {
                "step": state.global_step,
                "accuracy": float((margins > 0).double().mean()),
                "margin": float(margins.mean()),
                "drift": float(self.retention.drift.mean()),
                "kl": float(self.retention.kl.mean()),
            }
        )


def run(bench: Bench, method: str, seed: int, train: list[dict], held_out: list[dict]) -> dict:
    """Train one adapter; what it learned and what it forgot."""
    args = bench.args
    settings = dict(METHODS[method])
    beta, on = settings.pop("beta", BETA), settings.pop("on", "base")
    kept, name = None, settings.pop("kept", "unrelated")
    if "keep" in settings:
        settings["keep"] = {"prompts": "general", "weight": settings["keep"], "per_step": 4}
        kept = Dataset.from_list(
            [{"prompt_ids": a.prompt_ids, "base_ids": a.answer_ids} for a in bench.kept(name)]
        )
    if on == "chosen":
        train = [
            row | {"base_ids": row["chosen_ids"], COLUMN: [*row[COLUMN][:2], row[COLUMN][0]]}
            for row in train
        ]
    train = random.Random(seed).sample(train, len(train))
    scale = settings.pop("scale", 1.0)
    curve = Curve(bench, held_out, args.eval_steps, scale)
    layers = bench.model.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        trainer = BAPOTrainer(
            bench.model,
            args=AxolotlDPOConfig(
                output_dir=folder,
                per_device_train_batch_size=args.batch_size,
                max_steps=args.steps,
                learning_rate=args.lr,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=2,
                beta=beta,
                seed=seed,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                remove_unused_columns=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(train),
            processing_class=bench.tokenizer,
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules=LINEAR,
                # the upper half: gradients need not go further down, which is a third of the time
                layers_to_transform=list(range(layers // 2, layers)),
                task_type="CAUSAL_LM",
            ),
            bapo=BAPOConfig(shared_prefix="require", **settings),
            keep_dataset=kept,
        )
        trainer.add_callback(curve)
        trainer.pop_callback(type(trainer.record))
        trainer.train()
    model = trainer.model
    training = [entry for entry in trainer.state.log_history if "drift/base" in entry]
    if any(abs(training[0][f"drift/{name}"]) > 1e-2 for name in ("chosen", "rejected", "base")):
        raise RuntimeError(f"the reference is not the model before training: {training[0]}")
    found = {
        "method": method,
        "anchor_loss": trainer.bapo.anchor_loss if method.startswith("BAPO") else None,
        "anchor_weight": settings["anchor_weight"] if method.startswith("BAPO") else 0,
        "seed": seed,
        "preference_accuracy": curve.points[-1]["accuracy"],
        "margin": curve.points[-1]["margin"],
        **{
            {"drift": "drift_nats"}.get(name, name): part["value"]
            for name, part in curve.retention.summary().items()
        },
        "drift_se_over_prompts": curve.retention.summary()["drift"]["se"],
        "curve": curve.points,
        "training": [
            {k: entry[k] for k in ("step", "drift/chosen", "drift/rejected", "drift/base")}
            for entry in training
        ],
    }
    return found | {"_model": model, "_scale": scale}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / ".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--data", type=Path, help="folder with dsp.jsonl and mmlu.jsonl")
    parser.add_argument("--quick", action="store_true", help="one persona, DPO and BAPO only")
    parser.add_argument("--personas", nargs="+", help="the first gets all methods")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="of the first persona")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--eval-steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pairs", type=int, default=40, help="in training")
    parser.add_argument("--held-out", type=int, default=16, help="pairs")
    parser.add_argument("--unrelated", type=int, default=24, help="prompts")
    parser.add_argument("--kept", type=int, default=24, help="prompts of `bapo.keep`, besides")
    parser.add_argument("--base-tokens", type=int, default=24, help="most of a former answer")
    parser.add_argument("--mmlu", type=int, default=40, help="questions")
    parser.add_argument("--json", type=Path, help="write the results here; runs in it are kept")
    parser.add_argument("--plot", help="write FILE-pareto.png and FILE-figure5.png")
    args = parser.parse_args()
    if args.steps % args.eval_steps:
        parser.error("--steps must be a multiple of --eval-steps")
    # DSP's answers are long: cut, and so without an end of turn
    args.words_of = {"entertainment": 24, "business": 24}
    has_dsp = args.data is not None and (args.data / "dsp.jsonl").is_file()
    personas = args.personas or (
        ["child"]
        if args.quick
        else ["entertainment", "child", "unfriendly"]
        if has_dsp
        else ["unfriendly", "child", "concise"]
    )
    methods = args.methods or (["DPO", DEFAULT] if args.quick else list(METHODS))
    disable_progress_bars()
    logging.set_verbosity_error()

    rows = json.loads(args.json.read_text("utf-8")) if args.json and args.json.exists() else []
    started = time.monotonic()
    tasks = plan(personas, methods, args.seeds)
    settings = {
        name: getattr(args, name)
        for name in (
            *("steps", "eval_steps", "batch_size", "lr", "pairs", "held_out", "unrelated"),
            *("base_tokens", "mmlu", "kept"),
        )
    } | {"has_mmlu": args.data is not None and (args.data / "mmlu.jsonl").is_file()}
    # a run recorded before a setting was there did without it
    rows = [row for row in rows if row["settings"].items() <= settings.items()]
    done = {(row["persona"], row["method"], row["seed"]) for row in rows}
    todo = [task for task in tasks if task not in done]
    if todo:
        bench = Bench(args)
        # the same questions before and after; the slow sets for the main two methods only, once
        easy, slow = {"easy": easy_questions()}, {"probe": probe()}
        if found := mmlu(args.data, args.mmlu):
            slow["mmlu"] = found
        before = {
            name: bench.questions(bench.model, questions)
            for name, questions in (easy | slow).items()
        }
        data: dict[str, tuple[list[dict], list[dict]]] = {}
        with tqdm(todo, desc="Runs", unit="run") as bar:
            for persona, method, seed in bar:
                bar.set_postfix_str(f"{persona}, {method}, seed {seed}")
                if persona not in data:
                    args.words = args.words_of.get(persona, 0)
                    data[persona] = prepare(bench, persona)
                row = {"persona": persona} | run(bench, method, seed, *data[persona])
                model, scale = row.pop("_model"), row.pop("_scale")
                full = persona == personas[0] and method in ("DPO", DEFAULT) and seed == 0
                sets = easy | slow if full else easy
                for name, questions in sets.items():
                    with rescale_adapter_scale(model, scale):
                        after = bench.questions(model, questions)
                    key = "knowledge" if name == "easy" else name
                    row[f"{key}_before"] = sum(before[name]) / len(before[name])
                    row[f"{key}_after"] = sum(after) / len(after)
                    row[f"{key}_difference_se"] = paired(before[name], after)["se"]
                    row[f"{key}_questions"] = len(questions)
                uninstall(model)
                bench.model = model.unload()
                row |= {"settings": settings, "versions": versions()}
                rows.append(row)
                write_json(args.json, rows)
    rows = [row for task in tasks for row in rows if (row["persona"], row["method"], row["seed"]) == task]  # fmt: skip
    add_matched(rows)
    write_json(args.json, rows)
    print(table(rows))
    print(verdict(rows, personas[0]))
    print(f"{len(todo)} runs trained in {time.monotonic() - started:.0f} s")
    if args.plot:
        plot(rows, personas, args.plot)


def plan(personas: list[str], methods: list[str], seeds: int) -> list[tuple[str, str, int]]:
    """(persona, method, seed): all methods on the first persona, the main two on the others, with a seed less
    for each further persona."""
    tasks = [(personas[0], method, seed) for seed in range(seeds) for method in methods]
    for i, persona in enumerate(personas[1:], start=1):
        for seed in range(max(1, seeds - i)):
            tasks += [(persona, m, seed) for m in ("DPO", DEFAULT) if m in methods]
    return tasks


def prepare(bench: Bench, persona: str) -> tuple[list[dict], list[dict]]:
    """Rows for training, with base responses of the model, and held-out pairs."""
    args = bench.args
    found = pairs(persona, args.data, args.pairs + args.held_out, args.words)
    train, held_out = found[: args.pairs], found[args.pairs :]
    base = bench.answers([pair.prompt for pair in train], persona)
    return bench.rows(train, base), bench.rows(held_out, None)


def paired(before: list[bool], after: list[bool]) -> dict[str, float]:
    """Difference of two accuracies on the same questions, with its standard error."""
    return mean_and_error([float(a) - float(b) for b, a in zip(before, after, strict=True)])


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "peft", "axolotl")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {name: version(name) for name in names} | {"machine": machine}


def write_json(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
        os.replace(partial, path)


if __name__ == "__main__":
    main()
