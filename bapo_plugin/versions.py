"""Which versions of other packages were tested, and what is said where others are here. Light: it imports nothing of them."""

import re
from importlib.metadata import PackageNotFoundError, version

from bapo_plugin import AXOLOTL, __version__

_BOUNDS = [tuple(map(int, found)) for found in re.findall(r"(\d+)\.(\d+)", AXOLOTL)]
#: package -> first and last (major, minor) that the tests run with; a test holds them to the locks in .ci/. axolotl pins the
#: others, so that they only differ where somebody has forced them
TESTED = {
    "axolotl": (_BOUNDS[0], (_BOUNDS[1][0], _BOUNDS[1][1] - 1)),
    "transformers": ((5, 16), (5, 20)),
    "trl": ((1, 9), (1, 14)),
    "peft": ((0, 20), (0, 21)),
    "accelerate": ((1, 13), (1, 15)),
    "datasets": ((4, 8), (5, 0)),
    "bitsandbytes": ((0, 50), (0, 50)),
}
REMEDY = f'pip install "axolotl{AXOLOTL}" brings what was tested'


def found(package: str) -> str | None:
    """The version that is installed, if one is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def too_old() -> str | None:
    """What is to be said of an axolotl that is older than what works; None where all is well, or there is none."""
    axolotl = found("axolotl")
    if axolotl is None or numbers(axolotl) >= TESTED["axolotl"][0]:
        return None
    return f"axolotl {axolotl} is too old for axolotl-plugin-bapo {__version__}, which needs axolotl{AXOLOTL}: {REMEDY}"


def refuse_older() -> None:
    """
    Raises:
        ValueError: see `too_old`.
    """
    if said := too_old():
        from bapo_plugin import last_word

        last_word.install()  # the message, not axolotl's traceback
        raise ValueError(said)


def untested() -> str | None:
    """One line that names all packages outside the tested versions; None where there is none."""
    others = []
    for package, (first, last) in TESTED.items():
        here = found(package)
        if here is not None and not first <= numbers(here) <= last:
            others.append(f"{package} {here} (tested: {_span(first, last)})")
    if not others:
        return None
    return f"axolotl-plugin-bapo {__version__} was not tested with {', '.join(others)}; if something fails, {REMEDY}"


def numbers(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as "0.22.0.dev1"."""
    major, minor = [*re.findall(r"\d+", text), "0", "0"][:2]
    return int(major), int(minor)


def _span(first: tuple[int, int], last: tuple[int, int]) -> str:
    texts = [f"{major}.{minor}" for major, minor in (first, last)]
    return texts[0] if first == last else " to ".join(texts)
