"""The model that `bapo eval` measures: loaded once, quantised as in training, with its adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bapo_plugin.answers.prompts import Asker
from bapo_plugin.answers.stops import own_stops
from bapo_plugin.compat import keep_4bit_trainable_on_cpu, only_reading
from bapo_plugin.config import is_active, parse_block
from bapo_plugin.evaluation.refusals import (
    LOADED,
    has_its_weights,
    model_is_found,
    must_be_alike,
    must_be_finite,
    must_be_of,
)
from bapo_plugin.evaluation.scaled import check_scalable
from bapo_plugin.models import WHOLE, load_reference, reference_adapter
from bapo_plugin.opening import template_date
from bapo_plugin.runs import (
    RECORD,
    base_model,
    check_adapter,
    recorded_config,
    same_place,
    unfinished,
)
from bapo_plugin.yaml_files import read_yaml

LOG = get_logger("axolotl." + __name__)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is measured.

    Args:
        inside: its name in the model.
        folder: where it lies.
        scale: α of θ_0 + α Δ; None leaves it as it is.
    """

    inside: str
    folder: Path
    scale: float | None = None


@dataclass
class Subject:
    """A loaded model and its states.

    Args:
        model: with all adapters.
        adapters: shown name -> adapter.
        start: the adapter that was there before training, where training went on with one.
        cfg: axolotl's configuration, where one was given.
    """

    model: Any
    tokenizer: Any
    adapters: dict[str, Adapter]
    start: str | None = None
    cfg: Any = None

    @property
    def pad_token_id(self) -> int:
        """What fills rows up; it is masked."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def asker(self) -> Asker:
        """Lets the model answer as it does for base responses, in the state that it is in."""
        if self.cfg is None or not is_active(self.cfg):
            return Asker(self.model, self.tokenizer)
        bapo = parse_block(dict(self.cfg.bapo))
        own = own_stops(self.tokenizer, bapo.anchors.stop)
        return Asker(
            self.model, self.tokenizer, template_date(self.cfg), own, bapo.special_tokens_in_words
        )

    @contextmanager
    def before(self) -> Iterator[None]:
        """The model as it was before training."""
        if self.start:
            self.model.set_adapter(self.start)
            yield
        else:
            with self.model.disable_adapter():
                yield

    @contextmanager
    def after(self, name: str) -> Iterator[None]:
        """The model with one of the adapters, scaled where it says so."""
        adapter = self.adapters[name]
        self.model.set_adapter(adapter.inside)
        scaled = adapter.scale is not None
        with rescale_adapter_scale(self.model, adapter.scale) if scaled else nullcontext():
            yield


def split_targets(targets: Sequence[Path]) -> tuple[Path | None, list[Path]]:
    """What a command was given: the YAML, if any, and folders of adapters.

    Raises:
        ValueError: more than one YAML.
    """
    configs = [t for t in targets if t.suffix in (".yml", ".yaml")]
    if len(configs) > 1:
        raise ValueError(
            f"more than one YAML: {', '.join(map(str, configs))}; name adapters by folder"
        )
    return next(iter(configs), None), [t for t in targets if t not in configs]


def load_subject(
    config: Path | None,
    folders: list[Path],
    load_in_4bit: bool | None,
    scales: Sequence[float] = (),
) -> Subject:
    """`load_run` where there is a YAML, else `load_adapters`."""
    if config:
        return load_run(config, folders, scales)
    return load_adapters(folders, load_in_4bit, scales)


def load_run(config: Path, folders: list[Path], scales: Sequence[float] = ()) -> Subject:
    """The model of a YAML, with the adapter in its output_dir, or those in `folders`.

    Args:
        scales: each adapter is measured at these too.

    Raises:
        ValueError: there is no such file, no adapter, one of another model, or one that can't be scaled.
    """
    if not config.is_file():
        raise ValueError(f"there is no file {config}")
    given = read_yaml(config)
    return _load(given, str(config), str(config), folders, scales)


def load_adapters(
    folders: Sequence[Path], load_in_4bit: bool | None, scales: Sequence[float] = ()
) -> Subject:
    """The model that adapters were trained on, loaded as their run's record says.

    Args:
        folders: with adapters; of a run's folder or a checkpoint in it.
        load_in_4bit: overrides the record.
        scales: each adapter is measured at these too.

    Raises:
        ValueError: they belong to different models or were trained on one loaded otherwise, or one can't be scaled.
    """
    adapters = _check_adapters(folders, scales)
    first, *others = adapters.values()
    bases = {str(folder): base_model(folder) for folder in adapters.values()}
    if not all(same_place(bases[str(first)], base) for base in bases.values()):
        pairs = ", ".join(f"{folder}: {base}" for folder, base in bases.items())
        raise ValueError(f"the adapters belong to different models ({pairs}); evaluate them apart")
    base = bases[str(first)]
    for folder in adapters.values():
        has_its_weights(folder, base)
    records = {f: config for f in (first, *others) if (config := recorded_config(f))}
    if records:
        recorded, config = next(iter(records.items()))
        config["base_model"] = bases[str(recorded)]
        for folder, other in records.items():
            other["base_model"] = config["base_model"]  # the same, perhaps by another name
            left_out = LOADED if load_in_4bit is not None else ()
            must_be_alike(str(recorded), config, folder, other, left_out, "evaluate them apart")
        if load_in_4bit is not None:
            config |= {"load_in_4bit": load_in_4bit, "load_in_8bit": False}
            config["adapter"] = "qlora" if load_in_4bit else "lora"
        name = f"the record of {recorded}"
        return _load(config, DictDefault(config), name, list(folders), scales)
    if load_in_4bit is None:
        LOG.warning(
            f"{first} has no record of its run ({RECORD}): the model is loaded without quantisation; name the run's YAML, "
            "or --load-in-4bit, if it was trained with it"
        )
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with model_is_found(base, str(first)):
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            device_map={"": 0} if cuda else None,
            quantization_config=quantization if load_in_4bit else None,
        )
        has_tokenizer = (first / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(str(first) if has_tokenizer else base)
    return _with_adapters(model, tokenizer, adapters, scales, None, None)


def _load(
    given: Mapping[str, Any],
    config: str | DictDefault,
    name: str,
    folders: list[Path],
    scales: Sequence[float],
) -> Subject:
    """
    Args:
        given: the settings as they were written.
        config: what axolotl reads of them: the path of the YAML, or all of them.
        name: of them, for messages.
    """
    base = str(given.get("base_model") or "")
    with model_is_found(base, name):
        with only_reading():
            cfg = load_cfg(config, **WHOLE)
        if not isinstance(config, str):
            # axolotl wrote it to read it again
            Path(cfg.axolotl_config_path).unlink(missing_ok=True)
        if not cfg.adapter:
            raise ValueError(
                f"{name} trains without an adapter: before and after are two models then; compare them with lm_eval"
            )
        cfg.rl = "dpo"  # axolotl leaves the adapter to the trainer then, and loads the bare model
        adapters = _check_adapters(folders or [Path(cfg.output_dir)], scales)
        for folder in adapters.values() if isinstance(config, str) else ():
            must_be_of(folder, given, name)
        start = reference_adapter(cfg) if is_active(cfg) else None
        if start and scales:
            raise ValueError(
                f"--scale: {name} went on training the adapter {start}, so that a scaled adapter isn't on the way from "
                "before to after; evaluate it without --scale"
            )
        tokenizer = load_tokenizer(cfg)
        model = load_reference(cfg, tokenizer, None)
    return _with_adapters(model, tokenizer, adapters, scales, start, cfg)


def _check_adapters(folders: Sequence[Path], scales: Sequence[float]) -> dict[str, Path]:
    """name -> folder; the name is the folder's, or its path where two have the same."""
    for folder in folders:
        check_adapter(folder)
        if scales:
            check_scalable(folder)
        if text := unfinished(folder):
            LOG.warning(text)
    names = [folder.resolve().name for folder in folders]
    distinct = len(set(names)) == len(names)
    return {
        name if distinct else str(folder): folder
        for name, folder in zip(names, folders, strict=True)
    }


def _with_adapters(
    model: Any,
    tokenizer: Any,
    adapters: dict[str, Path],
    scales: Sequence[float],
    start: str | None,
    cfg: Any,
) -> Subject:
    inside = {name: f"after{i}" for i, name in enumerate(adapters)}
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=inside[name])
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=inside[name])
    if start:
        model.load_adapter(start, adapter_name="start")
    keep_4bit_trainable_on_cpu(model)
    shown = {}
    for name, folder in adapters.items():
        must_be_finite(model, inside[name], folder)
        shown[name] = Adapter(inside[name], folder)
        for scale in scales:
            shown[f"{name} × {str(scale).removesuffix('.0')}"] = Adapter(
                inside[name], folder, scale
            )
    return Subject(model.eval(), tokenizer, shown, "start" if start else None, cfg)
