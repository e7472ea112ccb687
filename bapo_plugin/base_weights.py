"""Which model a run was trained on: a digest of the base's weight files, of a sample of each tensor, that takes no time."""

import hashlib
import json
from pathlib import Path

_SAMPLE = 64  # numbers of each tensor


def folder_of(name: str, revision: str | None = None) -> Path | None:
    """Where a model's files lie on this machine; nothing is fetched.

    Args:
        name: folder, or name at the hub.
        revision: of a model at the hub.
    """
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def digest(folder: Path | None) -> str | None:
    """Of shapes and some numbers of all tensors; the same for a copy in bf16 instead of fp32, under other names or in other files.

    Args:
        folder: of a model.

    Returns:
        None where there are no safetensors files that can be read.
    """
    from safetensors import SafetensorError

    try:
        found = {part for path in _files(folder) for part in _parts(path)} if folder else set()
    except (OSError, ValueError, KeyError, SafetensorError):
        return None  # what loads the model says what is wrong with it
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()[:16] if found else None


def must_be(known: str | None, base: str, place: Path | None, run: Path, remedy: str) -> bool:
    """Compare a model with the one that a run was trained on.

    Args:
        known: the digest in the run's record; None where there is none.
        base: name of the model, for messages.
        place: its folder; None where it isn't on this machine.
        run: folder of the run, for messages.
        remedy: a sentence.

    Returns:
        Whether it is known to be the same.

    Raises:
        ValueError: it is another one.
    """
    found = digest(place) if known else None
    if found and found != known:
        raise ValueError(
            f"base model: {base} has other weights (digest {found}, of bf16 or fp32) than the model that {run} was trained on "
            f"(digest {known}). {remedy}"
        )
    return found is not None


def _files(folder: Path) -> list[Path]:
    """The model's own: other files may lie beside them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return sorted(folder / name for name in names)
    return [path for path in [folder / "model.safetensors"] if path.is_file()]


def _parts(path: Path) -> list[bytes]:
    import torch
    from safetensors import safe_open

    found = []
    with safe_open(path, "pt") as file:
        for name in file.keys():
            cut = file.get_slice(name)
            shape = tuple(cut.get_shape())
            if not shape:
                sample = file.get_tensor(name)
            else:  # not the first rows, which are often zero
                middle = tuple(slice(n // 2, n // 2 + 1) for n in shape[:-1])
                sample = cut[(*middle, slice(0, _SAMPLE))]
            if sample.dtype in (torch.float16, torch.float32):
                sample = sample.to(torch.bfloat16)
            raw = sample.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found.append(hashlib.sha256(f"{shape}".encode() + raw).digest())
    return found
