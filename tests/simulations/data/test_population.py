"""Tests of populations: which client has which examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from corymb.simulations.data.examples import Examples
from corymb.simulations.data.partition import drawn
from corymb.simulations.data.population import Population
from corymb.simulations.data.sources import DataSettings
from corymb.simulations.experiments.experiment import Experiment
from corymb.tests.support import scenario_of_seed


def test_in_order_keeps_the_examples_of_each_client() -> None:
    examples = Examples(torch.arange(10.0)[:, None], torch.arange(10) % 3)
    population = Population.of(examples, [np.array([7, 2]), np.array([0, 9, 4])])
    ordered = population.in_order()
    assert ordered.rows is None
    for each in (population, ordered):
        assert len(each) == 2
        assert each.sizes.tolist() == [2, 3]
        assert each.examples(1)[0].flatten().tolist() == [0, 9, 4]
        places = each.store_positions([1, 0], torch.tensor([[0, 2], [1, 0]]))
        assert each.store.inputs_at(places.flatten()).flatten().tolist() == [0, 4, 2, 7]
        assert each.labels(3).tolist() == [[0, 0.5, 0.5], [2 / 3, 1 / 3, 0]]
    more = ordered.with_client(Examples(torch.full((2, 1), 77.0), torch.zeros(2, dtype=torch.int64)))
    assert more.examples(2)[0].flatten().tolist() == [77, 77]
    assert more.examples(0)[0].flatten().tolist() == [7, 2]


def test_drawn_sizes_and_classes_follow_their_distributions() -> None:
    labels = np.repeat(np.arange(4), [50, 5, 500, 45])
    rng = np.random.default_rng(0)
    rows, offsets = drawn(labels, 3000, rng, mean=20, sigma=1.0, alpha=0.3)
    sizes = np.diff(offsets)
    assert sizes.min() >= 1
    assert sizes.mean() == pytest.approx(20, rel=0.1)
    assert np.log(sizes[sizes > 5]).std() > 0.5
    population = Population(Examples(torch.zeros(600, 1), torch.from_numpy(labels)), offsets, torch.from_numpy(rows))
    shares = population.labels(4)
    # All classes are equally likely, whatever their numbers of examples; each client has few classes.
    np.testing.assert_allclose(shares.mean(axis=0), 0.25, atol=0.03)
    assert shares.max(axis=1).mean() > 0.6


def test_arrays_are_mapped_and_divided_by_offsets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 1, 4, 4), dtype=np.uint8)
    labels = rng.integers(0, 3, 30)
    for part, rows in (("train", 30), ("test", 6)):
        np.save(tmp_path / f"x_{part}.npy", pixels[:rows])
        np.save(tmp_path / f"y_{part}.npy", labels[:rows])
    np.save(tmp_path / "offsets.npy", np.array([0, 10, 30]))
    source = DataSettings(source=str(tmp_path), mean=0.5, deviation=0.25).load()
    assert source.train.is_mapped
    assert source.train.inputs.dtype == torch.uint8
    torch.testing.assert_close(source.train.inputs_at(slice(0, 6)), source.test.inputs)
    experiment = Experiment(
        name="mapped", rounds=1, rules=["fedavg"], data={"source": str(tmp_path)}, partition={"kind": "site"}
    )
    scenario = scenario_of_seed(experiment)
    assert scenario.population.sizes.tolist() == [10, 20]
    np.save(tmp_path / "offsets.npy", np.array([0, 10, 29]))
    with pytest.raises(ValueError, match="the offsets must rise from 0 to 30"):
        DataSettings(source=str(tmp_path)).load()


def test_shuffled_labels_need_a_disjoint_partition() -> None:
    experiment = Experiment(
        name="shared", rounds=1, rules=["fedavg"], partition={"kind": "drawn"}, attack={"clients": 2}
    )
    with pytest.raises(
        ValueError, match=r"attack\.kind = 'shuffled_labels' cannot be used with partition\.kind = 'drawn'"
    ):
        scenario_of_seed(experiment)
