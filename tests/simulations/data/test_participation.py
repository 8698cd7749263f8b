from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from corymb.simulations.data.participation import (
    Always,
    Bernoulli,
    Cyclic,
    Markov,
    Participation,
    Trace,
    class_correlated,
    cyclic_lengths,
    markov_rates,
    probabilities_of,
)
from corymb.tests.support import golden

GOLDEN = golden("fedau")
P = np.array([0.02, 0.1, 0.3, 0.5, 0.95])


def history(process: Participation, rounds: int) -> np.ndarray:
    return np.array([process.step() for _ in range(rounds)])


@pytest.mark.parametrize("kind", [Bernoulli, Markov, Cyclic])
def test_each_node_is_online_with_its_probability(kind: type[Participation]) -> None:
    """Averaged over 400 independent copies from the first round on, so that the start must be stationary."""
    nodes = np.tile(P, 400)
    process = kind(nodes, np.random.default_rng(0))  # type: ignore[call-arg]
    online = history(process, 300).reshape(300, 400, len(P)).mean(axis=(0, 1))
    # Cyclic nodes are online for a whole number of rounds per cycle, at least one, so their share is only near p.
    assert_allclose(online, P, atol=0.02)


def test_markov_rates_equal_worked_values() -> None:
    for case in GOLDEN["markov_params"]:
        on, off = markov_rates(np.array([case["p"]]), 0.05)
        assert_allclose(on, case["p_inactive_to_active"], rtol=1e-12)
        assert_allclose(off, case["p_active_to_inactive"], rtol=1e-12)
        assert_allclose(on / (on + off), case["stationary"], rtol=1e-12)


def test_cyclic_lengths_equal_worked_values() -> None:
    for case in GOLDEN["cyclic_params"]:
        active, inactive = cyclic_lengths(np.array([case["p"]]), case["cycle"])
        assert (active[0], inactive[0]) == (case["active_rounds"], case["inactive_rounds"])


def test_a_cycle_has_one_contiguous_run_of_rounds() -> None:
    online = history(Cyclic(P, np.random.default_rng(1)), 400)
    for node, p in enumerate(P):
        starts = np.flatnonzero(~online[:-1, node] & online[1:, node]) + 1
        assert (np.diff(starts) == 100).all()
        first = starts[1] if len(starts) > 1 else starts[0]
        assert online[first : first + 100, node].sum() == round(100 * p)


def test_class_correlated_probabilities_equal_worked_values() -> None:
    case = GOLDEN["participation_prob"]
    p = probabilities_of(
        np.array(case["class_dist_per_client"]),
        np.array(case["class_participation_q"]),
        case["mean"],
        case["min"],
    )
    assert_allclose(p, case["p"], rtol=1e-12)


def test_probabilities_never_exceed_one() -> None:
    one_class_each = np.eye(100)
    p = class_correlated(one_class_each, np.random.default_rng(0))
    assert p.max() <= 1
    assert p.min() == 0.02


def test_always() -> None:
    assert Always(3).step().tolist() == [True] * 3


def test_a_trace_is_followed_and_repeats(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("1,0,1\n0,0,1\n")
    trace = Trace(path, 3)
    assert history(trace, 3).tolist() == [[True, False, True], [False, False, True], [True, False, True]]
    with pytest.raises(ValueError, match="3 columns for 4 clients"):
        Trace(path, 4)
    with pytest.raises(ValueError, match="cannot be read"):
        Trace(tmp_path / "nowhere.csv", 4)
