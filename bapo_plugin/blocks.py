"""Blocks within the `bapo:` block of the YAML. Defaults live here and in `config`, nowhere else."""

import re
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

# special tokens inside words, see `rows.words`
WordsPolicy = Literal["text", "refuse", "tokens"]
# prompts that come with the package, see `answers.prompts`: to hold (`bapo.keep`), and to measure on
GENERAL, UNRELATED = "general", "unrelated"
_FILES = (".txt", ".jsonl")


def can_be_path(name: str) -> bool:
    """Whether a file or folder can have this name at all."""
    parts = name.split("/")
    return "\0" not in name and len(name) < 4096 and all(len(p.encode()) < 256 for p in parts)


class Block(BaseModel):
    """A block of settings: unknown keys are refused, and YAML's yes and no are no numbers."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_is_not_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and re.search(r"\b(int|float)\b", kind):
            raise ValueError("must be a number; YAML reads yes, no, on and off as true and false")
        if isinstance(value, str) and not can_be_path(value):
            raise ValueError(f"{value[:40]!r}... is too long, or holds a NUL byte")
        return value


class AnchorServerConfig(Block):
    """`bapo.anchors.server`: an OpenAI-compatible endpoint that serves the reference model."""

    url: str = Field(
        pattern="^https?://",
        json_schema_extra={
            "description": "Address of the API, for example http://localhost:8000/v1; used is its "
            "/completions. An API key is taken from the environment variable OPENAI_API_KEY, never from here."
        },
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={"description": "Name of the model at the server. Default: base_model"},
    )
    concurrency: int = Field(
        default=16, ge=1, json_schema_extra={"description": "Most requests under way at a time."}
    )
    timeout: float = Field(
        default=600, gt=0, json_schema_extra={"description": "Seconds that one request may take."}
    )
    retries: int = Field(
        default=6,
        ge=0,
        json_schema_extra={
            "description": "How often a request is tried again after a lost connection, 408, 409, 429 or 5xx, "
            "with growing pauses (or as long as the server asks for)."
        },
    )
    probe: bool = Field(
        default=True,
        json_schema_extra={
            "description": "Before the work begins, compare greedy answers of the server with those of the "
            "reference model, loaded here; ask them again after every 16 × concurrency answers. false: trust the server, "
            "load no model."
        },
    )
    tolerance: float = Field(
        default=0.1,
        ge=0,
        json_schema_extra={
            "description": "Where a greedy answer of the server differs, how many nats its token may be below "
            "the reference model's best: rounding differs from engine to engine."
        },
    )


class AnchorsConfig(Block):
    """`bapo.anchors`: how missing base responses are made."""

    on_missing: Literal["generate", "error", "skip"] = Field(
        default="generate",
        json_schema_extra={
            "description": "Rows without a base response. generate: let the reference model answer. error: list "
            "them and stop. skip: leave them out, counted."
        },
    )
    on_cut: Literal["keep", "drop", "error"] = Field(
        default="keep",
        json_schema_extra={
            "description": "Rows whose base response was cut by the token limit. keep: anchor the part there is, "
            "without an end-of-turn token. drop: leave them out, counted. error: list them and stop."
        },
    )
    engine: Literal["transformers", "server"] = Field(
        default="transformers",
        json_schema_extra={
            "description": "transformers: generate here, with the model as it is trained. server: ask an "
            "OpenAI-compatible server (`bapo.anchors.server`)."
        },
    )
    store: str | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={
            "description": "File that keeps base responses. Default: bapo-anchors.sqlite in dataset_prepared_path"
        },
    )
    max_new_tokens: int = Field(
        default=512,
        ge=1,
        json_schema_extra={
            "description": "Most tokens of a base response; never more than sequence_len leaves beside the prompt."
        },
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        json_schema_extra={"description": "0: greedy, the most likely answer. Above: sampled."},
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        json_schema_extra={"description": "With temperature > 0: nucleus that is sampled from."},
    )
    seed: int = Field(
        default=42,
        json_schema_extra={
            "description": "With temperature > 0. A prompt's answer depends on it and on the prompt alone, not "
            "on order or batches."
        },
    )
    batch_size: int = Field(
        default=32, ge=1, json_schema_extra={"description": "Most prompts answered at a time."}
    )
    batch_tokens: int = Field(
        default=16384,
        ge=1,
        json_schema_extra={
            "description": "Most tokens (prompts, padding and answers) in memory at a time."
        },
    )
    stop: list[str] = Field(
        default=[],
        json_schema_extra={
            "description": "Tokens that end an answer, besides those of tokenizer, model and chat template."
        },
    )
    server: AnchorServerConfig | None = Field(
        default=None,
        json_schema_extra={
            "description": "With engine: server, where it is: `AnchorServerConfig`."
        },
    )

    @model_validator(mode="after")
    def _server_settings(self):
        if (self.engine == "server") != (self.server is not None):
            raise ValueError(
                "engine: server and a block `server:` with `url:` go together; set both or neither"
            )
        return self


class RetentionConfig(Block):
    """`bapo.retention`: measure forgetting while training."""

    prompts: int | str = Field(
        json_schema_extra={
            "description": "Prompts to watch. A number: so many held-out rows, with their base responses. unrelated: the 48 "
            "that `bapo eval` asks. A file: .txt with a prompt on each line, or .jsonl with a column `prompt`. Before training "
            "the reference model answers all but held-out rows."
        }
    )
    every: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra={
            "description": "Measure after so many steps. Default: with each evaluation"
        },
    )
    stop_below: float | None = Field(
        default=None,
        lt=0,
        allow_inf_nan=False,
        json_schema_extra={
            "description": "Stop training when the mean drift of former answers (nats a response) is below this."
        },
    )
    max_new_tokens: int = Field(
        default=64,
        ge=1,
        json_schema_extra={"description": "Most tokens of an answer, but of held-out rows."},
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _number_or_file(cls, value):
        if isinstance(value, bool) or not isinstance(value, int | str) or value in (0, ""):
            raise ValueError(
                f"must be a number of held-out rows, {UNRELATED}, or a .txt or .jsonl file"
            )
        if isinstance(value, str) and value != UNRELATED and not value.endswith(_FILES):
            raise ValueError(
                f"must be a number of held-out rows, without quotes, {UNRELATED}, or the name of a .txt or .jsonl file"
            )
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value


class KeepConfig(Block):
    """`bapo.keep`: prompts without preferences whose former answers are held too."""

    prompts: str = Field(
        json_schema_extra={
            "description": "general: 100 prompts of many kinds that come with the plugin. Or a file: .txt with a prompt on each "
            "line, or .jsonl with a column `prompt`. The reference model answers them before training, as it does for rows "
            "(`bapo.anchors`)."
        },
    )
    weight: float = Field(
        default=0.1,
        gt=0,
        allow_inf_nan=False,
        json_schema_extra={
            "description": "Weight of the KL divergence KL(π_ref ‖ π_θ) of the former answers (nats an answer, mean over "
            "the step's prompts)."
        },
    )
    per_step: int = Field(
        default=4,
        ge=1,
        json_schema_extra={
            "description": "Prompts in each optimiser step, over its micro-batches and all GPUs."
        },
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _file(cls, value):
        if value == UNRELATED:
            raise ValueError(
                f"those are what forgetting is measured on; take {GENERAL}, or the name of a .txt or .jsonl file"
            )
        if not isinstance(value, str) or (value != GENERAL and not value.endswith(_FILES)):
            raise ValueError(f"must be {GENERAL}, or the name of a .txt or .jsonl file")
        return value
