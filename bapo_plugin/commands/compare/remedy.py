"""The `bapo eval` command that measures two runs on the same things, as far as their files say what those were."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from bapo_plugin.commands.compare.results import Result
from bapo_plugin.report.read import read_settings

SCALES = (0.25, 0.5, 0.75)


def eval_command(
    folders: Sequence[Path],
    results: Sequence[Result],
    scales: Sequence[float] = (),
    pairs: bool = False,
) -> str:
    """One model in memory, both adapters, the same questions; the results go to both folders.

    Args:
        folders: of the two runs or adapters.
        results: what there is of them; everything that one of them was asked is asked again.
        scales: parts of their strength at which they are to be measured too, besides those that were.
        pairs: held-out pairs are wanted, so that some BAPO run's YAML has to be named where none is known.
    """
    words = ["bapo", "eval"]
    # held-out pairs are those of a BAPO run: of a YAML, or of the first folder
    asked = [result.found.asked for result in results]
    config = next((a.config for a in asked if a.config and Path(a.config).is_file()), None)
    is_known = config is not None or any(map(_is_bapo, folders))
    if config or (pairs and not is_known):
        words.append(config or "CONFIG.yml")
    words += map(str, sorted(folders, key=lambda folder: not _is_bapo(folder)))
    if prompts := next((a.prompts for a in asked if a.prompts), None):
        words += ["--prompts", prompts]
        if not prompts.isdigit() and (is_known or pairs):
            words.append("--pairs")
    if names := dict.fromkeys(task for a in asked for task in a.tasks):
        words += ["--tasks", ",".join(names)]
        if data := next((r.found.data for r in results if r.found.data), None):
            words += ["--data", data]
    if prompts or names:  # elsewhere it is the default
        words.append("--probe")
    if limit := next((a.limit for a in asked if a.limit), None):
        words += ["--limit", str(limit)]
    if any(a.chat for a in asked):
        words.append("--chat")
    if asked and (tokens := max(a.max_new_tokens for a in asked)) != 64:
        words += ["--max-new-tokens", str(tokens)]
    if kinds := {a.load_in_4bit for a in asked} - {None}:
        words.append("--load-in-4bit" if True in kinds else "--no-load-in-4bit")
    if scales := {*scales, *(s for r in results for s in r.found.scales.values())}:
        words += ["--scale", ",".join(f"{s:g}" for s in sorted(scales))]
    return shlex.join(words)


def _is_bapo(folder: Path) -> bool:
    try:
        return folder.is_dir() and read_settings(folder, "").method == "bapo"
    except ValueError:
        return False
