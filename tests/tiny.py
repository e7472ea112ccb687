"""Tiny random models and a tokenizer, made on the spot: no hub, no download, seconds."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = """
the a an in on of to is are was it that this what how why when where who tell me about please give name three
sea ship captain gold rain sky blue water boil egg bread butter tree leaf green sun moon star night day north
answer question short long simple plain formal arr matey ye be aye friend thank you hello world one two four
""".split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Llama 3: the template writes BOS itself and the tokenizer adds another
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|pad|>",
    ],
}


def make_tokenizer(style: str = "chatml") -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens, as GPT-2's and Llama 3's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL[style],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    if style == "llama3":
        bos = SPECIAL[style][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=bos,
            eos_token="<|eot_id|>",
            pad_token="<|pad|>",
            chat_template=LLAMA3,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


# what makes each family small; sizes not named here are the same for all
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_model(family: str = "llama", vocab_size: int = 500, seed: int = 0, **overrides):
    """A random causal LM in fp32 whose distribution is not flat."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, **(_COMMON | {"vocab_size": vocab_size} | FAMILIES[family] | overrides)
    )
    config.eos_token_id, config.bos_token_id = 2, None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # initial weights are so small that all tokens are equally likely
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0)
            elif "bias" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def save_model(path: Path, family: str = "llama", style: str = "chatml", **overrides) -> Path:
    tokenizer = make_tokenizer(style)
    make_model(family, vocab_size=len(tokenizer), **overrides).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_rows(n: int, seed: int = 0, base: str = "base") -> list[dict[str, str]]:
    """Preference rows of plain text: prompt, chosen, rejected, base (the column's name may be another), of various lengths."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        picks = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picks)

    return [
        {"prompt": text(3, 12), "chosen": text(2, 9), "rejected": text(2, 9), base: text(2, 9)}
        for _ in range(n)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
