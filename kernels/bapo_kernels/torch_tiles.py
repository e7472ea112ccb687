"""The torch path: a block of rows against one slice of the vocabulary at a time.

Write y for a row's label, q = 1 - p_y for the probability of everything else, and let the
online (max, sum) pair run over v != y only. With L = log sum_{v != y} exp(z_v) and d = L - z_y,

    logp   = -softplus(d)                    q = sigmoid(d)
    d logp / d h = size * unit,              size = logit_scale * q
    unit   = c_y W_y - sum_{v != y} r_v c_v W_v,   r_v = exp(z_v - L)
    c_v    = 1 - (z_v / softcap)^2           (1 without a soft cap)

Leaving the label out is what keeps a confident token's gradient: as p_y -> 1 nothing is
subtracted from anything near 1, so q and the bracket keep all their digits. The textbook form,
onehot - p, loses them to rounding once q is near the precision of p. `unit` is of order 1 and may be
rounded to 16 bits; `size` stays wide until backward has multiplied it by the loss's own factor, which a
loss scaler may have made large: fp16 can't hold a q below 6e-8.

Both sums over v are online, so a slice of W is read (and, for bf16 on a CPU, widened to fp32)
once per block of rows, the tile of logits stays in the cache, and no row of logits is ever whole.
"""

import math

import torch
from torch import Tensor

from bapo_kernels.reference import compute_dtype

# Enough rows that reading and widening W costs nothing beside 2 * rows * V * H FLOPs.
_MAX_ROWS = 2048
_MIN_COLUMNS = 256
# Enough of the vocabulary at a time; more would only take memory where there are few rows.
_MAX_COLUMNS = 4096
# A GEMM into rows that aren't a multiple of 16 columns long takes 1.4 times as long on a CPU.
_COLUMN_MULTIPLE = 64
# Bytes of one tile of logits with its temporaries. On a CPU smaller tiles stay in the cache (3 MiB
# was up to 10% faster on an idle machine), but every operation on a tile ends at a thread barrier:
# with the cores shared they made it 2 to 10 times slower. On a GPU a tile has to fill the device.
_DEFAULT_TILE_BYTES = {"cpu": 24 << 20}
_DEFAULT_TILE_BYTES_ACCELERATOR = 256 << 20
# A running maximum needs a finite start: exp(-inf - -inf) is NaN.
_LOWEST = -1e30


def has_mixed_gemm(tensor: Tensor) -> bool:
    """Whether this device multiplies 16-bit matrices into an fp32 result by itself."""
    if not tensor.is_cuda or torch.version.cuda is None or tensor.dtype.itemsize != 2:
        return False
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return tensor.dtype == torch.float16 or major >= 8


def operand(tensor: Tensor) -> Tensor:
    """What a GEMM of ours takes: as stored where an fp32 result can be asked for, else widened."""
    return tensor if has_mixed_gemm(tensor) else tensor.to(compute_dtype(tensor.dtype))


def mm_wide(a: Tensor, b: Tensor, buffer: Tensor | None = None) -> Tensor:
    """a @ b, accumulated *and returned* in fp32 (fp64 for fp64), in the flat buffer if given."""
    if has_mixed_gemm(b):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    if buffer is None:
        return torch.mm(a, b)
    rows, columns = a.shape[0], b.shape[1]
    return torch.mm(a, b, out=buffer[: rows * columns].view(rows, columns))


def has_fast_bf16_gemm(tensor: Tensor) -> bool:
    """Whether this CPU multiplies bf16 by itself (AVX512-BF16, AMX, Arm's BF16), at twice fp32's rate.

    Its results come back in bf16, so logits can't be made this way; a gradient, which is rounded
    to bf16 in the end, can.
    """
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def tile_buffer(rows: list[slice], columns: list[slice], like: Tensor) -> Tensor | None:
    """Memory that every tile reuses: fresh pages for each would cost a CPU more than its exp."""
    if not rows or has_mixed_gemm(like):
        return None  # CUDA's allocator reuses memory by itself
    return like.new_empty(rows[0].stop * columns[0].stop, dtype=compute_dtype(like.dtype))


