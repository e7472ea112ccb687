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
from transformers import TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from bapo_plugin.compat import keep_4bit_trainable_on_cpu
from bapo_plugin.config import BAPOConfig, parse_block
from bapo_plugin.loss import ResponseLogps, bapo_loss
from bapo_plugin.rows.tokens import IDS
from bapo_plugin.scoring.collator import ROW, PaddedCollator, SharedPrefixCollator, num_rows
from bapo_plugin.scoring.forward import ResponseForward
from bapo_plugin.scoring.layouts import LateCollator, choose_collator, compute_dtype
from bapo_plugin.training import adapters
from bapo_plugin.training.callbacks import RunRecord, rows_of, settings_of
from bapo_plugin.training.checkpoints import begin_checkpoint, whole_checkpoint
from bapo_plugin.training.metrics import RowMetrics, Throughput, row_metrics
from bapo_plugin.training.non_finite import NonFinite
from bapo_plugin.training.packs import collecting_gradients, equal_passes, packs_of
from bapo_plugin.training.reference import Reference, first_of_all
from bapo_plugin.training.refusals import adapter_to_evaluate, refuse_arguments
from bapo_plugin.training.retention import RetentionCallback
from bapo_plugin.training.rows import tokenized

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
        if reference == "base" and "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")
        goes_on = goes_on and reference == "start" and self.ref_model is None
        adapters.copy_to_reference(self.model, goes_on)
        for module in (self.model, self.ref_model):
            if module is not None:
                keep_4bit_trainable_on_cpu(module)
                if self.args.disable_dropout:
                    adapters.disable_functional_dropout(module)
        # gradients are weighted by rows over unequal micro-batches, see `_get_num_items_in_batch`
        self.model_accepts_loss_kwargs = True
        self.response_forward = ResponseForward(log=LOG.info, backend=self.bapo.kernel)
        if self.is_sharded and self.bapo.shared_prefix != "off":
            self.data_collator = LateCollator(
                self.processing_class.pad_token_id, self.args.pad_to_multiple_of
            )
            self.add_callback(_WhenSharded(self))
        else:
            self.data_collator = self._choose_layout()
        self.reference = Reference(self, cache_dir or getattr(self.args, "bapo_cache_dir", None))
        # a policy that isn't the reference by intention: an adapter goes on, a model of the user's own is given
        self.starts_equal = (
            reference == "start"
            if is_peft_model(self.model)
            else getattr(self.args, "bapo", None) is not None
        )
        self._is_checked = False
        self.non_finite = NonFinite(self)
        self.add_callback(self.non_finite)
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

    def _choose_layout(
        self, model: nn.Module | None = None
    ) -> PaddedCollator | SharedPrefixCollator:
        """Where weights are sharded, `model` is the policy as it is called."""
        reason = None
        if self.is_fsdp1:
            reason = "with FSDP 1 it can't be tried out; set fsdp_version: 2"
        elif self.aux_loss_enabled:
            reason = "the router's auxiliary loss would count a prompt once instead of three times"
        unwrap = self.accelerator.unwrap_model
        models = [self.model if model is None else model, self.ref_model]
        return choose_collator(
            [(model, unwrap(model)) for model in models if model is not None],
            self.response_forward,
            wanted=self.bapo.shared_prefix,
            tokens_per_batch=self.bapo.tokens_per_batch,
            pad_token_id=self.processing_class.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            mixed_precision=self.accelerator.mixed_precision,
            autocast=self.accelerator.autocast,
            checkpointing=self.args.gradient_checkpointing_kwargs,
            refused=reason,
            device=self.accelerator.device if self.is_sharded else None,
            agree=lambda reason: (
                first_of_all(reason, self.accelerator) if self.is_sharded else reason
            ),
        )

    def when_sharded(self) -> None:
        """What needs the model's weights and can't be done before they are sharded: after that, before the first
        batch."""
        self.data_collator.chosen = self._choose_layout(self.model_wrapped)
        self._tell_what_sharing_saves()
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
            self._tell_what_sharing_saves()
        return super().get_train_dataloader()

    def _tell_what_sharing_saves(self) -> None:
        if isinstance(self.layout, SharedPrefixCollator):
            n = min(self.args.per_device_train_batch_size, len(self.train_dataset))
            rows = [self.train_dataset[i] for i in range(n)]
            shared = self.collate(rows)["token_counts"][0]
            padded = PaddedCollator(0)(rows)["token_counts"][0]
            LOG.info(
                f"shared prefix: {shared:,} tokens instead of {padded:,} for the first {n} rows"
            )

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
                first = self._prepare_inputs(packs[0])
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
        n = num_rows(inputs)
        # the mean over the step, as this rank's share: ranks are averaged, micro-batches added up
        share = 0.0 if inputs.get("is_repeated") else 1.0
        if share and num_items_in_batch is not None:
            share = n / num_items_in_batch * self.accelerator.num_processes

        model_kwargs = {"output_router_logits": True} if self.aux_loss_enabled else {}
        unwrapped = self.accelerator.unwrap_model(model)
        policy = self.response_forward(model, unwrapped, inputs, **model_kwargs)
        policy_logps = ResponseLogps(*policy.logps.view(3, n))
        reference_logps = self.reference.logps(model, unwrapped, inputs)
        reference_logps = ResponseLogps(*reference_logps.view(3, n))
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
        if self.model.training and not inputs.get("is_repeated"):
            finite = self.non_finite.finite_rows(
                out, policy_logps, reference_logps, inputs, aux if self.aux_loss_enabled else None
            )
            if finite is not None:
                metrics = {name: rows[finite] for name, rows in metrics.items()}
            self.row_metrics.add("train", metrics)
            self.throughput.add(inputs["token_counts"])
        loss = loss * share
        return (loss, {"logps": policy.logps, "metrics": metrics}) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        checkpoint = whole_checkpoint(self.args.output_dir, resume_from_checkpoint)
        self.throughput.stop()
        return super().train(checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        if self.accelerator.is_fsdp2 and adapters.load_adapter(model, resume_from_checkpoint):
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_deepspeed_enabled and not self.is_fsdp1:  # they load weights of their own
            adapters.load_adapter(model, resume_from_checkpoint)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Rows of one optimiser step, over its micro-batches and all ranks.

        With it the gradient is the mean over rows whatever the sizes of the micro-batches are; TRL
        takes the mean of their means, in which a row of a small last micro-batch weighs more.
        """
        if not batch_samples:
            return None
        rows = torch.tensor([sum(map(num_rows, batch_samples))], device=device)
        if self.bapo.tokens_per_batch:
            equal_passes(batch_samples, self.accelerator)
        return self.accelerator.gather(rows).sum()

    # ---------------------------------------------------------------- metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; evaluation adds its metrics in `evaluation_loop`
            logs |= self.row_metrics.take("train") | self.throughput.take()
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
        with self.throughput.paused():
            if self.args.should_save:
                begin_checkpoint(self.args.output_dir, self.state.global_step)
            super()._save_checkpoint(*args, **kwargs)


class _WhenSharded(TrainerCallback):
    def __init__(self, trainer: BAPOTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.when_sharded()
