"""Folders that runs have written: what they hold, and how far training got. Light: nothing heavy is imported."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORD = "bapo_run.json"
STATE = "trainer_state.json"
_HIDDEN = "(not shown)"
# tokens of text have such names too (eos_token), so that those of accounts are named
_SECRET = re.compile(
    r"(api_?key|(access|private|secret)_?key(_id)?|secret|passw(or)?d|credentials?|webhook_url|^token"
    r"|(hub|hf|auth|access|api|bearer|bot|secret|session|wandb)_?token)$",
    re.IGNORECASE,
)
# in any text: names and passwords in addresses, signed addresses, tokens that show what they are
_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_SIGNED = re.compile(
    r"(?<=[?&])((?:access_|auth_)?token|(?:api_?)?key|sig|signature|secret|password|AWSAccessKeyId|X-Amz-[\w-]+)=[^&#\s'\"]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsu]_[A-Za-z0-9]{16,}|glpat-[\w-]{16,}|xox[abp]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_POINTER = b"version https://git-lfs"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one
# keys of a configuration that may name files
_FILES = (
    *("base_model", "base_model_config", "tokenizer_config", "lora_model_dir"),
    *("chat_template_jinja", "dataset_prepared_path"),
)

# what must be the same for adapters of one loaded model; a test holds it to what `models` knows of loading
SAME = {
    "the model": (
        *("base_model", "base_model_config", "revision_of_model", "type_of_model"),
        *("overrides_of_model_config", "overrides_of_model_kwargs", "resize_token_embeddings_to_32x"),
        *("attn_implementation", "experts_implementation", "cls_model_config", "reinit_weights"),
        *("scaling_softmax", "scaling_softmax_factor", "scaling_softmax_bias", "fp32_norms"),
        *("shrink_embeddings", "mean_resizing_embeddings"),
    ),
    "the adapter it starts from": ("lora_model_dir", "bapo.reference"),
    "the kind of adapter": ("adapter",),
    "the tokenizer": (
        *("tokenizer_config", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy"),
        *("special_tokens", "tokens", "added_tokens_overrides"),
    ),
    "the chat template": ("chat_template", "chat_template_jinja", "chat_template_kwargs"),
    "quantisation or precision": (
        *("load_in_4bit", "load_in_8bit", "gptq", "bnb_config_kwargs", "torch_dtype"),
        *("model_quantization_config", "model_quantization_config_kwargs"),
        *("quantize_moe_experts", "qat", "fp8", "use_onebitllms"),
        *("bf16", "fp16", "bfloat16", "float16"),
    ),
}  # fmt: skip
# a tokenizer keeps its own template where none is named
_DEFAULTS = {"bapo.reference": "start", "chat_template": "tokenizer_default"}


def has_adapter(folder: Path) -> bool:
    """Whether an adapter's weights lie here; axolotl writes its settings before training."""
    return (folder / _SETTINGS).is_file() and (folder / _WEIGHTS).is_file()


def weights_digest(folder: Path) -> str | None:
    """Of the adapter's weights that lie here; None where there are none."""
    path = folder / _WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def check_adapter(folder: Path) -> None:
    """
    Raises:
        ValueError: the folder has no trained adapter, says how far training got; or one that isn't safetensors, or is damaged.
    """
    if has_adapter(folder):
        adapter_settings(folder)
        check_whole(folder / _WEIGHTS)
        return
    refuse_pickled(folder)
    if not (folder / _SETTINGS).is_file():
        raise ValueError(
            f"{folder} has no trained adapter (no adapter_config.json); train first, or name its folder"
        )
    raise ValueError(
        f"{folder} has the settings of an adapter, but no weights ({_WEIGHTS}): training {how_far(folder)}. {_go_on(folder)}"
    )


