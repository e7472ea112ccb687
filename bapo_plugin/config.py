"""The `bapo:` block of the YAML. Defaults live here and in `blocks`, nowhere else."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from bapo_plugin.blocks import (
    AnchorsConfig,
    AnchorServerConfig,
    Block,
    KeepConfig,
    RetentionConfig,
    WordsPolicy,
)
from bapo_plugin.loss import (
    TOKEN_LOSSES,
    AnchorLevel,
    AnchorLoss,
    AnchorPlacement,
    AnchorReduction,
)
from bapo_plugin.runs import without_secrets

TOKEN_WEIGHT, RESPONSE_WEIGHT = 0.05, 0.1  # default λ
# nats a token: a former answer becomes 5% less likely with each of its tokens
DRIFT_LIMIT = 0.05
_EXAMPLES = {
    "keep": "keep: {prompts: general}",
    "retention": "retention: {prompts: 32, every: 50}",
    "anchors": "anchors: {max_new_tokens: 512}",
}
TRAINER_CLS = "bapo_plugin.training.trainer.BAPOTrainer"


class BAPOConfig(Block):
    """Settings of BAPO. Formulas: `bapo_plugin/loss.py`."""

    anchor_weight: float | Literal["auto"] = Field(
        default=TOKEN_WEIGHT,
        json_schema_extra={
            "description": "Weight λ of the anchor, in the unit of rl_beta, of which the default is a half. A smaller one "
            "learns faster and lets former answers lose more (docs/evidence.md). 0 gives DPO. auto: found while training, "
            f"so that base responses lose `drift_limit`. Default: {TOKEN_WEIGHT} with anchor_level: token, else {RESPONSE_WEIGHT}."
        },
    )
    anchor_loss: AnchorLoss = Field(
        default="hinge",
        json_schema_extra={
            "description": "Penalty on the drift Δ of the base response: hinge max(0, −Δ), absolute |Δ|, "
            "squared Δ², nll −log π(y_b|x). kl: KL(π_ref ‖ π_θ) over its tokens, which holds the whole "
            "distribution and costs a pass of the reference over prompt and base response in each step. Default: "
            "hinge, with anchor_weight: auto kl."
        },
    )
    anchor_level: AnchorLevel = Field(
        default="token",
        json_schema_extra={
            "description": "What hinge, absolute and squared are taken of. token: of each token of the base response, and "
            "summed, so that no token of the former answer may become less likely. response: of the whole base response, "
            "as the paper's anchor is reported; tokens that gain make up for others that are lost there. nll and kl are sums "
            "over tokens in any case."
        },
    )
    anchor_reduction: AnchorReduction = Field(
        default="sum",
        json_schema_extra={
            "description": "sum: anchor the log-probability of the whole base response (nats). mean: its mean "
            "over tokens, so that long responses weigh no more than short ones."
        },
    )
    anchor_placement: AnchorPlacement = Field(
        default="additive",
        json_schema_extra={
            "description": "additive: loss = preference + λ·A. margin: λ·A is subtracted from the margin inside "
            "the preference loss, as in DPOP."
        },
    )
    drift_limit: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        json_schema_extra={
            "description": "With anchor_weight: auto, what base responses of training rows may lose, nats a token: with "
            "anchor_loss: kl the divergence KL(π_ref ‖ π_θ), else what their tokens have lost (or, with "
            "anchor_level: response, the mean of −Δ). The anchor pulls on what is beyond it. "
            f"Default: {DRIFT_LIMIT}"
        },
    )
    reference: Literal["start", "base"] = Field(
        default="start",
        json_schema_extra={
            "description": "What π_ref is where training goes on with an adapter (`lora_model_dir`). start: the "
            "model with that adapter as it was. base: the model without any adapter. A new adapter starts as "
            "the base model. `axolotl evaluate` compares with the model without adapter in any case."
        },
    )
    kernel: Literal["auto", "triton", "torch"] = Field(
        default="auto",
        json_schema_extra={
            "description": "How log-probabilities are computed from hidden states. auto: Triton on NVIDIA GPUs, "
            "torch elsewhere; triton or torch force one."
        },
    )
    shared_prefix: Literal["auto", "off", "require"] = Field(
        default="auto",
        json_schema_extra={
            "description": "Compute each prompt once for its three responses. auto: where it is proven to give "
            "the same numbers on the loaded model, else one padded row a response, and the log says why. off: "
            "never. require: stop where it can't be done."
        },
    )
    tokens_per_batch: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra={
            "description": "With a shared prefix: most tokens that go through the model at a time. A micro-batch "
            "with more is taken in several passes, with the same gradient: set micro_batch_size to the rows you "
            "want and this to what fits in memory. Default: a micro-batch at a time"
        },
    )
    precompute_ref_log_probs: bool | None = Field(
        default=None,
        json_schema_extra={
            "description": "Compute log π_ref of the three responses once, before training, and keep them under "
            "dataset_prepared_path, instead of in every step. Default: true with an adapter (not with FSDP 1). "
            "axolotl's own key `precompute_ref_log_probs` sets it too."
        },
    )
    field_base: Annotated[str, Field(min_length=1)] | Literal[False] | None = Field(
        default=None,
        json_schema_extra={
            "description": "Column with the base response, for every data set that has no `field_base` of its "
            "own: a string, a message or a list of messages (its last one is taken). Default: base, and where "
            "there is no such column or a cell is empty, the response is generated. false: have all generated, also "
            "where a column `base` means something else."
        },
    )
    anchors: AnchorsConfig = Field(
        default_factory=AnchorsConfig,
        json_schema_extra={"description": "How missing base responses are made: `AnchorsConfig`."},
    )
    retention: RetentionConfig | None = Field(
        default=None,
        json_schema_extra={
            "description": "Log how well the model keeps its former answers during training: `RetentionConfig`."
        },
    )
    keep: KeepConfig | None = Field(
        default=None,
        json_schema_extra={
            "description": "Hold former answers to prompts outside the preference data too: `KeepConfig`."
        },
    )
    on_faulty: Literal["error", "drop"] = Field(
        default="error",
        json_schema_extra={
            "description": "Rows that can't be used. error: stop. drop: leave them out. Both write them to bapo-faulty-rows.jsonl."
        },
    )
    special_tokens_in_words: WordsPolicy = Field(
        default="text",
        json_schema_extra={
            "description": "Special tokens inside the words of a row or prompt, such as <|im_end|> in a question. text: they are "
            "words like others and become ordinary tokens. refuse: such a row can't be used. tokens: they become the special "
            "tokens themselves. Base responses that a row brings are taken to the letter; rows that are rendered already, and prompt strategies of your own, say themselves what is a token."
        },
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        json_schema_extra={
            "description": "A loss or log-probability that is NaN or infinite. stop: end the run before the weights are "
            "touched; the message names step and rows. skip: leave out that optimiser step, with a warning (not with "
            "DeepSpeed)."
        },
    )
    entries: dict[str, list[dict[str, Any]]] | None = Field(
        default=None,
        json_schema_extra={
            "description": "Filled in by the plugin with the data sets' entries as written; do not set it."
        },
    )

    @field_validator("keep", "retention", "anchors", mode="before")
    @classmethod
    def _is_a_block(cls, value, info):
        if value is not None and not isinstance(value, Mapping | BaseModel):
            raise ValueError(
                f"must be a block of settings, such as\n  {_EXAMPLES[info.field_name]}"
            )
        return value

    @field_validator("shared_prefix", mode="before")
    @classmethod
    def _yaml_off(cls, value):
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @field_validator("anchor_weight", mode="before")
    @classmethod
    def _number_or_auto(cls, value):
        if value == "auto" or isinstance(value, bool):
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise ValueError("must be a finite number greater than or equal to 0, or auto")
        return number

    @property
    def holds_tokens(self) -> bool:
        """Whether the anchor looks at each token of the base response."""
        is_dpo = self.anchor_weight == 0
        return not is_dpo and self.anchor_level == "token" and self.anchor_loss in TOKEN_LOSSES

    @model_validator(mode="after")
    def _default_weight(self):
        if "anchor_weight" not in self.model_fields_set and not self.holds_tokens:
            self.anchor_weight = RESPONSE_WEIGHT
        return self

    @model_validator(mode="after")
    def _budget(self):
        if self.anchor_weight != "auto":
            if self.drift_limit is not None:
                raise ValueError(
                    f"drift_limit: {self.drift_limit} has no effect with anchor_weight: {self.anchor_weight}; set "
                    "anchor_weight: auto, or remove the line"
                )
            return self
        if self.anchor_loss == "nll":
            raise ValueError(
                "anchor_weight: auto steers by what base responses have lost, which anchor_loss: nll doesn't measure; take "
                "hinge or kl"
            )
        if self.drift_limit is None:
            self.drift_limit = DRIFT_LIMIT
        if "anchor_loss" not in self.model_fields_set:
            # of all forms the one without noise of a single answer, and without gains that cancel losses
            self.anchor_loss = "kl"
        return self

    @model_validator(mode="after")
    def _nll_is_additive(self):
        if self.anchor_loss == "nll" and self.anchor_placement == "margin":
            raise ValueError(
                "anchor_loss: nll is not zero before training, so inside the margin it would drown the "
                "preference; set anchor_placement: additive, or another anchor_loss"
            )
        return self


class BAPOArgs(BaseModel):
    """What the plugin adds to axolotl's own schema."""

    bapo: BAPOConfig | None = Field(
        default=None,
        json_schema_extra={
            "description": "Base-Anchored Preference Optimization, with `rl: bapo`."
        },
    )


