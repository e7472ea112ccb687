"""Bytes of what is on a card throughout training, and of what the log-prob kernels take. Pure functions."""

from collections.abc import Iterable
from math import ceil

GIB = 2**30
# Assumptions, not measured: the CUDA context with the code of torch, bitsandbytes and cuBLAS and its workspaces; and
# what the caching allocator holds beyond what is asked for, as a share of what comes and goes in a step.
CONTEXT_BYTES = 3 * GIB // 4
FRAGMENTATION = 0.05

# bapo_kernels.triton_slabs; a test holds these to it
_MOST_ROWS, _SLAB_LOGITS, _MOST_COLUMNS = 2048, 2048 * 8192, 32768
_TORCH_TILES = 2**30  # bapo_kernels.torch_tiles on a GPU

_8BIT_BLOCK, _8BIT_MIN = 256, 4096  # bitsandbytes: states of smaller tensors stay in 32 bits


def nf4_bytes(elements: int, double_quant: bool = True) -> int:
    """A tensor of NF4 weights: half a byte an element, a scale for each block of 64, and the code book.

    With double quantisation a scale takes a byte, with one in fp32 for each block of 256 scales, a mean and a code
    book of their own. Source: `bitsandbytes.functional.quantize_4bit`.
    """
    blocks = ceil(elements / 64)
    book = 16 * 4
    if not double_quant:
        return ceil(elements / 2) + 4 * blocks + book
    return ceil(elements / 2) + blocks + 4 * ceil(blocks / 256) + 256 * 4 + 4 + book


def int8_bytes(rows: int, columns: int) -> int:
    """A weight [rows, columns] in LLM.int8: a byte an element and a scale in fp32 for each row."""
    return rows * columns + 4 * rows


# states of an optimiser: how many are as large as the parameter, and bytes of their elements; None is the parameter's
# own dtype, which is what torch's optimisers do
_STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "paged_adamw_32bit": (2, 4),
    "adamw_8bit": (2, 1),
    "adamw_bnb_8bit": (2, 1),
    "paged_adamw_8bit": (2, 1),
    "lion_32bit": (1, 4),
    "paged_lion_32bit": (1, 4),
    "lion_8bit": (1, 1),
    "paged_lion_8bit": (1, 1),
    "rmsprop": (1, None),
    "sgd": (0, None),
}


def knows_optimizer(name: str) -> bool:
    """Whether `optimizer_bytes` has the states of this optimiser; others are taken for adamw_torch."""
    return name in _STATES


def optimizer_bytes(name: str, sizes: Iterable[int], itemsize: int) -> int:
    """States of an optimiser.

    Args:
        name: as in the YAML. Paged states are counted in full, though they may move to the host.
        sizes: elements of each trained tensor.
        itemsize: bytes of its elements; torch's optimisers keep states in the parameter's dtype.
    """
    count, width = _STATES.get(name, _STATES["adamw_torch"])
    if width != 1:
        return count * sum(sizes) * (width or itemsize)
    return sum(count * (n + 4 * ceil(n / _8BIT_BLOCK) if n >= _8BIT_MIN else 4 * n) for n in sizes)


def optimizer_step_bytes(name: str, elements: int, itemsize: int) -> int:
    """Temporaries of the optimiser's step: torch's works on all parameters at once, others on one after another."""
    return elements * itemsize if name in ("adamw_torch", "sgd") or not knows_optimizer(name) else 0


def kernel_bytes(tokens: int, width: int, vocabulary: int, backend: str = "auto") -> int:
    """Temporaries of `bapo_kernels.sequence_logprobs`: a slab of logits and the rows' sums, in fp32.

    Args:
        tokens: of responses.
        width: of hidden states.
        vocabulary: columns of the output head.
        backend: "torch" takes tiles instead.
    """
    if backend == "torch":
        return min(_TORCH_TILES, 4 * tokens * vocabulary)
    rows = min(tokens, _MOST_ROWS)
    columns = min(_MOST_COLUMNS, 1 << max(1, vocabulary - 1).bit_length())
    return 4 * min(_SLAB_LOGITS, rows * columns) + 4 * rows * width


def divergence_bytes(tokens: int, width: int, vocabulary: int, backend: str = "auto") -> int:
    """As `kernel_bytes`, of `bapo_kernels.sequence_kl`: slabs of both models."""
    if backend == "torch":
        return min(_TORCH_TILES, 8 * tokens * vocabulary)
    rows = min(tokens, _MOST_ROWS)
    return 2 * kernel_bytes(tokens, width, vocabulary) - 4 * rows * width


def head_gradient_bytes(tokens: int, width: int, vocabulary: int, itemsize: int) -> int:
    """What the backward pass of a head that trains takes besides: tiles of logits and their gradient, and a new [V, H]
    gradient before it is added to the one that is there."""
    return min(_TORCH_TILES, 8 * tokens * vocabulary) + vocabulary * width * itemsize


def context_bytes(peak: int) -> int:
    """What a card holds besides tensors, see the assumptions above.

    Args:
        peak: bytes that come and go in a step.
    """
    return CONTEXT_BYTES + int(FRAGMENTATION * peak)