def even_blocks(total: int, largest: int, multiple: int = 1) -> list[slice]:
    """Slices that cover range(total), equal but for the last, each at most `largest` long."""
    if total == 0:
        return []
    size = math.ceil(total / math.ceil(total / largest))
    size = math.ceil(size / multiple) * multiple
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def tile_plan(
    hidden: Tensor, weight: Tensor, tile_bytes: int, buffers: float
) -> tuple[list[slice], list[slice]]:
    """Row blocks and vocabulary slices whose temporaries, `buffers` tiles of logits, fit `tile_bytes`."""
    widest = weight.shape[0]
    if tile_bytes <= 0:
        widest = _MAX_COLUMNS if hidden.device.type == "cpu" else widest
        tile_bytes = _DEFAULT_TILE_BYTES.get(hidden.device.type, _DEFAULT_TILE_BYTES_ACCELERATOR)
    rows = even_blocks(hidden.shape[0], _MAX_ROWS)
    width = compute_dtype(hidden.dtype).itemsize
    per_column = math.ceil(width * buffers) * (rows[0].stop if rows else 1)
    if not has_mixed_gemm(weight) and weight.dtype.itemsize < width:
        per_column += width * weight.shape[1]  # the widened slice of W
    columns = max(_MIN_COLUMNS, tile_bytes // per_column // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE)
    return rows, even_blocks(weight.shape[0], min(columns, widest), _COLUMN_MULTIPLE)


def logits_tile(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    buffer: Tensor | None,
) -> Tensor:
    """[rows, slice] logits in fp32 or fp64; h and w are GEMM operands."""
    z = mm_wide(h, w.t(), buffer)
    if bias is not None:
        z += bias
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def set_label_column_(tile: Tensor, column: Tensor, value: Tensor | float) -> None:
    """tile[i, column[i]] = value[i] for rows whose column is in the tile; no device sync."""
    inside = (column >= 0) & (column < tile.shape[1])
    column = column.clamp(0, tile.shape[1] - 1).unsqueeze(1)
    old = tile.gather(1, column).squeeze(1)
    new = torch.where(inside, value, old)
    tile.scatter_(1, column, new.unsqueeze(1))


def softcap_slope_(z: Tensor, softcap: float) -> Tensor:
    """d cap(z) / dz in terms of the capped logit, in place."""
    return z.div_(softcap).square_().neg_().add_(1.0)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    need_unit: bool,
    need_entropy: bool,
    tile_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(token_logps [T], logsumexp [T], entropy [T] or [0], unit [T, H] or [0, H], size [T] or [0]).

    d logp_t / d h_t is size_t * unit_t. `unit` is in hidden's dtype, the others are fp32 (fp64 for
    fp64 inputs).
    """
    dtype = compute_dtype(hidden.dtype)
    total, width = hidden.shape
    logps = hidden.new_empty(total, dtype=dtype)
    logsumexp = hidden.new_empty(total, dtype=dtype)
    entropy = hidden.new_empty(total if need_entropy else 0, dtype=dtype)
    unit = hidden.new_empty(total if need_unit else 0, width)
    size = hidden.new_empty(total if need_unit else 0, dtype=dtype)
    bias = None if bias is None else bias.to(dtype)

    fast_bf16 = need_unit and has_fast_bf16_gemm(weight)
    buffers = 1 + (softcap is not None) + need_entropy + 0.5 * fast_bf16
    rows, columns = tile_plan(hidden, weight, tile_bytes, buffers)
    buffer = tile_buffer(rows, columns, weight)
    low_buffer = weight.new_empty(buffer.shape) if fast_bf16 and rows else None
    for block in rows:
        h, y = operand(hidden[block]), labels[block]
        w_y = weight.index_select(0, y).to(dtype)
        z_y = label_logits(hidden[block], w_y, bias, y, scale, softcap)
        peak = torch.full_like(z_y, _LOWEST)
        mass = torch.zeros_like(z_y)
        spread = torch.zeros_like(z_y)  # sum of e * log e, for the entropy
        mean_w = torch.zeros_like(w_y) if need_unit else None

        for piece in columns:
            w = operand(weight[piece])
            z = logits_tile(h, w, None if bias is None else bias[piece], scale, softcap, buffer)
            slope = None
            if need_unit and softcap is not None:
                slope = softcap_slope_(z.clone(), softcap)
            set_label_column_(z, y - piece.start, -math.inf)

            new_peak = torch.maximum(peak, z.amax(1))
            shrink = torch.exp(peak - new_peak)
            e = z.sub_(new_peak.unsqueeze(1)).exp_()
            if need_entropy:
                spread = shrink * (spread + (peak - new_peak) * mass)
                spread -= torch.special.entr(e).sum(1)
            mass = mass * shrink + e.sum(1)
            peak = new_peak
            if mean_w is not None:
                mean_w *= shrink.unsqueeze(1)
                e = e if slope is None else e.mul_(slope)
                if has_mixed_gemm(w):
                    mean_w += mm_wide(e, w)
                elif low_buffer is not None:
                    mean_w += torch.mm(low_buffer[: e.numel()].view_as(e).copy_(e), weight[piece])
                else:
                    mean_w.addmm_(e, w)
            del w, z, e, slope  # before the next tile is made, not after

        others = peak + mass.log()
        gap = others - z_y
        logps[block] = -torch.logaddexp(gap, torch.zeros_like(gap))  # -softplus, exact in fp64 too
        logsumexp[block] = torch.logaddexp(others, z_y)
        mass = mass.clamp_min(torch.finfo(dtype).tiny)  # V = 1: nothing but the label
        q = torch.sigmoid(gap)
        if need_entropy:
            inner = mass.log() - spread / mass  # entropy given that it isn't the label
            entr = torch.special.entr
            entropy[block] = entr(torch.sigmoid(-gap)) + entr(q) + q * inner
        if mean_w is not None:
            mean_w.div_(mass.unsqueeze(1))
            if softcap is not None:
                w_y *= softcap_slope_(z_y, softcap).unsqueeze(1)
            unit[block] = w_y.sub_(mean_w)
            size[block] = q * scale
    return logps, logsumexp, entropy, unit, size


def label_logits(
    hidden: Tensor,
    w_y: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """[rows] logit of each row's own label, by a dot product rather than a search in the tiles."""
    z = torch.linalg.vecdot(hidden.to(w_y.dtype), w_y)
    if bias is not None:
        z += bias.index_select(0, labels)
    z *= scale
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)
