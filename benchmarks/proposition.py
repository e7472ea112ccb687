"""Proposition 1: knowing θ_G, the error of a user's reward goes as √k and no longer as √d.

    python benchmarks/proposition.py --json proposition.json --plot proposition.png

A user's reward is r(x, y) = ⟨θ, φ(x, y)⟩ with features φ and θ = θ_G + θ_L: θ_G, general, in d
dimensions, is what the base model holds; θ_L, personal, lies in a subspace of k. From n comparisons
the maximum likelihood estimate (MLE) θ̂ is made twice: knowing nothing (d numbers), and knowing θ_G
and the subspace (k numbers; ⟨θ_G, φ⟩ is an offset). Measured is its error in the norm of the data,
‖θ̂ − θ‖_Σ = √mean⟨θ̂ − θ, φ(chosen) − φ(rejected)⟩², which is that of θ̂ − θ_G as an estimate of θ_L.
Zhu, Jordan and Jiao (2023, arXiv 2301.11270) bound it by C·√((d + log 1/δ)/n) with probability
1 − δ. So it is the error at a given n that goes as √d or √k; the comparisons needed for a given
error, the sample complexity in the usual sense, go as d or k.

Assumed: a linear reward and Bradley-Terry choices, P(y ≻ y') = σ(r(x, y) − r(x, y')), σ the logistic
function; independent comparisons; bounded features, here φ uniform on [−1, 1]^d; θ_G and the
subspace known exactly, θ_G ⟂ the subspace; n ≫ d (32 d or more), so that the MLE exists. ‖θ‖ is
chosen for margins r(x, y) − r(x, y') of standard deviation 1 at each d, so that C is the same.
Theory, with nothing fitted: √(p/(w n)) for p numbers, w = E σ'(margin), from the variance of the MLE
at large n.

Not claimed: to know θ_G and not the subspace is worth nothing to the MLE, which just moves by θ_G.
And √d is the price of the whole reward: with features as uncorrelated as these, the part of the
d-number estimate in the subspace ("projected") is √k off without θ_G, too. About a minute, one core.
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

K = 8
KS = (K, 16, 32)
CASES = {
    "unknown": "$θ_G$ unknown: d numbers",
    "projected": "$θ_G$ unknown, error in the subspace only",
    "known": "$θ_G$ and the subspace known: k numbers",
}


def gradient(x, theta, offset=0.0):
    """Of the mean log-likelihood, mean log σ(⟨θ, x⟩ + offset)."""
    return x.T @ expit(-(x @ theta + offset)) / len(x)


def mle(x, offset=0.0):
    """The θ of highest likelihood; a row of x is φ(chosen) − φ(rejected).

    Newton's method with the Hessian's bound XᵀX/4n in its place (Böhning and Lindsay 1988): each step
    raises the likelihood.
    """
    bound = cho_factor(x.T @ x / (4 * len(x)))
    theta = np.zeros(x.shape[1])
    for _ in range(500):
        slope = gradient(x, theta, offset)
        if np.abs(slope).max() < 1e-9:
            return theta
        theta += cho_solve(bound, slope)
    raise RuntimeError(
        f"the MLE did not converge in 500 steps (n = {len(x)}, {len(theta)} numbers): the data may "
        "be separable; take more comparisons or fewer dimensions"
    )


def trial(n, d, k, rng):
    """Errors of one drawn user and data set, by case."""
    basis = np.linalg.qr(rng.standard_normal((d, k)))[0]  # of the personal subspace
    general = rng.standard_normal(d)
    general -= basis @ (basis.T @ general)
    personal = basis @ rng.standard_normal(k)
    # a coordinate of x has variance 2/3: the margin's is 2/3 · ‖θ‖² = 0.64 + 0.36
    general *= 0.8 * 1.5**0.5 / np.linalg.norm(general)
    personal *= 0.6 * 1.5**0.5 / np.linalg.norm(personal)
    theta = general + personal
    x = rng.uniform(-1, 1, (n, d)) - rng.uniform(-1, 1, (n, d))
    x *= np.where(rng.random(n) < expit(x @ theta), 1, -1)[:, None]  # chosen − rejected
    few, of_all = mle(x @ basis, x @ general), mle(x) - theta
    wrong = {
        "unknown": of_all,
        "known": basis @ few - personal,
        "projected": basis @ (basis.T @ of_all),
    }
    return {case: np.sqrt(np.mean((x @ value) ** 2)) for case, value in wrong.items()}


def measure(sizes, trials, rng):
    """Rows of results, one for each (n, d, k) and case: medians and quartiles."""
    grid, weights = np.polynomial.hermite_e.hermegauss(64)
    w = weights @ (expit(grid) * expit(-grid)) / weights.sum()  # E σ'(margin), margin ~ N(0, 1)
    rows = []
    for n, d, k in sizes:
        errors = [trial(n, d, k, rng) for _ in range(trials)]
        for case in CASES:
            low, median, high = np.percentile([e[case] for e in errors], [25, 50, 75]).tolist()
            theory = float((d if case == "unknown" else k) / (w * n)) ** 0.5
            row = {"n": n, "d": d, "k": k, "case": case, "median": median}
            rows.append(row | {"low": low, "high": high, "theory": theory})
            print({a: round(b, 4) if isinstance(b, float) else b for a, b in rows[-1].items()})
    return rows


def pick(rows, case, **fixed):
    return [r for r in rows if r["case"] == case and all(r[a] == b for a, b in fixed.items())]


def exponent(rows, of):
    """Slope of log(median error) on log(n, d or k)."""
    logs = np.log([[row[of], row["median"]] for row in rows])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def draw(by_d, by_n, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def line(ax, rows, of, label, color, style):
        at, *values = zip(*((r[of], r["low"], r["high"], r["median"]) for r in rows), strict=True)
        low, high, median = values
        label += f"  ($∝ {of}^{{{exponent(rows, of):.2f}}}$)"
        ax.fill_between(at, low, high, color=color, alpha=0.16, lw=0)
        ax.plot(at, median, style, color=color, label=label, zorder=3)
        ax.plot(at, [row["theory"] for row in rows], "--", color="black", lw=0.9)
        ax.set_xticks(at, [str(tick) for tick in at])

    blue, gray, orange = "#1f5fa8", "#8a8a8a", "#e07b26"
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", ylabel=r"error of $θ$,  $‖\hatθ − θ‖_Σ$")
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for (case, label), color, style in zip(
        CASES.items(), (blue, gray, orange), ("o-", "^:", "s-"), strict=True
    ):
        line(left, pick(by_d, case), "d", label, color, style)
    left.set(xlabel="dimensions, d", title=f"n = {by_d[0]['n']} comparisons, k = {K}")
    line(right, pick(by_n, "unknown", k=K), "n", "$θ_G$ unknown", blue, "o-")
    for k, color in zip(reversed(KS), ("#7a3406", "#b0540f", orange), strict=True):
        label = f"$θ_G$ and the subspace known, k = {k}"
        line(right, pick(by_n, "known", k=k), "n", label, color, "s-")
    right.set(xlabel="comparisons, n", title=f"d = {by_n[0]['d']} dimensions")
    for ax in (left, right):
        ax.plot([], [], "--", color="black", lw=0.9, label=r"theory: $\sqrt{d/wn}$, $\sqrt{k/wn}$")
        ax.minorticks_off()
        ax.set_ylim(top=ax.get_ylim()[1] * 1.6)  # room for the legend
        ax.legend(fontsize=9, frameon=False, loc="upper left" if ax is left else "upper right")
    fig.suptitle("What knowing $θ_G$ is worth (medians and quartiles)")
    fig.savefig(path, dpi=160)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes: seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=40, help="data sets drawn for each point")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw the figure here (PNG; needs matplotlib)")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    dims, ns = (16, 32, 64, 128, 256, 512), (2048, 4096, 8192, 16384, 32768)
    if args.quick:
        dims, ns = dims[:4], ns[:3]
    by_d = measure([(32 * dims[-1], d, K) for d in dims], args.trials, rng)
    by_n = measure([(n, 64, k) for k in KS for n in ns], args.trials, rng)
    exponents = {f"d, {case}": exponent(pick(by_d, case), "d") for case in CASES}
    exponents |= {f"n, {case}": exponent(pick(by_n, case, k=K), "n") for case in CASES}
    exponents["k, known"] = exponent(pick(by_n, "known"), "k")  # the same n at each k
    for name, value in exponents.items():
        print(f"exponent in {name}: {value:+.3f}")
    about = {
        "command": " ".join(["python", *sys.argv] if argv is None else ["main", *argv]),
        "seed": args.seed,
        "trials": args.trials,
        "seconds": time.perf_counter() - start,
        "machine": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "scipy")},
    }
    if args.json:
        results = about | {"exponents": exponents, "rows": by_d + by_n}
        args.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if args.plot:
        draw(by_d, by_n, args.plot)
    return exponents


if __name__ == "__main__":
    main()
