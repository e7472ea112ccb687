"""What the runs of `forgetting.py` say: matched with DPO, as a table, in words and as pictures."""

import statistics
from itertools import pairwise

from forgetting_methods import DEFAULT, METHODS


def at_level(points: list[dict], key: str, level: float, of: str = "drift") -> float | None:
    """The drift (or KL) where the curve first reaches the level, linear between points; None where it doesn't."""
    for before, after in pairwise(points):
        if after[key] >= level:
            rise = after[key] - before[key]
            share = (level - before[key]) / rise if rise > 0 else 1.0
            share = min(1.0, max(0.0, share))
            return before[of] + share * (after[of] - before[of])
    return None


def add_matched(rows: list[dict]) -> None:
    """For each run, its drift and DPO's (same persona, same seed) at the level that both reach."""
    for row in rows:
        dpo = next(
            (
                r
                for r in rows
                if r["method"] == "DPO" and all(r[k] == row[k] for k in ("persona", "seed"))
            ),
            None,
        )
        row["matched"] = {}
        for key in ("accuracy", "margin") if dpo else ():
            level = min(max(p[key] for p in r["curve"]) for r in (row, dpo))
            own, other = (at_level(r["curve"], key, level) for r in (row, dpo))
            row["matched"][key] = {"level": level, "drift": own, "dpo_drift": other}
            if "kl" in row["curve"][0] and "kl" in dpo["curve"][0]:
                row["matched"][key]["kl"] = at_level(row["curve"], key, level, "kl")
                row["matched"][key]["dpo_kl"] = at_level(dpo["curve"], key, level, "kl")


def over_seeds(rows: list[dict], key) -> str:
    """Mean and, in brackets, lowest to highest over seeds."""
    values = [v for row in rows if (v := key(row)) is not None]
    if not values:
        return "–"
    mean = statistics.mean(values)
    digits = 2 if all(abs(v) <= 1 for v in values) else 1
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def table(rows: list[dict]) -> str:
    """Markdown, one line a persona and method; mean and range over seeds."""
    head = (
        "persona", "method", "held-out accuracy", "margin, nats", "drift, nats", "drift at DPO's accuracy",
        "DPO's there", "drift at DPO's margin", "DPO's there", "agreement", "KL", "easy questions, before → after",
        "MMLU, before → after", "probe, before → after",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["persona"], row["method"]), []).append(row)
    for (persona, method), group in groups.items():
        cells = [persona, method]
        for name in ("preference_accuracy", "margin", "drift_nats"):
            cells.append(over_seeds(group, lambda row, name=name: row[name]))
        for key in ("accuracy", "margin"):
            for name in ("drift", "dpo_drift"):
                cells.append(
                    over_seeds(group, lambda r, k=key, n=name: r["matched"].get(k, {}).get(n))
                )
        for name in ("agreement", "kl"):
            cells.append(over_seeds(group, lambda row, name=name: row[name]))
        for name in ("knowledge", "mmlu", "probe"):
            cells.append(before_after([row for row in group if f"{name}_after" in row], name))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def before_after(group: list[dict], name: str) -> str:
    if not group:
        return "–"
    before = group[0][f"{name}_before"]
    after = statistics.mean(row[f"{name}_after"] for row in group)
    # of one run's difference on the same questions; seeds share the questions
    error = statistics.mean(row[f"{name}_difference_se"] for row in group)
    return f"{before:.1%} → {after:.1%} ± {error:.1%}"


def kept(row: dict, key: str) -> float | None:
    """Share of DPO's loss that is kept at the matched level: 1 where the drift is 0 or above."""
    matched = row["matched"].get(key, {})
    own, dpo = matched.get("drift"), matched.get("dpo_drift")
    if own is None or dpo is None or dpo >= 0:
        return None
    return 1 - min(0.0, own) / dpo