def is_active(cfg: Mapping[str, Any]) -> bool:
    """Whether this configuration, once the plugin has registered it, trains with BAPO."""
    return cfg.get("trainer_cls") == TRAINER_CLS


def not_bapo(config: Any) -> str:
    """What is said of a YAML that our commands can't use."""
    return (
        f"{config} is not a configuration of BAPO: it needs `rl: bapo` (and, before axolotl 0.21, "
        "`plugins: [bapo_plugin.BAPOPlugin]`)"
    )


def parse_block(block: Any) -> BAPOConfig:
    """Validate the `bapo:` block; every problem is named in one ValueError."""
    if isinstance(block, BAPOConfig):
        return block
    if block is not None and not isinstance(block, Mapping):
        raise ValueError(
            f"bapo: must be a block of settings, got {block!r}. Write for example\nbapo:\n  anchor_weight: 0.1"
        )
    try:
        return BAPOConfig.model_validate(dict(block or {}))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    *block, last = error["loc"] or [None]
    if error["type"] == "invalid_key":  # a key that YAML reads as a number, true, false or null
        last = error["input"]
    key = ".".join(["bapo", *map(str, block), *([str(last)] if error["loc"] else [])])
    if error["type"] in ("extra_forbidden", "invalid_key"):
        if last == "api_key":
            return f"{key}: a key doesn't belong into a YAML; set the environment variable OPENAI_API_KEY"
        fields = _BLOCKS.get(tuple(block), BAPOConfig).model_fields
        near = difflib.get_close_matches(str(last), fields, n=1)
        known = ", ".join(k for k in fields if k != "entries")
        hint = f"did you mean {near[0]}?" if near else f"known keys are {known}"
        return f"{key}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + (
        "" if len(error["loc"]) == 0 else f", got {without_secrets(error['input'])!r}"
    )


_BLOCKS = {
    ("anchors",): AnchorsConfig,
    ("anchors", "server"): AnchorServerConfig,
    ("retention",): RetentionConfig,
    ("keep",): KeepConfig,
}


@dataclass
class BAPOTrainingArgs:
    """Carries our settings to the trainer (`args.bapo`, ...), as plain values that serialise."""

    bapo: dict[str, Any] | None = None
    bapo_has_adapter: bool = False  # `adapter` and `lora_model_dir`, which axolotl leaves aside
    bapo_adapter_dir: str | None = None
    bapo_cache_dir: str | None = None  # where reference log-probs are kept
    # what a chat template that writes the date gets to hear (ISO)
    bapo_now: str | None = None