def check_whole(path: Path) -> None:
    """Whether a file of safetensors is as long as it says; its tensors aren't read.

    Raises:
        ValueError: it isn't, or it is something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if (start + file.read(len(_POINTER) - 8)).startswith(_POINTER):
            raise ValueError(
                f"{path} is a pointer of git-lfs in place of the weights; fetch them: git lfs pull"
            )
        file.seek(8)
        length = int.from_bytes(start, "little")
        whole = 8 + length
        if len(start) == 8 and length <= _LONGEST_HEADER and whole <= size:
            try:
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                whole += max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
                whole = -1
    if size != whole:
        fault = "is no file of safetensors, or a damaged one"
        if size < whole and length <= _LONGEST_HEADER:
            fault = f"is cut off: it has {size:,} of at least {whole:,} bytes"
        raise ValueError(f"{path} {fault}; copy it again, or train again")


def check_all_whole(folder: Path) -> None:
    """`check_whole` of a model's files.

    Raises:
        ValueError: one isn't.
    """
    for path in folder.glob("*.safetensors"):
        check_whole(path)


def refuse_pickled(folder: str | Path) -> None:
    """
    Args:
        folder: with an adapter; a name at the hub is left to PEFT, which executes nothing either.

    Raises:
        ValueError: its weights are a pickle file, which may hold a program.
    """
    folder = Path(folder)
    if (folder / _PICKLED).is_file() and not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"{folder} has its weights in {_PICKLED}, a pickle file, which can hold a program; only {_WEIGHTS} is read. If you "
            "trust where it comes from, PeftModel.from_pretrained(model, folder).save_pretrained(folder) writes it anew"
        )


def is_finished(folder: Path) -> bool:
    """Whether a run of ours has recorded here that training came to its end."""
    return bool((read_if_sound(folder / RECORD) or {}).get("finished"))


def unfinished(folder: Path) -> str | None:
    """What is to be said of an adapter whose training didn't come to its end; None where it did, or isn't known."""
    record = read_if_sound(folder / RECORD)
    if record is None or record.get("finished", True):
        return None
    return f"The adapter in {folder} is unfinished: training {how_far(folder)}. {_go_on(folder)}"


def how_far(folder: Path) -> str:
    state = read_if_sound(folder / STATE) or {}
    step, last = state.get("global_step"), state.get("max_steps")
    if not step:
        return "has not written a step yet"
    return f"got to step {step}" + (f" of {last}" if last else "")


def _go_on(folder: Path) -> str:
    if any(folder.glob("checkpoint-*")):
        return (
            "`axolotl train` goes on at the last checkpoint there with `auto_resume_from_checkpoints: true` in the YAML, and "
            "each checkpoint-* folder has an adapter of its own"
        )
    return "There is no checkpoint to go on with: train again"


def recorded_config(folder: Path) -> dict[str, Any] | None:
    """The YAML of the run that wrote a folder, or the folder above it (checkpoints); None where there is no record.

    Names of files that were relative are taken from where the run was started, and only where nothing is there from the
    current folder.

    Raises:
        ValueError: the record is damaged.
    """
    place = _recorded_in(folder)
    if place is None:
        return None
    record = _record(place)
    config = record.get("config")
    if not isinstance(config, dict) or not config.get("base_model"):
        return None  # a trainer without a YAML
    config["output_dir"] = str(place)
    started = Path(record.get("directory") or ".")
    for key in _FILES:
        _from(started, config, key)
    for split in ("datasets", "test_datasets"):
        for entry in config.get(split) or []:
            _from(started, entry, "path")
            _from(started, entry, "data_files")
    for block in ("keep", "retention"):
        _from(started, (config.get("bapo") or {}).get(block), "prompts")
    return config


def recorded_held_out(folder: Path) -> tuple[int | None, str | None]:
    """How many rows the run held out that wrote a folder, and the digest of their prompts (`rows.held_out`); None where it
    isn't recorded.

    Raises:
        ValueError: the record is damaged.
    """
    place = _recorded_in(folder)
    record = _record(place) if place else {}
    rows = record.get("rows")
    count = rows.get("eval", 0) if isinstance(rows, dict) and "train" in rows else None
    return count, record.get("held_out")


def recorded_base_weights(folder: Path) -> str | None:
    """The digest (`base_weights`) of the model that the run was trained on that wrote a folder; None where it isn't recorded."""
    place = _recorded_in(folder)
    trained = (read_if_sound(place / RECORD) or {}).get("trained") if place else None
    return trained.get("base_weights") if isinstance(trained, dict) else None


def _recorded_in(folder: Path) -> Path | None:
    """Where the record of the run lies that wrote a folder."""
    places = (folder.resolve(), folder.resolve().parent)
    return next((place for place in places if (place / RECORD).is_file()), None)


