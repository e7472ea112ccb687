"""What `bapo doctor` does: one screen that says what this machine has and what will be used."""

import os
import platform
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from bapo_plugin import __version__, versions

_PACKAGES = ("axolotl", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
_OPTIONAL = {
    "bitsandbytes": "4-bit and 8-bit weights, 8-bit optimisers",
    "triton": "the log-prob kernels on a GPU",
    "deepspeed": "ZeRO-1 to 3",
    "lm_eval": "`bapo eval --tasks`",
    "matplotlib": "`bapo report`",
}
_SETTINGS = ("HF_HUB_OFFLINE", "HF_HOME", "CUDA_VISIBLE_DEVICES", "AXOLOTL_DO_NOT_TRACK")


def diagnose() -> dict[str, Any]:
    """Facts by section, as plain values: {"versions", "optional", "devices", "used", "settings", "problems"}."""
    import torch

    from bapo_kernels.chunked import triton_missing

    problems: list[str] = []
    here = {"axolotl-plugin-bapo": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        here[name] = versions.found(name) or "missing"
        if here[name] == "missing":
            problems.append(f"{name} is missing: pip install axolotl-plugin-bapo brings it")
    if said := versions.too_old() or versions.untested():
        problems += [said, *_moved()]
    optional = {
        name: versions.found(name) or f"missing, needed for {use}"
        for name, use in _OPTIONAL.items()
    }
    cuda = torch.cuda.is_available()
    devices = [
        _device(torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)[0])
        for i in range(torch.cuda.device_count() if cuda else 0)
    ]
    if torch.version.cuda and not cuda:
        problems.append(
            f"torch was built for CUDA {torch.version.cuda}, but no GPU is found: a driver is missing or too old, or "
            "CUDA_VISIBLE_DEVICES hides them"
        )
    refused = [
        triton_missing(torch.empty(0, device=f"cuda:{i}", dtype=torch.float16))
        for i in range(torch.cuda.device_count() if cuda else 0)
    ]
    problems += [
        f"device {i}: log-probs take the slower torch path: {reason}"
        for i, reason in enumerate(refused)
        if reason
    ]
    return {
        "versions": here,
        "optional": optional,
        "devices": devices or [f"CPU, {os.cpu_count()} cores, {platform.machine()}"],
        "used": {
            "log-prob kernel": "triton" if refused and not any(refused) else "torch",
            "attention over packed rows": _attention(cuda),
            "16 bits": _half(cuda),
        },
        "settings": {name: os.environ.get(name, "not set") for name in _SETTINGS},
        "problems": problems,
    }


def show(found: dict[str, Any]) -> None:
    """Print what `diagnose` found."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in ("versions", "optional", "used", "settings"):
        for name, value in found[section].items():
            table.add_row(name, value)
        table.add_section()
    for i, device in enumerate(found["devices"]):
        table.add_row(f"device {i}", device)
    table.add_row("platform", f"{platform.platform()}, {sys.executable}")
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    for problem in found["problems"]:
        console.print(f"! {problem}")
    console.print("Nothing is missing." if not found["problems"] else "", end="\n")


def _moved() -> list[str]:
    """What other versions of others have no more, of all that we need of them."""
    try:
        from bapo_plugin import compat

        compat.refuse_moved()
    except (ImportError, ValueError) as error:
        return str(error).splitlines()
    return []


def _device(properties: Any, free: int) -> str:
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB ({free / 2**30:.1f} free), compute capability "
        f"{properties.major}.{properties.minor}"
    )


def _attention(cuda: bool) -> str:
    import torch

    from bapo_plugin.scoring.shared_prefix import VARLEN

    if VARLEN is None:
        return f"one sdpa call a segment (flash attention needs torch 2.10, this is {torch.__version__})"
    if not cuda or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        return "one sdpa call a segment (flash attention needs an NVIDIA GPU of compute capability 8.0)"
    return "flash attention of variable length, in 16 bits"


def _half(cuda: bool) -> str:
    import torch

    if not cuda:
        return "bf16 is emulated on many CPUs: set bf16: false there"
    return (
        "bf16"
        if torch.cuda.is_bf16_supported(including_emulation=False)
        else "fp16 (this GPU has no bf16)"
    )
