"""How often something was tried, and what failed."""

import os
import traceback
from collections import Counter

SEED = int(os.environ.get("BAPO_FUZZ_SEED", "1"))
# cases; without it as many as fit into `make test`
COUNT = int(os.environ.get("BAPO_FUZZ", "0"))
# of which only these, to see a failure again
CASES = set(map(int, filter(None, os.environ.get("BAPO_FUZZ_CASES", "").split(","))))


class Ledger:
    """Counts, and keeps failures with what it takes to see them again."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.failures: list[str] = []

    def fail(self, kind: str, number: int, done: object, text: object) -> None:
        self.counts[kind] += 1
        if isinstance(text, BaseException):
            text = "".join(traceback.format_exception(text))[-1500:]
        self.failures.append(f"{kind}: case {number} of seed {SEED}: {done}\n    {text!s:.1500}")

    def settle(self, what: str) -> None:
        """Print the counts; with failures, fail."""
        tried = ", ".join(f"{n:,} {name}" for name, n in sorted(self.counts.items()))
        print(f"\n{what}, seed {SEED}: {tried}")
        shown = "\n".join(self.failures[:20])
        assert not self.failures, f"{len(self.failures)} failures\n{shown}"
