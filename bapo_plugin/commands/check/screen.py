"""Facts on a screen: what matters first, then the details."""

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bapo_plugin.commands.check.facts import DataSet, Facts, Group, Lengths, Part, ShownRow

_SHOWN = 5  # groups of rows
# characters of a part; more of it is in --json
_LONG = 1600
_STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "red", "base": "yellow"}
_END = "bold magenta"


def show(facts: Facts) -> None:
    """Print facts, in colour where stdout is a terminal."""
    console = Console(markup=False, highlight=False, emoji=False)
    bar = "█" if (console.encoding or "").startswith("utf") else "#"
    console.print(Text(f"bapo check {facts.config}", style="bold"))
    console.print()
    summary = _grid(17)
    for name, text in _summary(facts):
        summary.add_row(Text(name, style="bold"), text)
    if summary.row_count:
        console.print(summary)
        console.print()
    notes = _grid(9)
    for text in facts.errors:
        notes.add_row(Text("error", style="bold red"), text)
    for warned in facts.warnings:
        notes.add_row(Text("warning", style="bold yellow"), warned.text)
    for text in facts.remarks:
        notes.add_row(Text("remark", style="bold blue"), text)
    if notes.row_count:
        console.print(notes)
    else:
        console.print(Text("Nothing to remark.", style="green"))
    for data in facts.data_sets:
        _show_data(console, data)
    if facts.bases and facts.bases.reasons:
        _headline(console, "Base responses to be made, and why")
        grid = _grid(10)
        for reason, rows in facts.bases.reasons:
            grid.add_row(_n(rows, "row"), reason)
        console.print(grid)
    if facts.lengths:
        _show_lengths(console, facts.lengths, bar)
    if facts.shown:
        console.print()
        console.print(Text("What the model sees", style="bold underline"))
        legend = Text("decoded from the tokens that training takes; ")
        legend.append("⟦end of turn⟧", style=_END)
        legend.append(", ↵ a new line, · a space at an edge")
        console.print(legend, style="dim")
    for row in facts.shown:
        _show_row(console, row)
    if facts.sharing and not facts.sharing.refused and facts.sharing.wanted != "off":
        console.print()
        console.print(
            Text(
                "The check of the shared prefix on the loaded model comes when training starts.",
                style="dim",
            )
        )


# ---------------------------------------------------------------- what matters


def _summary(facts: Facts) -> Iterator[tuple[str, str]]:
    settings = facts.settings
    if settings:
        bits = " in 4 bits" if settings.get("load_in_4bit") else ""
        adapter = settings.get("adapter")
        yield (
            "configuration",
            f"rl: bapo on {settings['base_model']}{bits}, {'adapter ' + adapter if adapter else 'no adapter'}; "
            f"anchor_weight {settings['bapo.anchor_weight']}, anchor_loss {settings['bapo.anchor_loss']}, rl_beta "
            f"{settings['rl_beta']:g}",
        )
    if facts.data_sets:
        total = sum(data.rows for data in facts.data_sets)
        refused = sum(group.rows for data in facts.data_sets for group in data.refused)
        odd = sum(data.odd_rows for data in facts.data_sets)
        n = len(facts.data_sets)
        yield (
            "rows",
            f"{total:,} in {_n(n, 'data set')}: {sum(data.usable for data in facts.data_sets):,} usable, "
            f"{refused:,} can't be used, {odd:,} odd",
        )
    if (lengths := facts.lengths) is not None:
        yield (
            "tokens",
            f"median {lengths.median:,}, longest {lengths.longest:,} of sequence_len {lengths.sequence_len:,}: "
            f"{_touched(lengths, lengths.policy)} (excess_length_strategy: {lengths.policy})",
        )
    if (repeats := facts.repeats) is not None:
        yield (
            "repeats",
            f"{_n(repeats.rows, 'identical row')}, {_n(repeats.prompts, 'row')} with the prompt of an earlier one; "
            f"base = chosen {repeats.base_is_chosen:,}, base = rejected {repeats.base_is_rejected:,}, chosen = rejected "
            f"{repeats.chosen_is_rejected:,}",
        )
    if facts.bases is not None:
        yield "base responses", _bases_in_words(facts)
    if (held := facts.held_out) is not None:
        text = f"{_n(held.train, 'row')} to train on, {held.held_out:,} held out"
        if held.by:
            text += f" ({held.by}), {held.overlap:,} of them with a prompt that is in training too"
        for name, count in (
            ("bapo.keep", held.kept_in_training),
            ("bapo.retention", held.watched_in_training),
        ):
            if count is not None:
                text += f"; {_n(count, 'training row')} with a prompt of {name}"
        yield "both sides", text
    if (sharing := facts.sharing) is not None:
        least = "at least " if sharing.at_least else ""
        saved = f"{least}{sharing.saved:.0%} of the tokens of separate rows"
        if sharing.wanted == "off":
            text = f"not shared (bapo.shared_prefix: off), which would save {saved}"
        elif sharing.refused:
            text = f"not shared: {sharing.refused}; it would save {saved}"
        else:
            text = f"shared by its three responses as far as the config tells, which saves {saved}"
        yield "prompt", text
    if (steps := facts.steps) is not None:
        yield (
            "steps",
            f"{steps.per_epoch:,} an epoch of {_n(steps.rows_a_step, 'row')} each, {steps.total:,} in all (epochs: {steps.epochs:g})",
        )


