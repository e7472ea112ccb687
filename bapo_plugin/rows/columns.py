"""Names of a row's columns."""

RESPONSES = ("chosen", "rejected", "base")
TEXTS = ("prompt", *RESPONSES)
IDS = tuple(f"{name}_ids" for name in TEXTS)
