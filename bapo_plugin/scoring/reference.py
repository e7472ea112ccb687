"""The reference model: what the policy was before training, and its log-probs, computed once.

log π_ref of the three responses doesn't change during training, so it is computed before, and kept in
a file under a key of the tokens and the model as it is loaded. A run that differs in training settings
only, or goes on after an interruption, finds it there.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, is_peft_model, send_to_device
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from bapo_plugin import __version__
from bapo_plugin.compat import disable_gradient_checkpointing, use_adapter
from bapo_plugin.rows.columns import IDS, RESPONSES
from bapo_plugin.rows.table import lengths
from bapo_plugin.store import Store

COLUMN = "reference_logps"  # of rows that bring log π_ref: [chosen, rejected, base], nats
TOKENS_COLUMN = "reference_base_logps"  # and of each token of their base response, nats
_OFF = 1e-2  # nats a token, by which sums may differ that rows bring
FILE = "bapo-reference.sqlite"  # in dataset_prepared_path
_NOT_WEIGHTS = ("_name_or_path", "use_cache", "transformers_version", "architectures")


@contextmanager
def reference_mode(model: Any, gradient_checkpointing_kwargs: dict | None = None):
    """Inside, the PEFT model is its own reference: adapter off, or the copy "ref" that TRL keeps of an
    adapter whose training goes on. A model without PEFT is left as it is. No gradients.

    Args:
        model: the unwrapped policy, or a reference model of its own.
        gradient_checkpointing_kwargs: as the trainer set them, to restore checkpointing with.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(disable_gradient_checkpointing(model, gradient_checkpointing_kwargs))
        if is_peft_model(model):
            name = "ref" if "ref" in model.peft_config else None
            stack.enter_context(use_adapter(model, adapter_name=name))
        yield


@contextmanager
def evaluating(model: nn.Module):
    """Inside, the model is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class ReferenceLogps(NamedTuple):
    """log π_ref, nats, without gradient: `sequences`, of whole responses, and `base_tokens` [T_b], of the tokens of
    the base responses, row by row; None where the anchor doesn't look at tokens."""

    sequences: Tensor
    base_tokens: Tensor | None


