"""Device functions of the Triton kernels; `torch_tiles` states the mathematics.

Everything is fp32. exp(-inf) = 0 is relied on, -inf - -inf is avoided: running maxima start at
the finite LOWEST.
"""

import os

import triton
import triton.language as tl

# Read once, like Triton does: its decorators pick interpreter or compiler at import.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LOWEST = tl.constexpr(-1e30)
_TINY = tl.constexpr(1.1754944e-38)


@triton.jit
def cap_logits(z, bias, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """cap(scale * (z + bias)). tanh by exp(-2|x|), which neither overflows nor needs libdevice."""
    z = (z + bias) * scale
    if HAS_SOFTCAP:
        x = z / softcap
        t = tl.exp(-2.0 * tl.abs(x))
        z = softcap * tl.where(x < 0, t - 1.0, 1.0 - t) / (1.0 + t)
    return z


@triton.jit
def cap_slope(z, softcap):
    """d cap(x) / dx in terms of z = cap(x)."""
    return 1.0 - (z / softcap) * (z / softcap)


@triton.jit
def finish(peak, mass, spread, z_label):
    """(logp, q = 1 - p, log-sum-exp, entropy) from the online state over v != label."""
    # V = 1: nothing but the label. Not `maximum`, which would make a number of NaN
    mass = tl.where(mass < _TINY, _TINY, mass)
    log_mass = tl.log(mass)
    others = peak + log_mass
    gap = others - z_label
    x = tl.exp(-tl.abs(gap))
    # log1p(x): for small x, log(1 + x) would round 1 + x to 1 and lose a confident token
    log1p = tl.where(x < 1e-3, x * (1.0 - x * (0.5 - x * (1.0 / 3.0))), tl.log(1.0 + x))
    logp = -(tl.maximum(gap, 0.0) + log1p)
    log_q = -(tl.maximum(-gap, 0.0) + log1p)
    small, large = x / (1.0 + x), 1.0 / (1.0 + x)
    q = tl.where(gap > 0, large, small)
    p = tl.where(gap > 0, small, large)
    # p = 0 and q = 0 meet logs of -inf: 0 * -inf must be 0
    entropy = tl.where(p > 0, -p * logp, 0.0)
    entropy += tl.where(q > 0, q * (log_mass - spread / mass - log_q), 0.0)
    return logp, q, tl.maximum(others, z_label) + log1p, entropy


@triton.jit
def expm1(x):
    """exp(x) - 1 to fp32's precision. The series' next term is below 1e-8 of it where |x| < 0.25."""
    series = 1.0 + x * (1.0 / 5.0) * (1.0 + x * (1.0 / 6.0) * (1.0 + x * (1.0 / 7.0)))
    series = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * (1.0 + x * 0.25 * series)))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


@triton.jit
def scale_row(row, factor, H, BLOCK_H: tl.constexpr):
    """row[:H] *= factor, in memory."""
    for start in range(0, H, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        tl.store(row + at, factor * tl.load(row + at, mask=at < H, other=0.0), mask=at < H)
