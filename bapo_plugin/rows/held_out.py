"""Which rows were held out of a training, so that what is measured afterwards is measured on the same."""

import hashlib

from datasets import Dataset


def prompts_digest(rows: Dataset) -> str | None:
    """Of the prompts of rows, as text, in any order; None where rows don't have them."""
    if "prompt" not in (rows.column_names or []):
        return None
    total = 0
    for part in rows.select_columns(["prompt"]).iter(batch_size=1000):
        for prompt in part["prompt"]:
            own = hashlib.blake2b(str(prompt).encode("utf-8", "surrogatepass"), digest_size=16)
            total += int.from_bytes(own.digest(), "big")
    return f"{total % 2**128:032x}"
