"""What the compiler makes of every kernel on every card, without a GPU: `python -m bapo_kernels.inspect`.

One row a kernel, variant and architecture: registers a thread, bytes spilled, shared memory a
block, and wide memory instructions. tests/kernels/test_compiled.py
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

from bapo_kernels import triton_divergence, triton_slabs

ARCHITECTURES = {
    80: "A100",
    86: "RTX 30",
    89: "RTX 40",
    90: "H100",
    100: "B200",
    120: "RTX 50",
}
# Most shared memory a block may ask for, bytes; consumer cards have 99 KB.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

_POINTERS = {
    "labels": "*i64",
    **dict.fromkeys(
        "logits reference bias lse reference_lse sums state logps logsumexp entropy token_kl size".split(),
        "*fp32",
    ),
}
# V (32,003) and rows need not be multiples of 16; H is one in every model we know of. need_grad isn't specialised.
_RAGGED = {"V", "stride_state", "need_grad"}
_OFF = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "NEED_ENTROPY": False}
_ON = dict.fromkeys(_OFF, True)


class Variant(NamedTuple):
    """One specialisation of one kernel, as the package launches it."""

    kernel: str
    dtype: str
    options: str
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
    loads_128: int
    stores_wide: int


def variants() -> list[Variant]:
    """Every kernel with its options all off and all on, in each dtype that it ships for."""
    found = []
    for options, flags in (("plain", _OFF), ("bias+softcap+entropy", _ON)):
        # fp16 differs from bf16 in one conversion: once is enough
        for dtype in ("bf16", "fp16", "fp32") if options == "plain" else ("bf16", "fp32"):
            constants = {**flags, "BLOCK_H": triton_slabs.BLOCK_H}
            most = triton_slabs.MAX_COLUMNS_WITH_OPTIONS
            for block in (8192, most if flags["HAS_SOFTCAP"] else triton_slabs.MAX_COLUMNS):
                each = {**constants, "BLOCK": block}
                warps = {"num_warps": triton_slabs.num_warps(block)}
                text = f"{options}, {block}"
                found.append(Variant("slab", dtype, text, triton_slabs.slab_kernel, each, warps))
            closing = {
                **constants,
                "NEED_GRAD": True,
                "stride_width": 1,
            }  # a launch makes 1 constant
            del closing["HAS_BIAS"]
            found.append(Variant("close", dtype, options, triton_slabs.close_kernel, closing, {}))
            del constants["NEED_ENTROPY"]
            block = triton_divergence.MAX_COLUMNS
            each = {**constants, "BLOCK": block}
            warps = {"num_warps": triton_slabs.num_warps(block)}
            found.append(Variant("kl", dtype, options, triton_divergence.kl_kernel, each, warps))
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
        elif name in ("weight", "grad", "unit"):
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
    heads = ("card", "kernel", "dtype", "options", "regs", "spill", "shared", "LD128", "STG")
    line = "{:14} {:10} {:5} {:31} {:>5} {:>5} {:>7} {:>5} {:>5}"
    print(line.format(*heads))
    for architecture in chosen:
        for variant in variants():
            row = measure(variant, architecture)
            card = f"sm_{architecture} {ARCHITECTURES[architecture]}"
            print(line.format(card, *row[1:]), flush=True)


if __name__ == "__main__":
    main()
