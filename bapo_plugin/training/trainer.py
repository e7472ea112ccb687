"""BAPOTrainer: batch -> log-probs of policy and reference -> loss -> metrics.

Everything around the loss (reference bookkeeping, PEFT, checkpoints, model card) is TRL's
DPOTrainer with axolotl's additions. With `anchor_weight: 0` this trainer *is* DPO, and a test holds
it to TRL's.
"""

import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from bapo_plugin.answers.stops import named_stops
from bapo_plugin.compat import keep_4bit_trainable_on_cpu
from bapo_plugin.config import BAPOConfig, parse_block
from bapo_plugin.loss import ResponseLogps, bapo_loss
from bapo_plugin.rows.ends import StopTexts
from bapo_plugin.rows.table import Faults, finish
from bapo_plugin.rows.texts import TextRows
from bapo_plugin.rows.tokens import FEATURES, IDS, TEXTS, Encoder, prepare_batch
from bapo_plugin.scoring.collator import PaddedCollator, SharedPrefixCollator, logps_of, num_rows
from bapo_plugin.scoring.forward import ResponseForward
from bapo_plugin.scoring.layouts import choose_collator
from bapo_plugin.scoring.reference import (
    COLUMN,
    ReferenceCache,
    evaluating,
    reference_mode,
    weights_key,
)
from bapo_plugin.training import adapters
from bapo_plugin.training.callbacks import RunRecord, rows_of, settings_of
from bapo_plugin.training.metrics import RowMetrics, Throughput, row_metrics
from bapo_plugin.training.refusals import adapter_to_evaluate, refuse_arguments
from bapo_plugin.training.retention import RetentionCallback

LOG = get_logger("axolotl." + __name__)


