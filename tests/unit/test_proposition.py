"""Proposition 1 by simulation (benchmarks/proposition.py), at small sizes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

SCRIPT = Path(__file__).parents[2] / "benchmarks/proposition.py"
spec = importlib.util.spec_from_file_location("proposition", SCRIPT)
proposition = importlib.util.module_from_spec(spec)
spec.loader.exec_module(proposition)


def test_exponents(tmp_path):
    path = tmp_path / "found.json"
    found = proposition.main(["--quick", "--trials", "25", "--json", str(path)])
    assert found["d, unknown"] == pytest.approx(0.5, abs=0.12)
    assert abs(found["d, known"]) < 0.12
    assert found["k, known"] == pytest.approx(0.5, abs=0.12)
    assert found["n, unknown"] == pytest.approx(-0.5, abs=0.12)
    assert found["n, known"] == pytest.approx(-0.5, abs=0.12)
    results = json.loads(path.read_text("utf-8"))
    assert results["exponents"] == found
    for row in results["rows"]:
        assert row["low"] <= row["median"] <= row["high"]
        if row["case"] == "unknown":  # d numbers: the chi distribution is narrow
            assert row["median"] == pytest.approx(row["theory"], rel=0.15)


def test_mle_is_the_maximum():
    rng = np.random.default_rng(0)
    x, offset = rng.standard_normal((300, 5)) + 0.3, rng.standard_normal(300)
    theta = proposition.mle(x, offset)
    assert np.abs(proposition.gradient(x, theta, offset)).max() < 1e-9

    def loss(value):
        return np.logaddexp(0, -(x @ value + offset)).mean()

    assert theta == pytest.approx(minimize(loss, np.zeros(5), tol=1e-8).x, abs=1e-4)


def test_knowing_only_theta_g_just_moves_the_estimate():
    rng = np.random.default_rng(1)
    x, general = rng.standard_normal((300, 5)), rng.standard_normal(5)
    assert proposition.mle(x, x @ general) + general == pytest.approx(proposition.mle(x), abs=1e-6)


def test_separable_data_are_refused():
    with pytest.raises(RuntimeError, match="may be separable"):
        proposition.mle(np.ones((10, 1)))
