"""What our documents hold: pages, and the blocks of code in them.

A block that can't run in a test has a comment above it that says why, which readers of a page don't see:

    <!-- not run: needs a GPU -->
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "yaml_examples").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
BLOCK = re.compile(
    r"(?:^<!-- not run: ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """`not_run` is the reason why a test can't run it, or empty; `number` counts the blocks of a page."""

    path: Path
    number: int
    language: str
    text: str
    not_run: str

    @property
    def name(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.number}"


BLOCKS = [
    Block(path, i, found[2], found[3], found[1] or "")
    for path in PAGES
    for i, found in enumerate(BLOCK.finditer(path.read_text("utf-8")))
]


def blocks(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def without_blocks(text: str) -> str:
    return BLOCK.sub("", text)
