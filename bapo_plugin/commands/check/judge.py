"""Which facts deserve a look."""

from bapo_plugin.blocks import GENERAL, UNRELATED
from bapo_plugin.commands.check.facts import Bases, Facts, HeldOut, Repeats
from bapo_plugin.config import BAPOConfig

# a share of base responses that were cut above which a longer limit is worth a thought
MANY_CUT = 0.2


def warn_of_repeats(facts: Facts, repeats: Repeats) -> None:
    """Rows that say the same twice."""
    if n := repeats.rows:
        facts.warn(
            "repeats",
            f"{_rows(n)} {'is' if n == 1 else 'are'} the same as an earlier one (prompt, chosen and rejected); "
            "`dataset_exact_deduplication: true` takes those out that are the same in all",
        )
    if n := repeats.base_is_chosen:
        facts.warn(
            "repeats",
            f"{_rows(n)} {_have(n)} a base response equal to chosen: the model answers so already, and the anchor holds what "
            "the preference raises",
        )
    if n := repeats.base_is_rejected:
        facts.warn(
            "repeats",
            f"{_rows(n)} {_have(n)} a base response equal to rejected: the anchor holds what the preference pushes down; take "
            "other rejected responses where that is not meant",
        )


def warn_of_bases(facts: Facts, bases: Bases, sequence_len: int) -> None:
    """Base responses that hold less of the model than they could."""
    there = bases.in_data + bases.in_store
    if bases.cut > MANY_CUT * there:
        facts.warn(
            "base",
            f"{bases.cut:,} of {there:,} base responses were cut by a limit; raise bapo.anchors.max_new_tokens "
            f"({bases.limit}) or sequence_len ({sequence_len})",
        )
    if n := bases.empty:
        facts.warn(
            "base",
            f"{_rows(n)} {_have(n)} a base response that says nothing; look at them in the file of `bapo anchors "
            f"{facts.config} --output FILE`",
        )


def warn_of_sides(facts: Facts, held: HeldOut, bapo: BAPOConfig) -> None:
    """Nothing is held out, or training has prompts that something else is meant for."""
    if not held.held_out:
        facts.warn(
            "held_out",
            "no rows are held out, so nothing shows whether the taste is learned and what is forgotten on other prompts; "
            "set val_set_size: 0.05, or test_datasets",
        )
    of = f"of {held.train:,} training rows"
    if n := held.kept_in_training:
        facts.warn(
            "keep",
            f"{n:,} {of} {_have(n)} a prompt of bapo.keep.prompts: {bapo.keep.prompts}, whose former answer the anchor holds "
            f"already; {'nothing need be done' if bapo.keep.prompts == GENERAL else 'take them out of the file'}",
        )
    if n := held.watched_in_training:
        facts.warn(
            "keep",
            f"{n:,} {of} {_have(n)} a prompt of bapo.retention.prompts: {bapo.retention.prompts}, so what is measured on it "
            f"says nothing about forgetting; take them out of the {'rows' if bapo.retention.prompts == UNRELATED else 'file'}",
        )


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
