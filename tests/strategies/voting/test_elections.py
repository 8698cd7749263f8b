"""Elections and their certificates, against worked cases and against an exhaustive search over all attacks."""

from __future__ import annotations

from itertools import combinations, permutations, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corymb.strategies import Plurality, RunOff
from corymb.strategies.voting.election import Election, certified_accuracy, count, finalists, voters_to_close_two
from corymb.strategies.voting.finite_aggregation import spread_plurality, spread_run_off
from corymb.tests.support import golden

GOLDEN = golden("roe")
CASES = {case["name"]: case for case in [*GOLDEN["cases"], GOLDEN["dpa_star"]["summed"]]}
RULES = [Plurality(), RunOff()]


def scores(logits: list[list[float | None]]) -> Tensor:
    """Return the scores `[V, 1, C]` of as_dict input."""
    rows = [[float("nan") if score is None else score for score in row] for row in logits]
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def as_dict(election: Election) -> dict[str, int]:
    return {"label": int(election.classes), "cert": int(election.certificates)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_worked_elections(case: dict[str, Any]) -> None:
    ballots = scores(case["logits"])
    counted = count(ballots)
    first, second = finalists(counted.votes)
    voters = len(ballots)
    lead = int(counted.leads[0, int(first), int(second)])
    assert counted.votes[0].tolist() == case["votes"]
    assert [int(first), int(second)] == case["finalists"]
    assert [(voters + lead) // 2, (voters - lead) // 2] == case["runoff_votes"]
    assert as_dict(Plurality().elect(ballots)) == case["dpa"]
    assert as_dict(RunOff().elect(ballots)) == {key: case["roe"][key] for key in ("label", "cert")}


def test_several_versions_of_a_voter_are_summed() -> None:
    star = GOLDEN["dpa_star"]
    summed = scores(star["version1"]) + scores(star["version2"])
    assert torch.equal(summed, scores(star["summed"]["logits"]))


def test_voters_to_close_two_gaps() -> None:
    for one_gap, other_gap, voters in GOLDEN["certv2"]:
        assert int(voters_to_close_two(torch.tensor(one_gap), torch.tensor(other_gap))) == voters


@pytest.mark.parametrize("case", GOLDEN["finite_aggregation"]["cases"])
def test_worked_finite_aggregation(case: dict[str, Any]) -> None:
    ballots, shifts = scores(case["logits"]), tuple(GOLDEN["finite_aggregation"]["shifts"])
    assert as_dict(spread_plurality(ballots, shifts)) == case["fa"]
    assert as_dict(spread_run_off(ballots, shifts)) == case["fa_roe"]


def test_certified_accuracy() -> None:
    worked = GOLDEN["certified_accuracy"]
    election = Election(torch.tensor(worked["preds"]), torch.tensor(worked["certs"]))
    labels = torch.tensor(worked["labels"])
    found = [certified_accuracy(election, labels, budget) for budget in worked["budgets"]]
    assert found == pytest.approx(worked["value"])


@pytest.mark.parametrize("case", GOLDEN["exhaustive"], ids=lambda case: case["name"])
def test_the_certificate_equals_the_radius_of_the_worked_searches(case: dict[str, Any]) -> None:
    ballots = scores(CASES[case["name"]]["logits"])
    assert radius(RunOff(), ballots, case["searched_up_to"]) == case["exact_radius"]
    assert as_dict(RunOff().elect(ballots))["cert"] == case["exact_radius"]


def radius(rule: Plurality | RunOff, ballots: Tensor, most: int) -> int:
    """Return the largest number of corrupted voters, up to `most`, that cannot change the label by any attack.

    Only the order of a voter's scores matters, so the search over all strict orders covers all attacks.
    """
    voters, _, classes = ballots.shape
    label = as_dict(rule.elect(ballots))["label"]
    orders = torch.tensor(list(permutations(range(classes))), dtype=ballots.dtype)
    for size in range(1, min(most, voters) + 1):
        attacks = torch.stack([torch.stack(chosen) for chosen in product(orders, repeat=size)], dim=1)  # [size, N, C]
        for hostile in combinations(range(voters), size):
            attacked = ballots.expand(-1, attacks.shape[1], -1).clone()
            attacked[list(hostile)] = attacks
            if bool((rule.elect(attacked).classes != label).any()):
                return size - 1
    return most


logits: st.SearchStrategy[float | None] = st.sampled_from([0.0, 1.0, 2.0, 3.0])  # few values, so that there are ties


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@given(data=st.data(), voters=st.integers(1, 7))
def test_no_certificate_exceeds_the_radius_of_all_attacks(
    rule: Plurality | RunOff, data: st.DataObject, voters: int
) -> None:
    rows = st.lists(logits, min_size=3, max_size=3)
    ballots = scores(data.draw(st.lists(rows, min_size=voters, max_size=voters)))
    certificate = as_dict(rule.elect(ballots))["cert"]
    assert radius(rule, ballots, min(certificate + 1, 3)) >= min(certificate, 3)


@pytest.mark.parametrize("rule", [*RULES, Plurality(groups=9, spread=2), RunOff(groups=9, spread=2)], ids=repr)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6))
def test_corrupting_certified_voters_never_changes_the_label(rule: Plurality | RunOff, seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ballots = torch.randn(9, 6, classes, generator=generator)
    ballots[:, :, 0] += 1.5  # so that certificates are above zero
    elected = rule.elect(ballots)
    for item, certificate in enumerate(elected.certificates.tolist()):
        buckets = torch.randperm(9, generator=generator)[:certificate].tolist()
        hostile = sorted({(bucket + shift) % 9 for bucket in buckets for shift in rule.shifts})
        for attack in ("random", "runner-up", "nan"):
            attacked = ballots[:, item : item + 1].clone()
            if attack == "random":
                attacked[hostile] = 1e9 * torch.randn(len(hostile), 1, classes, generator=generator)
            elif attack == "nan":
                attacked[hostile] = torch.nan
            else:
                votes = count(ballots[:, item : item + 1]).votes[0]
                votes[elected.classes[item]] = -1
                attacked[hostile] = torch.nn.functional.one_hot(votes.argmax(), classes).to(attacked.dtype)
            assert int(rule.elect(attacked).classes) == int(elected.classes[item])


@given(seed=st.integers(0, 10**6))
def test_certificates_hold_for_voters_that_abstain(seed: int) -> None:
    """A corrupted voter may also report wrong classes as seen."""
    generator = torch.Generator().manual_seed(seed)
    ballots = torch.randn(7, 5, 3, generator=generator)
    ballots[:, :, 1] += 1
    seen = torch.rand(7, 3, generator=generator) < 0.7
    for rule in RULES:
        elected = rule.elect(ballots, seen)
        for item, certificate in enumerate(elected.certificates.tolist()):
            hostile = torch.randperm(7, generator=generator)[:certificate]
            attacked, lie = ballots[:, item : item + 1].clone(), seen.clone()
            attacked[hostile] = torch.randn(len(hostile), 1, 3, generator=generator)
            lie[hostile] = torch.rand(len(hostile), 3, generator=generator) < 0.5
            assert int(rule.elect(attacked, lie).classes) == int(elected.classes[item])


def test_a_voter_abstains_on_classes_that_it_has_not_seen() -> None:
    ballots = scores([[9.0, 1.0, 0.0], [9.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    seen = torch.tensor([[False, True, True], [False, True, True], [True, True, True]])
    assert as_dict(Plurality().elect(ballots))["label"] == 0
    assert as_dict(Plurality().elect(ballots, seen))["label"] == 1
    assert count(ballots, seen).leads[0, 0, 1] == -1  # only the third voter compares classes 0 and 1


def test_only_the_order_of_scores_matters() -> None:
    ballots = torch.randn(9, 50, 4, dtype=torch.float64)
    for rule in RULES:
        plain, loud = rule.elect(ballots), rule.elect(ballots * torch.logspace(-9, 9, 9)[:, None, None])
        assert torch.equal(plain.classes, loud.classes)
        assert torch.equal(plain.certificates, loud.certificates)