def _bases_in_words(facts: Facts) -> str:
    bases = facts.bases
    parts = [f"{bases.in_data:,} in the data, {bases.in_store:,} made before"]
    if bases.cut:
        there = bases.in_data + bases.in_store
        parts[-1] += f" ({bases.cut / there:.0%} of these cut by a limit)"
    if bases.no_room:
        parts.append(f"none for {_n(bases.no_room, 'row')}, whose prompt fills sequence_len")
    if bases.kept_prompts:
        parts.append(
            f"{bases.kept_to_make:,} of {_n(bases.kept_prompts, 'prompt')} of bapo.keep to be answered"
        )
    if bases.requests:
        parts.append(
            f"to be made for {_n(bases.to_make, 'row')}: {_n(bases.requests, 'prompt')}, at most {bases.most_tokens:,} tokens, by "
            f"`bapo anchors {facts.config}` or when training starts"
        )
    return "; ".join(parts)


def _touched(lengths: Lengths, policy: str) -> str:
    if not lengths.over:
        return "all fit"
    left_out = lengths.over - lengths.mendable
    if policy == "truncate":
        return f"{lengths.mendable:,} cut, {left_out:,} left out"
    return (
        f"{lengths.over:,} left out" if policy == "drop" else f"stops at {_n(lengths.over, 'row')}"
    )


# ---------------------------------------------------------------- details


def _show_data(console: Console, data: DataSet) -> None:
    _headline(console, data.name)
    grid = _grid(10)
    grid.add_row("type", data.type)
    grid.add_row("rows", f"{data.rows:,}, {data.usable:,} usable")
    grid.add_row("columns", ", ".join(data.columns))
    for part, place in data.mapping.items():
        grid.add_row(part, Text(f"<- {place}", style=_STYLES.get(part, "")))
    for name, groups in (("refused", data.refused), ("odd", data.odd)):
        for text in _groups_in_words(groups):
            grid.add_row(name, text)
            name = ""
    console.print(grid)


def _groups_in_words(groups: list[Group]) -> Iterator[str]:
    for group in groups[:_SHOWN]:
        numbers = ", ".join(map(str, group.first)) + (
            "..." if group.rows > len(group.first) else ""
        )
        yield f"{group.rows:,} ({'row' if group.rows == 1 else 'rows'} {numbers}): {group.text}"
    if len(groups) > _SHOWN:
        rest = sum(group.rows for group in groups[_SHOWN:])
        yield f"{rest:,} for {len(groups) - _SHOWN:,} other reasons, in --json"


def _show_lengths(console: Console, lengths: Lengths, bar: str) -> None:
    _headline(console, "Tokens of prompt and longest response")
    most = max(count for _, _, count in lengths.bins)
    width = len(f"{lengths.bins[-1][1]:,}")
    digits = len(f"{most:,}")
    room = max(10, min(50, console.width - 2 * width - digits - 12))
    for low, high, count in lengths.bins:
        over = low > lengths.sequence_len
        line = Text(f"  {low:>{width},} to {high:>{width},}  {count:>{digits},} ")
        length = round(count / most * room)
        line.append(bar * max(length, int(count > 0)), style="red" if over else "blue")
        if over:
            line.append(f" above sequence_len {lengths.sequence_len:,}", style="dim")
        console.print(line)
    if lengths.open:
        console.print(
            f"  {_n(lengths.open, 'row')} still without base response, which may go up to sequence_len",
            style="dim",
        )
    told = ", ".join(
        f"{policy}: {_touched(lengths, policy)}" for policy in ("drop", "truncate", "raise")
    )
    if lengths.over:
        console.print(f"  {_n(lengths.over, 'row')} above sequence_len. {told}")


def _show_row(console: Console, row: ShownRow) -> None:
    what = {"long": ", too long", "cut": ", cut to sequence_len"}.get(row.length, "")
    _headline(console, f"row {row.row} of {row.data_set}{what}")
    grid = _grid(10)
    for name in ("prompt", "chosen", "rejected", "base"):
        part: Part | None = getattr(row, name)
        style = _STYLES[name]
        source = {"store": " made before", "data": ""}.get(row.base_from, "")
        label = Text(name + (source if name == "base" else ""), style=f"bold {style}")
        if part is None:
            grid.add_row(label, Text(row.base_from, style="dim"))
            continue
        label.append(f"\n{part.tokens:,} tokens", style="not bold dim")
        grid.add_row(label, _spelled(part, style, is_response=name != "prompt"))
    console.print(grid)


def _spelled(part: Part, style: str, is_response: bool) -> Text:
    """The text with everything in it visible."""
    body = part.text.removesuffix(part.end)
    first = len(body) - len(body.lstrip(" "))
    last = len(body.rstrip(" "))
    marked = {i for start, stop in part.special for i in range(start, stop)}
    left_out = range(_LONG * 2 // 3, len(body) - _LONG // 3)
    letters: list[tuple[str, str]] = []  # text and its style
    for i, letter in enumerate(body):
        if i in left_out:
            if i == left_out.start:
                letters.append((f" [... {len(left_out):,} characters, in --json ...] ", "dim"))
        elif letter == "\n":
            letters.append(("↵" if i == len(body) - 1 and not part.end else "↵\n", "dim"))
        elif letter == " " and (i < first or i >= last):
            letters.append(("·", "dim"))
        elif not letter.isprintable():
            letters.append((repr(letter)[1:-1], "dim"))
        else:
            letters.append((letter, f"bold {style}" if i in marked else style))
    found = Text()
    for of_style, run in groupby(letters, key=itemgetter(1)):
        found.append("".join(text for text, _ in run), style=of_style)
    if part.end:
        found.append(f"⟦{part.end}⟧", style=_END)
    elif is_response:
        found.append(" (no end of turn)", style="dim")
    return found


def _n(count: int, name: str) -> str:
    return f"{count:,} {name}" + "s" * (count != 1)


def _headline(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold underline"))


def _grid(width: int) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=width, style="dim")
    grid.add_column(overflow="fold")
    return grid