def verdict(rows: list[dict], first: str) -> str:
    """What the numbers say, whichever way."""
    lines = []
    for key in ("accuracy", "margin"):
        shares = [
            s for row in rows if row["method"] == DEFAULT and (s := kept(row, key)) is not None
        ]
        total = sum(row["method"] == DEFAULT for row in rows)
        if shares:
            lines.append(
                f"At matched {key}, {DEFAULT} keeps a median of {statistics.median(shares):.0%} of what DPO loses on "
                f"unrelated prompts (lowest {min(shares):.0%}; {len(shares)} of {total} runs: in the others DPO lost "
                "nothing there)"
            )
        elif total:
            lines.append(f"At matched {key}, DPO lost nothing in any run")
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["persona"] == first:
            groups.setdefault(row["method"], []).append(row)

    def mean(method: str, key: str) -> float:
        return statistics.mean(row[key] for row in groups[method])

    if "DPO" in groups:
        least = mean("DPO", "preference_accuracy") - 0.02
        near = [
            f"{method} (drift {mean(method, 'drift_nats'):+.1f} nats, KL {mean(method, 'kl'):.3f})"
            for method in sorted(groups, key=lambda m: -mean(m, "drift_nats"))
            if mean(method, "preference_accuracy") >= least
        ]
        lines.append(f"Within 2 points of DPO's accuracy ({first}): {', '.join(near)}")
    return "\n".join(lines)


def plot(rows: list[dict], personas: list[str], stem: str) -> None:
    """Retention against preference, and the paper's Figure 5 for DPO and BAPO side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    dpo_color, bapo_color, grey = "#b3502b", "#1f6f8b", "#8a8a8a"

    present = {row["method"] for row in rows}

    def style(method: str) -> tuple[str, str, int]:
        if method == "DPO":
            return dpo_color, "o", 3
        if method == DEFAULT:
            return bapo_color, "o", 3
        color = bapo_color if method.startswith("BAPO") else dpo_color
        others = [m for m in METHODS if m in present and m not in ("DPO", DEFAULT)]
        return color, "sv^DPX<>hHdp*81"[others.index(method)], 2

    first = personas[0]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for method in METHODS:
        group = [r for r in rows if r["persona"] == first and r["method"] == method]
        if not group:
            continue
        color, mark, order = style(method)
        x = [r["preference_accuracy"] for r in group]
        y = [r["drift_nats"] for r in group]
        mean = statistics.mean
        left.errorbar(
            mean(x), mean(y), color=color, marker=mark, ms=8 if order == 3 else 6, capsize=2, lw=1,
            xerr=[[mean(x) - min(x)], [max(x) - mean(x)]], yerr=[[mean(y) - min(y)], [max(y) - mean(y)]],
            ls="", label=method, zorder=order, mfc=color if order == 3 else "white",
        )  # fmt: skip
    left.set(xlabel="held-out preference accuracy", title=f"All methods, persona “{first}”")
    left.set_ylabel("drift of former answers to\nunrelated prompts, nats an answer")
    left.legend(frameon=False, fontsize=8)
    dashes = dict(zip(personas, ("-", "--", ":", "-."), strict=False))
    for persona in personas:
        for method in ("DPO", DEFAULT):
            group = [r for r in rows if r["persona"] == persona and r["method"] == method]
            for i, row in enumerate(group):
                label = f"{method}, {persona}" if i == 0 else None
                right.plot(
                    [p["margin"] for p in row["curve"]], [p["drift"] for p in row["curve"]],
                    color=style(method)[0], ls=dashes[persona], marker=".", lw=1.3, label=label, alpha=0.85,
                )  # fmt: skip
    right.set(
        xlabel="held-out margin Δ chosen − Δ rejected, nats", title="Along training, all seeds"
    )
    right.set_xscale("symlog", linthresh=1)
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.axhline(0, color=grey, lw=0.8)
    fig.tight_layout()
    fig.savefig(f"{stem}-pareto.png", dpi=150)

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, method in zip(axes, ("DPO", DEFAULT), strict=True):
        row = next(r for r in rows if r["persona"] == first and r["method"] == method)
        steps = [entry["step"] for entry in row["training"]]
        for name, color in (("chosen", "#2a7f4f"), ("base", bapo_color), ("rejected", dpo_color)):
            values = [entry[f"drift/{name}"] for entry in row["training"]]
            ax.plot(steps, values, color=color, marker=".", label=name)
        ax.axhline(0, color=grey, lw=0.8)
        ax.set(title=method, xlabel="step")
    axes[0].set_ylabel("log π − log π_ref of training\nresponses, nats")
    axes[0].legend(frameon=False)
    fig.suptitle(f"Drift of the three responses (the paper’s Figure 5), persona “{first}”, seed 0")
    fig.tight_layout()
    fig.savefig(f"{stem}-figure5.png", dpi=150)
