"""What the compiler makes of every kernel on every card, without a GPU: `python -m bapo_kernels.inspect`.

One row a kernel, variant and architecture: registers a thread, bytes spilled, shared memory a
block, tensor-core instructions and 16-byte memory instructions. tests/kernels/test_compiled.py
holds the rows to their limits.
"""

import argparse
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bapo_kernels import triton_forward, triton_rows

ARCHITECTURES = {80: "A100", 86: "RTX 30", 89: "RTX 40", 90: "H100", 120: "RTX 50"}
# Most shared memory a block may ask for, bytes; consumer cards have 99 KB.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}

_POINTERS = {
    "labels": "*i64",
    **dict.fromkeys(
        "logits bias logps logsumexp entropy row_scale peaks masses spreads label_logits".split(),
        "*fp32",
    ),
}
# Sizes that need not be multiples of 16: ragged T and V (32,003), few splits. H is one in every
# model we know of; strides are, because H is and rows of logits are padded.
_RAGGED = {"T", "V", "splits", "tiles_per_split"}
_OFF = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "NEED_ENTROPY": False}
_ON = dict.fromkeys(_OFF, True)


class Variant(NamedTuple):
    """One specialisation of one kernel, as the package launches it."""

    kernel: str
    dtype: str
    options: str
    gemm: bool
    function: object
    constants: dict
    launch: dict


class Row(NamedTuple):
    """What the compiler made of a variant. All memory in bytes, instructions as counted in SASS."""

    architecture: int
    kernel: str
    dtype: str
    options: str
    registers: int
    spilled: int
    shared: int
    tensor_core: int
    loads_128: int
    stores_wide: int


def variants(architecture: int) -> list[Variant]:
    """Every kernel with its options all off and all on, in each dtype that it ships for."""
    config = triton_forward.config_for((architecture // 10, architecture % 10))
    tile = {k: v for k, v in config.items() if k.startswith("BLOCK")}
    launch = {k: v for k, v in config.items() if k.startswith("num")}
    found = []
    for options, flags in (("plain", _OFF), ("bias+softcap+entropy", _ON)):
        # fp16 differs from bf16 in one conversion: once is enough
        low = ("bf16", "fp16") if options == "plain" else ("bf16",)
        for dtype in (*low, "fp32"):
            for need_grad in (True, False):
                if need_grad or dtype == "fp32":  # without a gradient the dtype plays no part
                    constants = {**flags, "NEED_GRAD": need_grad, "BLOCK": triton_rows.BLOCK}
                    name = "rows+grad" if need_grad else "rows"
                    warps = {"num_warps": triton_rows.NUM_WARPS}
                    found.append(
                        Variant(
                            name, dtype, options, False, triton_rows.row_kernel, constants, warps
                        )
                    )
        for dtype in low:
            for even in (True, False):
                constants = {**flags, "EVEN_K": even, "WIDEN": False, **tile}
                label = options if even else options + ", H % 64"
                found.append(
                    Variant(
                        "forward",
                        dtype,
                        label,
                        True,
                        triton_forward.forward_kernel,
                        constants,
                        launch,
                    )
                )
        constants = {
            "NEED_ENTROPY": flags["NEED_ENTROPY"],
            "BLOCK": triton_forward.MERGE_BLOCK,
        }
        found.append(
            Variant("merge", "fp32", options, False, triton_forward.merge_kernel, constants, {})
        )
    return found


def compile_variant(variant: Variant, architecture: int):
    """Ahead-of-time compilation with the specialisation that a launch on aligned tensors gets."""
    names = variant.function.arg_names
    signature, aligned = {}, []
    for i, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in _POINTERS:
            signature[name] = _POINTERS[name]
        elif name in ("hidden", "weight", "grad"):
            signature[name] = "*" + variant.dtype
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
        if signature[name] not in ("constexpr", "fp32") and name not in _RAGGED:
            aligned.append(i)
    source = ASTSource(
        fn=variant.function,
        signature=signature,
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=dict(variant.launch))


def measure(variant: Variant, architecture: int) -> Row:
    compiled = compile_variant(variant, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spilled = sum(int(re.search(rf"{part}:(\d+)", usage)[1]) for part in ("STACK", "LOCAL"))
    return Row(
        architecture,
        variant.kernel,
        variant.dtype,
        variant.options,
        registers,
        spilled,
        compiled.metadata.shared,
        len(re.findall(r"\b(?:HMMA|HGMMA)\b", sass)),
        len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*128", sass)),
        len(re.findall(r"\bSTG\.\S*(?:64|128)", sass)),
    )


def _cuobjdump(flag: str, path: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(ARCHITECTURES))
    chosen = parser.parse_args().arch or sorted(ARCHITECTURES)
    heads = ("card", "kernel", "dtype", "options", "regs", "spill", "shared", "MMA", "LD128", "STG")
    line = "{:14} {:10} {:5} {:31} {:>5} {:>5} {:>7} {:>5} {:>5} {:>5}"
    print(line.format(*heads))
    for architecture in chosen:
        for variant in variants(architecture):
            row = measure(variant, architecture)
            card = f"sm_{architecture} {ARCHITECTURES[architecture]}"
            print(line.format(card, *row[1:]), flush=True)


if __name__ == "__main__":
    main()
