"""BAPOTrainer: batch -> log-probs of policy and reference -> loss -> metrics.

Everything around the loss (reference bookkeeping, PEFT, checkpoints, model card) is TRL's
DPOTrainer with axolotl's additions. With `anchor_weight: 0` this trainer *is* DPO, and a test holds
it to TRL's.
"""

import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from bapo_plugin.compat import (
    garbage_of_training,
    keep_4bit_trainable_on_cpu,
    keep_log_probs_in_fp32,
)
from bapo_plugin.config import BAPOConfig, parse_block
from bapo_plugin.rows.columns import IDS
from bapo_plugin.scoring.collator import (
    ROW,
    PaddedCollator,
    SharedPrefixCollator,
    num_rows,
    packs_of,
)
from bapo_plugin.scoring.forward import ResponseForward
from bapo_plugin.scoring.layouts import LateCollator, compute_dtype
from bapo_plugin.training import adapters, resume
from bapo_plugin.training.callbacks import record_of
from bapo_plugin.training.checkpoints import saving_checkpoint
from bapo_plugin.training.keep import Keeper
from bapo_plugin.training.layout import WhenSharded, choose_layout, tell_what_sharing_saves
from bapo_plugin.training.metrics import RowMetrics, Throughput
from bapo_plugin.training.non_finite import NonFinite
from bapo_plugin.training.objective import Objective
from bapo_plugin.training.outputs import leave_base_model_out, write_card
from bapo_plugin.training.packs import collecting_gradients, equal_passes
from bapo_plugin.training.reference import Reference
from bapo_plugin.training.refusals import adapter_to_evaluate, refuse_arguments
from bapo_plugin.training.retention import RetentionCallback
from bapo_plugin.training.rows import tokenized
from bapo_plugin.training.weight import AnchorWeight

LOG = get_logger("axolotl." + __name__)


