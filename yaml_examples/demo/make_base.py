"""Fill the column `base` of the demo's data set: what the reference model itself answers, greedily.

    python make_base.py MODEL_DIRECTORY personal_styles.jsonl

The model is loaded as the demo trains it (NF4), since the reference is that model with its adapter
off. An answer that the token limit cuts off ends at its last whole sentence.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

MAX_NEW_TOKENS = 72
BATCH = 16


def load_nf4(model_dir: str):
    """The model as the demo's YAML loads it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=quantization, dtype=torch.float32
    )


def main(model_dir: str, path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = load_nf4(model_dir)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for row in batch
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        for row, ids in zip(batch, out[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if tokenizer.eos_token_id not in ids:
                end = max(text.rfind(mark) for mark in ".!?")
                text = text[: end + 1] if end > 0 else text
            row["base"] = text
        print(f"{start + len(batch)}/{len(rows)}: {batch[0]['base'][:70]!r}", flush=True)
    new = path.with_suffix(".tmp")
    new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(new, path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