class ReferenceCache:
    """log π_ref of data sets' rows, from a file or computed.

    Args:
        path: of the file; None keeps nothing.
        compute: batch of `PaddedCollator` -> log π_ref of its 3n sequences and its base responses' tokens.
        collate: rows -> batch.
        accelerator: each process computes its share; the first reads and writes the file.
        model_key: of the reference model as loaded, see `weights_key`.
        holds_tokens: whether log-probs of the base responses' tokens are wanted too.
    """

    def __init__(
        self,
        path: Path | None,
        compute: Callable[[dict[str, Tensor]], ReferenceLogps],
        collate: Callable[[list[dict]], dict[str, Tensor]],
        accelerator: Accelerator,
        model_key: str,
        holds_tokens: bool,
    ):
        self._path = path
        self._compute = compute
        self._collate = collate
        self._accelerator = accelerator
        self._model_key = model_key
        self._holds_tokens = holds_tokens

    def logps_of(self, rows: Dataset, batch_size: int, name: str) -> ReferenceLogps:
        """log π_ref of each row's chosen, rejected and base response, [rows, 3] fp64, and of the tokens of all base
        responses, row after row, fp32. Rows with a column `reference_logps` bring their own.

        Args:
            rows: tokenised rows, the same on every process.
            batch_size: rows of a process at a time.
            name: of the data set, for the progress bar.

        Raises:
            StoreDamaged: the file is damaged; it was set aside.
            ValueError: a log-prob that isn't finite, or rows that bring too few.
        """
        if COLUMN in rows.column_names:
            return self._brought(rows, name)
        logps = torch.full((len(rows), len(RESPONSES)), torch.nan, dtype=torch.float64)
        ends = np.concatenate([[0], base_lengths(rows).cumsum()]) if self._holds_tokens else [0]
        tokens = torch.full((int(ends[-1]),), torch.nan)
        is_kept = self._path is not None and self._accelerator.is_main_process
        with Store(self._path, "reference log-probs") if is_kept else nullcontext() as store:
            if store is not None:
                self._read(store, rows, logps, tokens, ends)
            logps = self._shared(logps)
            if self._holds_tokens:
                tokens = self._shared(tokens)
            missing = logps.isnan().any(dim=1).nonzero()[:, 0].numpy()
            if len(missing):
                # long rows first, so that a batch has little padding and lack of memory shows at once
                missing = missing[np.argsort(-_row_lengths(rows)[missing], kind="stable")]
                for done, values, by_row in self._passes(rows, missing, batch_size, name):
                    logps[done] = values
                    for i, part in zip(done, by_row, strict=bool(by_row)):
                        tokens[ends[i] : ends[i + 1]] = torch.from_numpy(part)
                    if store is not None:
                        keys = list(_sequence_keys(rows.select(done), self._model_key))
                        store.put("logp", _entries(keys, values, by_row))
        return ReferenceLogps(logps, tokens if self._holds_tokens else None)

    def _read(
        self, store: Store, rows: Dataset, logps: Tensor, tokens: Tensor, ends: Sequence[int]
    ) -> None:
        """Fill in what is in the file of rows that are there as a whole.

        Args:
            logps: [rows, 3].
            tokens, ends: of the base responses' tokens, and where each row's begin, and the end.
        """
        start = 0
        for keys in _batched(_sequence_keys(rows, self._model_key), 1000):
            wanted = {key for row in keys for key in row}
            if self._holds_tokens:
                wanted |= {_of_tokens(row) for row in keys}
            known = store.get("logp", wanted)
            for i, row in enumerate(keys, start):
                found = [known.get(key) for key in row]
                if None in found:
                    continue
                if self._holds_tokens:
                    kept = np.frombuffer(known.get(_of_tokens(row), b""), dtype="<f4")
                    if len(kept) != ends[i + 1] - ends[i]:
                        continue  # a run that looks at whole responses only has left none
                    tokens[ends[i] : ends[i + 1]] = torch.from_numpy(kept.copy())
                logps[i] = torch.tensor([struct.unpack("<d", value)[0] for value in found])
            start += len(keys)

    def _brought(self, rows: Dataset, name: str) -> ReferenceLogps:
        logps = torch.empty((len(rows), len(RESPONSES)), dtype=torch.float64)
        for start, part in _parts(rows, COLUMN):
            logps[start : start + len(part)] = torch.tensor(part, dtype=torch.float64)
        if not logps.isfinite().all():
            bad = int((~logps.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(
                f"row {bad + 1} of the {name} rows brings {rows[COLUMN][bad]} in {COLUMN}, which is not finite"
            )
        if not self._holds_tokens:
            return ReferenceLogps(logps, None)
        if TOKENS_COLUMN not in rows.column_names:
            raise ValueError(
                f"the {name} rows bring {COLUMN}, but bapo.anchor_level: token needs the log-probs of each token of the base "
                f"response too: add a column {TOKENS_COLUMN}, remove {COLUMN}, or set bapo.anchor_level: response"
            )
        counts = base_lengths(rows)
        tokens = torch.empty(int(counts.sum()))
        place = 0
        brought = (part for _, parts in _parts(rows, TOKENS_COLUMN) for part in parts)
        for i, (part, length) in enumerate(zip(brought, counts.tolist(), strict=True)):
            row = f"row {i + 1} of the {name} rows"
            if len(part or ()) != length:
                raise ValueError(
                    f"{row} has {len(part or ())} numbers in {TOKENS_COLUMN} and {length} tokens in base_ids; they must be as many"
                )
            off = sum(x if x is not None else math.nan for x in part) - logps[i, -1].item()
            if not abs(off) <= _OFF * length:
                raise ValueError(
                    f"{row}: the numbers in {TOKENS_COLUMN} sum up to {off:+.3g} nats beside that of the base response in {COLUMN}; "
                    "they must be of one model, and finite"
                )
            tokens[place : place + length] = torch.tensor(part)
            place += length
        return ReferenceLogps(logps, tokens)

    def _passes(
        self, rows: Dataset, missing: np.ndarray, batch_size: int, name: str
    ) -> Iterator[tuple[list[int], Tensor, list[np.ndarray]]]:
        """(indices, log π_ref [n, 3], of the tokens of each row's base response) batch by batch, the same on every
        process."""
        accelerator = self._accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        bar = tqdm(
            total=len(missing),
            desc=f"Reference log-probs of the {name} rows",
            unit="row",
            mininterval=1,
            disable=not accelerator.is_local_main_process,
        )
        with bar:
            for start in range(0, len(missing), batch_size * world):
                part = missing[start : start + batch_size * world].tolist()
                # every process has as many rows: a wrapped model must be called equally often
                own = [part[j % len(part)] for j in range(rank, _round_up(len(part), world), world)]
                batch = self._collate([rows[i] for i in own])
                batch = send_to_device(batch, accelerator.device)
                found = self._compute(batch)
                by_row: list[np.ndarray] = []
                if self._holds_tokens:
                    lengths = batch["cu_seqlens"].diff()[2 * len(own) :].tolist()
                    parts = found.base_tokens.float().cpu().split(lengths)
                    by_row = gather_object([part.numpy() for part in parts])
                    # [process, row] -> the order of `part`
                    by_row = [
                        by_row[p * len(own) + i] for i in range(len(own)) for p in range(world)
                    ]
                values = found.sequences.view(len(RESPONSES), len(own)).T
                # [process, row] -> the order of `part`
                values = accelerator.gather(values.contiguous()).view(world, len(own), -1)
                values = values.transpose(0, 1).reshape(world * len(own), -1)[: len(part)]
                values = values.cpu().double()  # not every device has 64 bits
                if not values.isfinite().all():
                    bad = part[int((~values.isfinite()).any(dim=1).nonzero()[0])]
                    raise ValueError(
                        f"the reference model gives row {bad + 1} of the {name} rows a log-probability that is "
                        "not finite; check that base_model loads well in this precision (bf16 instead of fp16)"
                    )
                yield part, values, by_row[: len(part)]
                bar.update(len(part))

    def _shared(self, values: Tensor) -> Tensor:
        """The first process's values, on every process."""
        if self._accelerator.num_processes == 1:
            return values
        # as whole numbers, since not every backend has float64
        whole = torch.int64 if values.dtype == torch.float64 else torch.int32
        wire = values.view(whole).to(self._accelerator.device)
        return broadcast(wire).cpu().view(values.dtype)


def weights_key(model: nn.Module, precision: str) -> str:
    """Fingerprint of a reference model as it is loaded: configuration and all weights, quantised ones as they
    are stored, sharded ones as far as they are here; of adapters only "ref", which TRL keeps where training goes on
    with one. The same in every process that loads the same.

    Args:
        model: the policy before training, or a reference model of its own.
        precision: whatever else decides how log-probs are rounded (kernel, autocast, device, layout).
    """
    precision = f"{precision} {_implementations(model)}"
    config = model.config.to_dict() if hasattr(model, "config") else {}
    for name in list(config):  # where it came from, and what only generation reads
        if name in _NOT_WEIGHTS or name.endswith("_token_id"):
            del config[name]
    adapters = getattr(model, "peft_config", {})
    kept = sorted(
        # names as without an adapter, so that it doesn't matter which modules have one
        (name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
        and not any(f".{adapter}." in f"{name}." for adapter in adapters if adapter != "ref")
    )

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        tensor = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's shard
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        raw = tensor.detach().cpu().contiguous().flatten()
        found.update(raw.view(torch.uint8).numpy() if raw.numel() else b"")
        return found.digest()

    whole = hashlib.sha256(_canonical([__version__, config, precision]))
    if "ref" in adapters:
        whole.update(_canonical(adapters["ref"].to_dict()))
    with ThreadPoolExecutor(
        min(8, os.cpu_count() or 1)
    ) as pool:  # hashing leaves the interpreter free
        for part in pool.map(digest, kept):
            whole.update(part)
    return whole.hexdigest()


def _implementations(model: nn.Module) -> str:
    """Of attention and experts: they are no part of a configuration that is written down, but numbers differ."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    names = ("_attn_implementation", "_experts_implementation")
    return " ".join(str(getattr(text, name, None)) for name in names)


def _canonical(value: Any) -> bytes:
    """JSON that is the same in every process: a set has another order in each."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, set | frozenset):
            return sorted((plain(part) for part in value), key=str)
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return value

    return json.dumps(plain(value), default=str, sort_keys=True).encode()


def _sequence_keys(rows: Dataset, model_key: str) -> Iterator[list[str]]:
    """For each row, for each response: key of prompt and response under the model."""
    start = hashlib.blake2b(model_key.encode(), digest_size=16)
    for part in rows.select_columns(list(IDS)).with_format("numpy").iter(batch_size=1000):
        prompts, *responses = (part[name] for name in IDS)
        for i, prompt in enumerate(prompts):
            prompt = np.asarray(prompt, dtype=np.int64)
            head = start.copy()
            head.update(struct.pack("<q", len(prompt)) + prompt.tobytes())
            keys = []
            for response in responses:
                digest = head.copy()
                digest.update(np.asarray(response[i], dtype=np.int64).tobytes())
                keys.append(digest.hexdigest())
            yield keys


def _entries(keys: list[list[str]], values: Tensor, by_row: list[np.ndarray]) -> dict[str, bytes]:
    """What the file holds of rows: under the key of each response its log-prob, fp64; under one of its own those of a base
    response's tokens, fp32, where they are known."""
    entries = {
        key: struct.pack("<d", value)
        for row, numbers in zip(keys, values.tolist(), strict=True)
        for key, value in zip(row, numbers, strict=True)
    }
    for row, tokens in zip(keys, by_row, strict=bool(by_row)):
        entries[_of_tokens(row)] = tokens.astype("<f4").tobytes()
    return entries


def _of_tokens(keys: list[str]) -> str:
    """The key of the tokens of a row's base response."""
    return f"{keys[-1]} tokens"


def base_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row's base response, int64."""
    return lengths(rows, "base_ids").astype(np.int64)


def _row_lengths(rows: Dataset) -> np.ndarray:
    prompt, *responses = (lengths(rows, name) for name in IDS)
    return prompt + np.max(responses, axis=0)


def _parts(rows: Dataset, column: str) -> Iterator[tuple[int, list]]:
    """(index of the first row, cells) of a thousand rows at a time."""
    start = 0
    for part in rows.select_columns([column]).iter(batch_size=1000):
        yield start, part[column]
        start += len(part[column])


def _batched(keys: Iterator[list[str]], size: int) -> Iterator[list[list[str]]]:
    while part := list(islice(keys, size)):
        yield part


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