class BAPOTrainer(AxolotlDPOTrainer):
    """Preference training anchored to the base response.

    Used by axolotl for `rl: bapo`; it also stands alone: rows with the text columns "prompt",
    "chosen", "rejected" and "base" are tokenised here, rows with token ids are taken as they are.

    Args:
        model, ref_model, args, train_dataset, eval_dataset, processing_class, peft_config, ...: as
            for `trl.DPOTrainer`. Settings of BAPO are in `args.bapo` (a dict, under axolotl) or in
            `bapo`.
        bapo: a `BAPOConfig`; wins over `args.bapo`.
        cache_dir: folder to keep reference log-probs in; under axolotl it is dataset_prepared_path.

    Metrics (mean over preference rows since the last log; `eval_` in front in evaluation):
        loss = loss/preference + loss/anchor (weighted)
        rewards/chosen, rewards/rejected    β · (log π_θ − log π_ref)
        rewards/margins, rewards/accuracies their difference, and how often it is above 0
        logps/chosen|rejected|base          log π_θ, nats a response
        drift/chosen|rejected|base          log π_θ − log π_ref, nats a response (paper, Figure 5)
        anchor/active                       share of rows whose anchor is pulling
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
        **kwargs: Any,
    ):
        training_args = kwargs.get("args") or (args[2] if len(args) > 2 else None)
        self.bapo = bapo or parse_block(getattr(training_args, "bapo", None))
        refuse_arguments(training_args, self.bapo)
        if training_args is not None:
            # TRL makes the adapter before Trainer sets the seed: without this, no two runs are alike
            set_seed(training_args.seed)
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
        super().__init__(*args, **kwargs)
        if reference == "base" and "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")
        adapters.copy_to_reference(self.model)
        for module in (self.model, self.ref_model):
            if module is not None:
                keep_4bit_trainable_on_cpu(module)
                if self.args.disable_dropout:
                    adapters.disable_functional_dropout(module)
        # gradients are weighted by rows over unequal micro-batches, see `_get_num_items_in_batch`
        self.model_accepts_loss_kwargs = True
        self._forward = ResponseForward(log=LOG.info, backend=self.bapo.kernel)
        self.data_collator = self._choose_layout()
        self._cache_dir = cache_dir or getattr(self.args, "bapo_cache_dir", None)
        self._reference_cache: ReferenceCache | None = None
        self._precompute = self._decide_precompute()
        self.row_metrics = RowMetrics(self.accelerator)
        self.throughput = Throughput(self.accelerator)
        if self.bapo.retention is not None:
            self.add_callback(RetentionCallback(self, self.bapo.retention))
        self.record = RunRecord(settings_of(self), self.model.config.name_or_path, rows_of(self))
        self.add_callback(self.record)

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole model (FSDP, ZeRO-3)."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    # ---------------------------------------------------------------- rows

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name) -> Dataset:
        """Tokenise rendered text; rows that hold token ids already pass through.

        Raises:
            ValueError: rows without a base response or otherwise unusable, all in one message.
        """
        columns = dataset.column_names or []
        if all(name in columns for name in IDS):
            return dataset
        missing = [name for name in TEXTS if name not in columns]
        if missing:
            raise ValueError(
                f"the {dataset_name} data set lacks the columns {', '.join(missing)} (it has "
                f"{', '.join(columns)}); BAPO needs prompt, chosen, rejected and base as text, or {', '.join(IDS)}"
            )
        limit = args.max_length or 2**31
        name = f"the {dataset_name} data set"
        tokenizer = self._tokenizer
        with PartialState().main_process_first():
            rows = dataset.map(
                prepare_batch,
                batched=True,
                batch_size=256,
                with_indices=True,
                fn_kwargs={
                    "read": TextRows(StopTexts(tokenizer, named_stops(tokenizer, None))),
                    "encode": Encoder(tokenizer, from_template=False),
                    "sequence_len": limit,
                    "strategy": "truncate",
                },
                remove_columns=columns,
                features=FEATURES,
                desc=f"Tokenizing {dataset_name} dataset",
            )
        faults = Faults(Path(args.output_dir), "error")
        rows = faults.take(name, rows, len(rows))
        faults.settle(write=False)
        return finish(rows, name, limit, "truncate", "keep")

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*IDS, COLUMN]

    def _choose_layout(self) -> PaddedCollator | SharedPrefixCollator:
        reason = None
        if self.is_sharded:
            reason = "with FSDP or ZeRO-3 it can't be tried out before weights are sharded"
        elif self.aux_loss_enabled:
            reason = "the router's auxiliary loss would count a prompt once instead of three times"
        return choose_collator(
            [model for model in (self.model, self.ref_model) if model is not None],
            self._forward,
            wanted=self.bapo.shared_prefix,
            tokens_per_batch=self.bapo.tokens_per_batch,
            pad_token_id=self.processing_class.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            mixed_precision=self.accelerator.mixed_precision,
            autocast=self.accelerator.autocast,
            checkpointing=self.args.gradient_checkpointing_kwargs,
            refused=reason,
        )

    # ---------------------------------------------------------------- reference

    def _decide_precompute(self) -> bool:
        """Whether log π_ref is computed before training."""
        wanted = self.bapo.precompute_ref_log_probs
        if self.is_sharded and wanted:
            raise ValueError(
                "precompute_ref_log_probs: true needs the whole model on each GPU, but FSDP or ZeRO-3 shards its "
                "weights; remove the line"
            )
        if wanted is None:
            wanted = is_peft_model(self.model) and not self.is_sharded
        LOG.info(
            "log-probs of the reference are computed "
            + ("once, before training" if wanted else "in each step")
        )
        return wanted

    def _with_reference(self, rows: Any, name: str) -> Any:
        """The rows with log π_ref of their responses, where it is precomputed."""
        if not self._precompute or rows is None:
            return rows
        if isinstance(rows, dict):
            return {key: self._with_reference(part, f"{name} {key}") for key, part in rows.items()}
        if self._reference_cache is None:
            self._reference_cache = self._make_reference_cache()
        return self._reference_cache.add_to(rows, self.args.per_device_eval_batch_size, name)

    def _make_reference_cache(self) -> ReferenceCache:
        model = self.ref_model or self.model
        if self.state.global_step and self.ref_model is None and not is_peft_model(model):
            raise RuntimeError("the reference is no longer there: the model has been trained")
        if (
            next(model.parameters()).device.type == "cpu"
        ):  # DeepSpeed moves it only when training begins
            model.to(self.args.device)
        device = self.args.device.type
        precision = f"{device} {self.accelerator.mixed_precision} {self.bapo.kernel}"
        folder = self._cache_dir

        def compute(batch: dict[str, Tensor]) -> Tensor:
            unwrapped = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast(), evaluating(unwrapped):
                return self._reference_logps(unwrapped, unwrapped, batch)

        return ReferenceCache(
            Path(folder) / "bapo-reference.sqlite" if folder else None,
            compute,
            getattr(self.data_collator, "pack", self.data_collator),
            self.accelerator,
            weights_key(self.accelerator.unwrap_model(model), precision) if folder else "",
        )

    def get_train_dataloader(self) -> Any:
        self.train_dataset = self._with_reference(self.train_dataset, "training")
        if self.args.eval_strategy != "no":
            self.eval_dataset = self._with_reference(self.eval_dataset, "evaluation")
        self._tell_what_sharing_saves()
        return super().get_train_dataloader()

    def _tell_what_sharing_saves(self) -> None:
        if isinstance(self.data_collator, SharedPrefixCollator):
            n = min(self.args.per_device_train_batch_size, len(self.train_dataset))
            rows = [self.train_dataset[i] for i in range(n)]
            shared = self.data_collator.pack(rows)["token_counts"][0]
            padded = PaddedCollator(0)(rows)["token_counts"][0]
            LOG.info(
                f"shared prefix: {shared:,} tokens instead of {padded:,} for the first {n} rows"
            )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if eval_dataset is None or isinstance(eval_dataset, str):
            self.eval_dataset = self._with_reference(self.eval_dataset, "evaluation")
        else:
            eval_dataset = self._with_reference(eval_dataset, "evaluation")
        return super().get_eval_dataloader(eval_dataset)

    # ---------------------------------------------------------------- loss

    def training_step(
        self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As transformers', one pack after another where `tokens_per_batch` has split the micro-batch."""
        *first, last = inputs.get("packs", [inputs])
        loss = 0.0
        for pack in first:
            with self.accelerator.no_sync(model):  # gradients are exchanged once, with the last
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
        n = num_rows(inputs)
        # the mean over the step, as this rank's share: ranks are averaged, micro-batches added up
        share = 1.0
        if num_items_in_batch is not None:
            share = n / num_items_in_batch * self.accelerator.num_processes

        model_kwargs = {"output_router_logits": True} if self.aux_loss_enabled else {}
        unwrapped = self.accelerator.unwrap_model(model)
        policy = self._forward(model, unwrapped, inputs, **model_kwargs)
        policy_logps = ResponseLogps(*policy.logps.view(3, n))
        reference_logps = ResponseLogps(*self._reference_logps(model, unwrapped, inputs).view(3, n))
        num_tokens = ResponseLogps(*inputs["cu_seqlens"].diff().view(3, n))
        out = bapo_loss(
            policy_logps,
            reference_logps,
            num_tokens,
            beta=self.beta,
            loss_type=self.loss_types,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            anchor_weight=self.bapo.anchor_weight,
            anchor_loss=self.bapo.anchor_loss,
            anchor_reduction=self.bapo.anchor_reduction,
            anchor_placement=self.bapo.anchor_placement,
        )
        loss = out.loss.mean()
        metrics = row_metrics(out, policy_logps, reference_logps, self.beta)
        if self.aux_loss_enabled:
            aux = self.router_aux_loss_coef * policy.aux_loss
            loss = loss + aux
            metrics["aux_loss"] = policy.aux_loss.detach().expand(n)
            metrics["loss"] = metrics["loss"] + aux.detach()
        mode = "train" if self.model.training else "eval"
        self.row_metrics.add(mode, metrics)
        if mode == "train":
            self.throughput.add(inputs["token_counts"])
        loss = loss * share
        return (loss, {"logps": policy.logps}) if return_outputs else loss

    def _reference_logps(self, model: nn.Module, unwrapped: nn.Module, inputs: dict) -> Tensor:
        """log π_ref of the batch's 3n sequences, nats, without gradient."""
        if (known := logps_of(inputs)) is not None:
            return known
        if self.ref_model is not None:
            model, unwrapped = self.ref_model, self.accelerator.unwrap_model(self.ref_model)
        elif not is_peft_model(unwrapped):
            raise RuntimeError(
                "no reference: the model has no adapter and no reference model was given"
            )
        checkpointing = self.args.gradient_checkpointing_kwargs
        with evaluating(unwrapped), reference_mode(unwrapped, checkpointing):
            return self._forward(model, unwrapped, inputs).logps

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        adapters.load_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Rows of one optimiser step, over its micro-batches and all ranks.

        With it the gradient is the mean over rows whatever the sizes of the micro-batches are; TRL
        takes the mean of their means, in which a row of a small last micro-batch weighs more.
        """
        rows = torch.tensor([sum(num_rows(batch) for batch in batch_samples)], device=device)
        return self.accelerator.gather(rows).sum() if len(batch_samples) else None

    # ---------------------------------------------------------------- metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; evaluation adds its metrics in `evaluation_loop`
            logs |= self.row_metrics.take("train") | self.throughput.take()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        self.row_metrics.take("eval")  # an evaluation that was interrupted
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.row_metrics.take("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in metrics.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        loss = 0.0
        with torch.no_grad(), self.compute_loss_context_manager():
            for pack in inputs.get("packs", [inputs]):
                share = num_rows(pack) / num_rows(inputs)
                loss += share * self.compute_loss(model, pack).detach()
        return loss, None, None
