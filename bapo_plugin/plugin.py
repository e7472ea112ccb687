"""Where axolotl meets BAPO: wiring, no logic.

axolotl knows a closed list of `rl:` values and tests for its members in many places. BAPO is a
member of the DPO family, so `rl: bapo` becomes `rl: dpo` plus our trainer class; from there on
axolotl's own loading, saving, merging and inference apply unchanged. With any other `rl:` the
plugin does nothing.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger

from bapo_plugin.config import TRAINER_CLS, is_active
from bapo_plugin.runs import without_secrets

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

LOG = get_logger("axolotl." + __name__)


class BAPOPlugin(BasePlugin):
    """axolotl plugin for `rl: bapo`.

    With axolotl 0.21 and later an installed package is enough; before, the YAML needs
    `plugins: [bapo_plugin.BAPOPlugin]`, which does no harm later.
    """

    _kept: Any = None  # prepared prompts of `bapo.keep`

    def register(self, cfg: Any) -> None:
        """Turn `rl: bapo` of the raw YAML into a DPO run with our trainer.

        Raises:
            ValueError: the configuration contradicts itself; key, value, reason and remedy of all
                contradictions in one message.
        """
        if str(cfg.get("rl") or "").lower() != "bapo":
            if cfg.get("bapo") and not is_active(cfg):
                LOG.warning(
                    f"bapo: has no effect with rl: {cfg.get('rl')}, which trains without an anchor; set rl: bapo, or remove "
                    "the block"
                )
            return
        from bapo_plugin import last_word, versions

        last_word.install()
        if said := versions.untested():
            LOG.warning(said)
        from bapo_plugin.checks import check_config
        from bapo_plugin.compat import route_evaluate_to_plugins

        bapo = check_config(cfg).model_dump(exclude_none=True)
        # axolotl's data set schema drops keys that it doesn't know, also of its own; they are kept here
        bapo["entries"] = {
            split: [_take_entry(entry) for entry in cfg[split]]
            for split in ("datasets", "test_datasets")
            if cfg.get(split)
        }
        if isinstance(cfg.get("dpo_loss_type"), str):
            cfg["dpo_loss_type"] = [cfg["dpo_loss_type"]]
        if cfg.get("seed") is None:
            # what axolotl means to set; without one it shuffles rows, and so splits them, otherwise each time
            cfg["seed"] = 42
        cfg["bapo"] = bapo
        cfg["rl"] = "dpo"
        cfg["trainer_cls"] = TRAINER_CLS
        cfg.pop("precompute_ref_log_probs", None)  # `bapo` has it; TRL's knows no base responses
        route_evaluate_to_plugins(is_active, _rows_to_evaluate)

    def get_input_args(self) -> str:
        return "bapo_plugin.config.BAPOArgs"

    def get_training_args_mixin(self) -> str:
        return "bapo_plugin.config.BAPOTrainingArgs"

    def get_training_args(self, cfg: Any) -> dict | None:
        if not is_active(cfg):
            return None
        from bapo_plugin.opening import template_date

        now = template_date(cfg)
        return {
            "bapo": dict(cfg["bapo"]),
            "bapo_has_adapter": bool(cfg.get("adapter")),
            "bapo_adapter_dir": cfg.get("lora_model_dir"),
            "bapo_cache_dir": cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH,
            "bapo_now": now and now.isoformat(),
        }

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Let the run's record hold the user's YAML, give the trainer the prompts to keep, and look at what it is to go on
        from before axolotl writes into output_dir.

        Raises:
            SystemExit: the run has finished already.
            ValueError: it can't go on from there.
        """
        if not is_active(cfg):
            return
        from bapo_plugin.training import resume

        trainer.record.config = _as_written(cfg)
        if self._kept is not None:
            trainer.keep(self._kept)
        wanted = cfg.get("resume_from_checkpoint") or bool(cfg.get("auto_resume_from_checkpoints"))
        if wanted and resume.is_saved(trainer, resume.begin(trainer, wanted)):
            raise SystemExit(0)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> "TrainDatasetMeta | None":
        """Load, check, render and tokenise the rows (see `bapo_plugin.prepare`), before a model is loaded.

        Raises:
            ValueError: faulty rows, or no room for a reference model.
        """
        if not is_active(cfg):
            return None
        if not preprocess and not cfg.get("adapter"):
            from bapo_plugin.models import check_room_for_reference

            check_room_for_reference(cfg)
        from bapo_plugin.prepare import load_datasets

        meta, self._kept = load_datasets(cfg)
        return meta


def _rows_to_evaluate(cfg: Any, tokenizer: Any) -> Any:
    from bapo_plugin.prepare import prepare_rows

    return prepare_rows(cfg, tokenizer, evaluation=True)


def _as_written(cfg: Any) -> dict:
    """The keys of the user's YAML, with what the command line made of them."""
    path = Path(cfg.get("axolotl_config_path") or "")
    written = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else dict(cfg)
    changed = {
        key: cfg[key]
        for key, value in written.items()
        if isinstance(value, str | int | float) and cfg.get(key) is not None
    }
    found = written | changed | {"rl": "bapo", "bapo": written.get("bapo") or {}}
    return without_secrets(found)  # record, report and model card show it


def _take_entry(entry: Any) -> dict[str, Any]:
    """The keys of a data set's entry as written; `field_base` is taken out of what axolotl validates, wherever it
    stands."""
    kept = _plain(entry)
    inner = entry.get("type")
    found = inner.pop("field_base", None) if isinstance(inner, dict) else None
    kept["field_base"] = kept.get("field_base") if kept.get("field_base") is not None else found
    if isinstance(kept.get("type"), dict):
        kept["type"].pop("field_base", None)
    entry.pop("field_base", None)
    return {key: value for key, value in kept.items() if value is not None}


def _plain(value: Any) -> Any:
    """A copy without axolotl's `DictDefault`, which has any attribute that pydantic asks for: None."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else copy.copy(value)