def _record(place: Path) -> dict[str, Any]:
    return read_json(place / RECORD, "restore it, or remove it and name the run's YAML")


def _from(started: Path, block: Any, key: str) -> None:
    """Put the place where a run found files in place of their relative name."""

    def found(name: Any) -> Any:
        if not isinstance(name, str) or not name or not is_there(started / name):
            return name
        # a shorter name is kept where it means the same
        return name if same_place(name, str(started / name)) else str(started / name)

    if isinstance(block, dict) and block.get(key):
        value = block[key]
        block[key] = [found(name) for name in value] if isinstance(value, list) else found(value)


def is_there(name: str | Path) -> bool:
    """Whether a file or folder of this name exists."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def same_place(a: Any, b: Any) -> bool:
    """Whether two values of a configuration are the same, or name the same file or folder."""
    if a == b or not (isinstance(a, str) and isinstance(b, str)):
        return a == b
    return is_there(a) and is_there(b) and Path(a).resolve() == Path(b).resolve()


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """In what two configurations can't share one loaded model: (of `SAME`, key, value of a, value of b)."""
    for what, keys in SAME.items():
        for key in keys:
            values = _value(a, key), _value(b, key)
            if not same_place(*values):
                yield what, key, *values


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Of a key, dotted where it is inside a block; false, nothing and the default are the same."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if key in ("base_model_config", "tokenizer_config"):
        value = value or config.get("base_model")
    return value or _DEFAULTS.get(key)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        ValueError: it can't be read.
    """
    return read_json(folder / _SETTINGS, "restore it, or train again")


def base_model(folder: Path) -> str:
    """The model below an adapter, as its run found it, or as its adapter_config.json names it; "" where neither does.

    A run may have named it relative to where it started, which the record knows. Where that is gone and the adapter names
    a folder by its whole path, somebody has written there where the model lies now.

    Raises:
        ValueError: a file can't be read.
    """
    named = adapter_settings(folder).get("base_model_name_or_path") or ""
    recorded = (recorded_config(folder) or {}).get("base_model")
    is_now = Path(named).is_absolute() and is_there(named)
    return named if not recorded or (is_now and not is_there(recorded)) else recorded


def base_of(folder: Path) -> dict[str, Any] | None:
    """As a configuration, the model that an adapter without the record of a run names."""
    name = (read_if_sound(folder / _SETTINGS) or {}).get("base_model_name_or_path")
    return {"base_model": name} if name else None


def is_hub_name(name: str) -> bool:
    """Whether a model's name is one that the hub could have, and no folder of this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)) and not is_there(name)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """An object.

    Raises:
        ValueError: the file can't be read or holds something else; `remedy` is what may be done then.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: can't be read ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a JSON object; {remedy}")
    return content


def without_secrets(value: Any, key: str = "") -> Any:
    """A configuration that is handed on, in a record, a report or a model card: keys of accounts are not."""
    if value and not isinstance(value, bool) and _SECRET.search(key):
        return _HIDDEN
    if isinstance(value, Mapping):
        return {str(k): without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v) for v in value]
    return hide(value) if isinstance(value, str) else value


def hide(text: str) -> str:
    """A text, such as a message, without the secrets that can be told by their looks."""
    text = _SIGNED.sub(rf"\1={_HIDDEN}", _USER.sub("", text))
    return _TOKEN.sub(_HIDDEN, text)


def secrets_in(value: Any, key: str = "") -> list[str]:
    """Keys of a configuration, dotted, whose values `without_secrets` doesn't hand on."""
    if without_secrets(value, key.rpartition(".")[2]) == value:
        return []
    found: list[str] = []
    if isinstance(value, Mapping):
        found = [k for name, v in value.items() for k in secrets_in(v, f"{key}.{name}".lstrip("."))]
    elif isinstance(value, list):
        found = [k for i, v in enumerate(value) for k in secrets_in(v, f"{key}[{i}]")]
    return found or [key]


def read_if_sound(path: Path) -> dict[str, Any] | None:
    """An object; None where there is no file, or one that can't be read."""
    try:
        return read_json(path, "")
    except ValueError:
        return None


def log_digest(path: Path) -> str:
    """Of a run's log (`trainer_state.json`), which is another with every step."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