class BAPOTrainer(AxolotlDPOTrainer):
    """Preference training anchored to the base response.

    Used by axolotl for `rl: bapo`; it also stands alone: rows with the text columns "prompt",
    "chosen", "rejected" and "base" are tokenised here, rows with token ids are taken as they are.

    Args:
        model, ref_model, args, train_dataset, eval_dataset, processing_class, peft_config, ...: as
            for `trl.DPOTrainer`; `args` are axolotl's (`AxolotlDPOConfig`). Settings of BAPO are in
            `args.bapo` (a dict, under axolotl) or in `bapo`.
        bapo: a `BAPOConfig`; wins over `args.bapo`.
        cache_dir: folder to keep reference log-probs in; under axolotl it is dataset_prepared_path.
        keep_dataset: for `bapo.keep`: `prompt_ids` and `base_ids`, prompts whose former answers are held too.

    Metrics (mean over preference rows since the last log; `eval_` in front in evaluation):
        loss = loss/preference + loss/anchor (weighted) + loss/keep (with `bapo.keep`)
        rewards/chosen, rewards/rejected    β · (log π_θ − log π_ref)
        rewards/margins, rewards/accuracies their difference, and how often it is above 0
        logps/chosen|rejected|base          log π_θ, nats a response
        drift/chosen|rejected|base          log π_θ − log π_ref, nats a response (paper, Figure 5)
        anchor/active                       share of the base responses' tokens (or of rows) whose anchor is pulling
        anchor/lost                         what tokens that became less likely have lost, nats a token
        anchor/weight                       λ, with anchor_weight: auto
        anchor/kl, keep/kl                  KL(π_ref ‖ π_θ), nats a token, with anchor_loss: kl and bapo.keep
        retention/*                         with `bapo.retention`, see `bapo_plugin.scoring.retention`
        tokens/s, sharing, packing          tokens computed a second; share of tokens that sharing the prompt
                                            saved; share of computed tokens that are not padding
    """

    tag_names = ["axolotl", "bapo"]
    _tag_names = ["trl", "bapo"]
    _name = "BAPO"
    _paper = {
        "title": "BAPO: Base-Anchored Preference Optimization for Overcoming Forgetting in Large Language "
        "Models Personalization",
        "id": "2407.00693",
        "citation": textwrap.dedent("""\
            @inproceedings{lee2024bapo,
                title        = {{BAPO: Base-Anchored Preference Optimization for Overcoming Forgetting in Large Language Models Personalization}},
                author       = {Gihun Lee and Minchan Jeong and Yujin Kim and Hojung Jung and Jaehoon Oh and Sangmook Kim and Se-Young Yun},
                year         = 2024,
                booktitle    = {Findings of the Association for Computational Linguistics: EMNLP 2024},
                eprint       = {2407.00693},
                archivePrefix = {arXiv},
            }"""),
    }

    def __init__(
        self,
        *args: Any,
        bapo: BAPOConfig | None = None,
        cache_dir: str | Path | None = None,
        keep_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        training_args = kwargs.get("args") or (args[2] if len(args) > 2 else None)
        self.bapo = bapo or parse_block(getattr(training_args, "bapo", None))
        refuse_arguments(training_args, self.bapo)
        if training_args is not None:
            # TRL makes the adapter before Trainer sets the seed: without this, no two runs are alike
            set_seed(training_args.seed)
            if multiple := getattr(kwargs.get("data_collator"), "pad_to_multiple_of", None):
                training_args.pad_to_multiple_of = multiple  # axolotl's key, in axolotl's collator
        reference = self.bapo.reference
        if getattr(training_args, "bapo_has_adapter", False) and not is_peft_model(args[0]):
            path = training_args.bapo_adapter_dir
            if kwargs.get("peft_config") is None:  # `axolotl evaluate` leaves it out
                reference, path = "base", adapter_to_evaluate(training_args.output_dir, path)
            if path:
                # axolotl hands a DPO trainer the settings of a new adapter, also where
                # `lora_model_dir` names one to go on with; TRL makes a given one its own reference
                kwargs.pop("peft_config", None)
                model = PeftModel.from_pretrained(args[0], path, is_trainable=True)
                args = (model, *args[1:])
                LOG.info(f"Loaded the adapter in {path}")
        given = args[0] if args else kwargs.get("model")
        goes_on = is_peft_model(given) and kwargs.get("peft_config") is None
        super().__init__(*args, **kwargs)
        keep_log_probs_in_fp32(self.accelerator)
        if reference == "base" and "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")
        goes_on = goes_on and reference == "start" and self.ref_model is None
        adapters.refuse_bias(self.model)
        adapters.copy_to_reference(self.model, goes_on)
        for module in (self.model, self.ref_model):
            if module is not None:
                keep_4bit_trainable_on_cpu(module)
                if self.args.disable_dropout:
                    adapters.disable_functional_dropout(module)
        # gradients are weighted by rows over unequal micro-batches, see `_get_num_items_in_batch`
        self.model_accepts_loss_kwargs = True
        self.response_forward = ResponseForward(
            log=LOG.info, backend=self.bapo.kernel, base_tokens=self.bapo.holds_tokens
        )
        if self.is_sharded and self.bapo.shared_prefix != "off":
            self.data_collator = LateCollator(
                self.processing_class.pad_token_id, self.args.pad_to_multiple_of
            )
            self.add_callback(WhenSharded(self))
        else:
            self.data_collator = choose_layout(self)
        self.reference = Reference(self, cache_dir or getattr(self.args, "bapo_cache_dir", None))
        # a policy that isn't the reference by intention: an adapter goes on, a model of the user's own is given
        self.starts_equal = (
            reference == "start"
            if is_peft_model(self.model)
            else getattr(self.args, "bapo", None) is not None
        )
        self.objective = Objective(self)
        self.keeper: Keeper | None = None
        self.keep(keep_dataset)
        self._is_checked = False
        self.non_finite = NonFinite(self)
        self.add_callback(self.non_finite)
        self.anchor_weight = AnchorWeight(self)
        self.add_callback(self.anchor_weight)
        self.row_metrics = RowMetrics(self.accelerator)
        self.kept_metrics = RowMetrics(self.accelerator)
        self.throughput = Throughput(self.accelerator)
        if self.bapo.retention is not None:
            self.add_callback(RetentionCallback(self, self.bapo.retention))
        self.record = record_of(self)
        self.add_callback(self.record)
        leave_base_model_out(self)

    def keep(self, rows: Dataset | None) -> None:
        """Hold the former answers to other prompts too, see `bapo.keep`.

        Args:
            rows: `prompt_ids` and `base_ids`; None where there is nothing of that kind.

        Raises:
            ValueError: no rows, one without tokens, `bapo.keep` is not set, or a head that trains.
        """
        if rows is not None:
            if self.bapo.keep is None:
                raise ValueError("prompts to keep were given, but bapo.keep is not set")
            self.keeper = Keeper(self, rows)
        self.objective.refuse()
        self.layout.anchored = self.objective.anchored

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole model (FSDP, ZeRO-3)."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    @property
    def is_fsdp1(self) -> bool:
        return self.is_fsdp_enabled and not self.accelerator.is_fsdp2

    @property
    def computes_in_half(self) -> bool:
        """Whether log-probs are rounded as 16 bits are."""
        dtype = compute_dtype(self.model, self.accelerator.mixed_precision)
        return dtype not in (torch.float32, torch.float64)

    # ---------------------------------------------------------------- rows

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name) -> Dataset:
        return tokenized(dataset, self._tokenizer, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*IDS, ROW]

    def when_sharded(self) -> None:
        """What needs the model's weights and can't be done before they are sharded: after that, before the first
        batch."""
        self.data_collator.chosen = choose_layout(self, self.model_wrapped)
        self.layout.anchored = self.objective.anchored
        tell_what_sharing_saves(self)
        self.reference.fill(self.model_wrapped)

    @property
    def layout(self) -> PaddedCollator | SharedPrefixCollator:
        """What collates batches, chosen before or after sharding."""
        return getattr(self.data_collator, "chosen", self.data_collator)

    def collate(self, rows: list[dict]) -> dict[str, Any]:
        """Rows as one batch of the layout, however many tokens they have."""
        return getattr(self.layout, "pack", self.layout)(rows)

    def get_train_dataloader(self) -> Any:
        self.train_dataset = self.reference.number(self.train_dataset, "training")
        if self.args.eval_strategy != "no":
            self.eval_dataset = self.reference.number(self.eval_dataset, "evaluation")
        if not self.is_sharded:
            self.reference.fill()
            tell_what_sharing_saves(self)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if eval_dataset is None or isinstance(eval_dataset, str):
            self.eval_dataset = self.reference.number(self.eval_dataset, "evaluation")
        else:
            eval_dataset = self.reference.number(eval_dataset, "evaluation")
        if not self.is_sharded:
            self.reference.fill()
        return super().get_eval_dataloader(eval_dataset)

    # ---------------------------------------------------------------- loss

    def training_step(
        self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As transformers', one pack after another where `tokens_per_batch` has split the micro-batch."""
        self.throughput.start()
        packs = packs_of(inputs)
        if not self._is_checked:
            with self.throughput.paused():
                # kept prompts may fill a pack of their own
                first = self._prepare_inputs(next(filter(num_rows, packs), packs[0]))
                self.reference.check(
                    model, first, self.starts_equal and self.state.global_step == 0
                )
            self._is_checked = True
        *others, last = packs
        loss = 0.0
        for pack in others:
            with collecting_gradients(self.accelerator, model):
                loss += super().training_step(model, pack, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Mean BAPO loss of the rows; over all rows of the optimiser step in training.

        Args:
            inputs: a batch of `PaddedCollator`, n rows.
            num_items_in_batch: rows of this optimiser step, over accumulation and ranks.
        """
        terms = self.objective(model, inputs)
        is_counted = self.model.training and not inputs.get("is_repeated")
        metrics = terms.metrics
        if is_counted:
            finite = self.non_finite.finite_rows(terms, inputs)
            if finite is not None:
                metrics = {name: rows[finite] for name, rows in metrics.items()}
            self.row_metrics.add("train", metrics)
            kept = terms.kept.detach().isfinite()
            self.kept_metrics.add("train", {k: v[kept] for k, v in terms.kept_metrics.items()})
            self.anchor_weight.add(terms)
            self.throughput.add(inputs["token_counts"])
        n, m = len(terms.rows.loss), len(terms.kept)
        if num_items_in_batch is None:
            loss = self.objective.total(terms, max(n, 1), m)
        else:
            # the mean over the step, as this rank's share: ranks are averaged, micro-batches added up
            m = self.keeper.per_step if self.keeper is not None else 0
            loss = self.objective.total(terms, num_items_in_batch, m)
            loss = loss * self.accelerator.num_processes
        if inputs.get("is_repeated"):
            loss = loss * 0.0
        return (loss, {"logps": terms.logps, "metrics": metrics}) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        if self.bapo.keep is not None and self.keeper is None:
            raise ValueError(
                "bapo.keep is set, but there are no prompts with base responses: give `keep_dataset`"
            )
        checkpoint = resume.begin(self, resume_from_checkpoint)
        if resume.is_done(self, checkpoint):
            return resume.finish(self, checkpoint)
        self.throughput.stop()
        with garbage_of_training():
            return super().train(checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        if self.accelerator.is_fsdp2 and adapters.load_adapter(model, resume_from_checkpoint):
            return
        loads = (
            not self.is_deepspeed_enabled and not self.is_fsdp1
        )  # they load weights of their own
        if loads:
            adapters.refuse_other_shapes(model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if loads:
            adapters.load_adapter(model, resume_from_checkpoint)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Rows of one optimiser step, over its micro-batches and all ranks.

        With it the gradient is the mean over rows whatever the sizes of the micro-batches are; TRL
        takes the mean of their means, in which a row of a small last micro-batch weighs more.
        """
        if not batch_samples:
            return None
        rows = torch.tensor([sum(map(num_rows, batch_samples))], device=device)
        if self.keeper is not None:
            self.keeper.add(batch_samples, self.reference)
        if self.bapo.tokens_per_batch:
            equal_passes(batch_samples, self.accelerator)
        return self.accelerator.gather(rows).sum()

    # ---------------------------------------------------------------- metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; evaluation adds its metrics in `evaluation_loop`
            kept = self.kept_metrics.take("train")
            logs |= self.row_metrics.take("train") | self.throughput.take() | kept
            logs["loss"] += kept.get("loss/keep", 0.0)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        self.row_metrics.take("eval")  # an evaluation that was interrupted
        with self.throughput.paused():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.row_metrics.take("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in metrics.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self.reference.fill(model)  # where weights are sharded it couldn't be done before
        inputs = self._prepare_inputs(inputs)
        if self.bapo.tokens_per_batch:
            equal_passes([inputs], self.accelerator)
        parts = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for pack in packs_of(inputs):
                _, out = self.compute_loss(model, pack, return_outputs=True)
                if not pack.get("is_repeated"):
                    parts.append(out["metrics"])
        metrics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if "order" in inputs:
            back = inputs["order"].argsort()
            metrics = {name: values[back] for name, values in metrics.items()}
        metrics = self.row_metrics.gathered(metrics)
        self.row_metrics.add("eval", metrics)
        return metrics["loss"].mean(), None, None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        where = (self.args.output_dir, self.state.global_step, self.args.should_save)
        with self.throughput.paused(), saving_checkpoint(*where):
            super()._save_checkpoint(*args, **kwargs)

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            write_card(self, model_name)
