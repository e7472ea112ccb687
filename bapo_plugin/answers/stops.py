"""What ends an answer: one list for base responses, retention and evaluation."""

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig, PretrainedConfig


def named_stops(tokenizer: Any, model_name: str | None, revision: str | None = None) -> set[int]:
    """Ids of tokens that tokenizer, generation_config.json and config.json say end an answer.

    Args:
        tokenizer: of the model.
        model_name: folder or name of the model; None: only the tokenizer is asked.
        revision: of a model on the hub.
    """
    found: set[Any] = {tokenizer.eos_token_id}
    if model_name:
        try:
            found |= _as_set(GenerationConfig.from_pretrained(model_name, revision=revision))
        except OSError:
            pass  # a model without such a file
        try:
            config, _ = PretrainedConfig.get_config_dict(model_name, revision=revision)
            for part in (config, config.get("text_config") or {}):
                found |= _ids(part.get("eos_token_id"))
        except OSError:
            pass
    return found - {None}


def stops_of(tokenizer: Any, model: Any) -> set[int]:
    """The same for a loaded model, which may have no folder."""
    found = named_stops(tokenizer, getattr(model.config, "name_or_path", None) or None)
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        found |= _as_set(config)
    return found - {None}


def all_stops(
    named: Iterable[int], end_of_turn: Iterable[int | None], own: Iterable[int] = ()
) -> list[int]:
    """Every token that ends an answer.

    Args:
        named: of `named_stops`.
        end_of_turn: of the chat template.
        own: the user's (`bapo.anchors.stop`).

    Raises:
        ValueError: nothing ends an answer.
    """
    found = {*named, *end_of_turn, *own} - {None}
    if not found:
        raise ValueError(
            "nothing ends an answer: the tokenizer has no EOS token; set special_tokens.eos_token or "
            "bapo.anchors.stop"
        )
    return sorted(found)


def own_stops(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """Ids of the tokens in `bapo.anchors.stop`.

    Raises:
        ValueError: a text is not a single token.
    """
    found = set()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"bapo.anchors.stop: {text!r} is {len(ids)} tokens for this tokenizer; name single tokens, such as "
                "<|im_end|>"
            )
        found |= set(ids)
    return found


def _as_set(config: Any) -> set[Any]:
    return _ids(getattr(config, "eos_token_id", None))


def _ids(value: Any) -> set[Any]:
    return set(value) if isinstance(value, (list, tuple)) else {value}
