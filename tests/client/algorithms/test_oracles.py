"""Client algorithms against re-implementations of their papers, which share no code with Corymb."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, make_client_app, shared_state
from corymb.client.algorithms.algorithm import inside
from corymb.client.algorithms.memory_files import folder_of, recall
from corymb.client.app import batch_generator
from corymb.client.batches import shuffled_rows
from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy
from corymb.simulations import LocalGrid
from corymb.strategies import FedAvg, FedDyn, FedNova, Scaffold

CLIENTS, ROUNDS, RATE = 4, 3, 0.05
State = dict[str, Tensor]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def examples() -> list[TensorDataset]:
    generator = torch.Generator().manual_seed(3)
    sizes = (12, 20, 9, 16)
    return [
        TensorDataset(torch.randn(n, 5, generator=generator) + i, torch.randint(3, (n,), generator=generator))
        for i, n in enumerate(sizes)
    ]


DATA = examples()


def start() -> nn.Module:
    torch.manual_seed(1)
    return network()


def run(rule: Any, folder: Path, model: Any = start, **train: Any) -> State:
    """Return the shared model after rounds in which everyone takes part."""
    settings = TrainSettings(learning_rate=RATE, batch_size=4, **train)

    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        own = DATA[int(context.node_config["partition-id"])]
        return own, own

    config = {**settings.flat(), "client-memory": str(folder)}
    grid = LocalGrid(make_client_app(model, data), CLIENTS, run_config=config)
    shared = shared_state(model(), settings)
    strategy = FlowerStrategy(rule, fraction_evaluate=0, min_available_nodes=1, shares_nothing=not shared)
    result = strategy.start(grid, to_arrays(deepcopy(shared)), ROUNDS)
    grid.require_replies()
    return {name: tensor.clone() for name, tensor in to_state(result.arrays).items()}


def batches(client: int, server_round: int, epochs: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return the batches that a client draws in a round; their order is no part of a method."""
    generator = batch_generator(0, client, server_round)
    settings = TrainSettings(batch_size=4)
    drawn = [rows for _ in range(epochs) for rows in shuffled_rows(len(DATA[client]), settings, generator)]
    return [(DATA[client].tensors[0][rows], DATA[client].tensors[1][rows]) for rows in drawn]


def gradients(module: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    loss = nn.functional.cross_entropy(module(batch[0]), batch[1])
    return list(torch.autograd.grad(loss, list(module.parameters())))


def params(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def assign(module: nn.Module, values: list[Tensor]) -> nn.Module:
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value)
    return module


def assert_equals(state: State, expected: list[Tensor]) -> None:
    for value, wanted in zip(state.values(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("server_rate", [1.0, 0.7])
def test_scaffold_is_algorithm_1_of_the_paper(tmp_path: Path, server_rate: float) -> None:
    x = params(start())
    c = [torch.zeros_like(p) for p in x]
    own = [[torch.zeros_like(p) for p in x] for _ in range(CLIENTS)]
    for t in range(1, ROUNDS + 1):
        dy, dc = [torch.zeros_like(p) for p in x], [torch.zeros_like(p) for p in x]
        for i in range(CLIENTS):
            y, k = assign(network(), x), 0
            for batch in batches(i, t):
                step = [g - ci + cs for g, ci, cs in zip(gradients(y, batch), own[i], c, strict=True)]
                assign(y, [p - RATE * s for p, s in zip(params(y), step, strict=True)])
                k += 1
            new = [ci - cs + (a - b) / (k * RATE) for ci, cs, a, b in zip(own[i], c, x, params(y), strict=True)]
            dy = [d + (b - a) / CLIENTS for d, a, b in zip(dy, x, params(y), strict=True)]
            dc = [d + (n - o) / CLIENTS for d, n, o in zip(dc, new, own[i], strict=True)]
            own[i] = new
        x = [a + server_rate * d for a, d in zip(x, dy, strict=True)]
        c = [a + d for a, d in zip(c, dc, strict=True)]
    state = run(Scaffold(server_rate=server_rate), tmp_path, algorithm="scaffold")
    assert_equals(state, x)


def test_feddyn_is_algorithm_1_of_the_paper(tmp_path: Path) -> None:
    alpha = 0.3
    theta = params(start())
    h = [torch.zeros_like(p) for p in theta]
    own = [[torch.zeros_like(p) for p in theta] for _ in range(CLIENTS)]
    for t in range(1, ROUNDS + 1):
        models = []
        for i in range(CLIENTS):
            y = assign(network(), theta)
            for batch in batches(i, t):
                step = [
                    g - hk + alpha * (p - a)
                    for g, hk, p, a in zip(gradients(y, batch), own[i], params(y), theta, strict=True)
                ]
                assign(y, [p - RATE * s for p, s in zip(params(y), step, strict=True)])
            own[i] = [hk - alpha * (p - a) for hk, p, a in zip(own[i], params(y), theta, strict=True)]
            models.append(params(y))
        sums = [sum(p - a for p in ps) for a, ps in zip(theta, zip(*models, strict=True), strict=True)]
        h = [hs - alpha * s / CLIENTS for hs, s in zip(h, sums, strict=True)]
        means = [sum(ps) / CLIENTS for ps in zip(*models, strict=True)]
        theta = [m - hs / alpha for m, hs in zip(means, h, strict=True)]
    assert_equals(run(FedDyn(alpha=alpha), tmp_path, algorithm="feddyn", algorithm_options={"alpha": alpha}), theta)


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.4)])
def test_fednova_is_equation_6_of_the_paper(tmp_path: Path, momentum: float, mu: float) -> None:
    x = params(start())
    sizes = [len(d) for d in DATA]
    for t in range(1, ROUNDS + 1):
        directions, weights = [], []
        for i in range(CLIENTS):
            y, velocity, a, counter = assign(network(), x), [torch.zeros_like(p) for p in x], 0.0, 0.0
            for batch in batches(i, t):
                step = [g + mu * (p - s) for g, p, s in zip(gradients(y, batch), params(y), x, strict=True)]
                velocity = [momentum * v + g for v, g in zip(velocity, step, strict=True)]
                assign(y, [p - RATE * v for p, v in zip(params(y), velocity, strict=True)])
                counter = momentum * counter + 1
                a = a * (1 - RATE * mu) + counter
            directions.append([(s - p) / a for s, p in zip(x, params(y), strict=True)])
            weights.append(a)
        shares = [n / sum(sizes) for n in sizes]
        scale = sum(p * a for p, a in zip(shares, weights, strict=True))
        x = [
            s - scale * sum(p * d for p, d in zip(shares, ds, strict=True))
            for s, ds in zip(x, zip(*directions, strict=True), strict=True)
        ]
    options = {"optimizer_options": {"momentum": momentum}} if momentum else {}
    assert_equals(run(FedNova(), tmp_path, algorithm="fednova", proximal=mu, **options), x)


def local_models() -> list[list[Tensor]]:
    """Return each client's model after training alone."""
    found = []
    for i in range(CLIENTS):
        y = start()
        for t in range(1, ROUNDS + 1):
            optimizer = torch.optim.SGD(y.parameters(), RATE)
            for inputs, targets in batches(i, t):
                optimizer.zero_grad()
                nn.functional.cross_entropy(y(inputs), targets).backward()
                optimizer.step()
        found.append(params(y))
    return found


def kept(folder: Path, prefix: str) -> list[dict[str, Tensor]]:
    """Return what each client keeps under `prefix` after the last round, in the order of the clients."""
    names = [*network().state_dict(), *with_batch_norm().state_dict()]
    contexts = [Context(0, 0, {}, None, {"client-memory": str(folder)}) for _ in range(CLIENTS)]  # type: ignore[arg-type]
    found = [inside(prefix, recall(folder_of(context, i), ROUNDS)) for i, context in enumerate(contexts)]
    return [{name: own[name] for name in names if name in own} for own in found]


def test_ditto_without_a_pull_is_local_training_to_the_bit(tmp_path: Path) -> None:
    shared = run(FedAvg(), tmp_path, algorithm="ditto", algorithm_options={"pull": 0.0})
    for own, alone in zip(kept(tmp_path, "own"), local_models(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.values(), alone, strict=True))
    plain = run(FedAvg(), tmp_path / "plain")
    assert all(torch.equal(shared[name], plain[name]) for name in plain)


def test_with_everything_personal_clients_train_alone_to_the_bit(tmp_path: Path) -> None:
    assert run(FedAvg(), tmp_path, personal=["*"]) == {}
    for own, alone in zip(kept(tmp_path, "personal"), local_models(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.values(), alone, strict=True))


def test_ditto_is_algorithm_1_of_the_paper(tmp_path: Path) -> None:
    pull = 0.6
    w = params(start())
    v = [params(start()) for _ in range(CLIENTS)]
    for t in range(1, ROUNDS + 1):
        models = []
        for i in range(CLIENTS):
            y, own = assign(network(), w), assign(network(), v[i])
            for batch in batches(i, t):
                step = [g + pull * (p - a) for g, p, a in zip(gradients(own, batch), params(own), w, strict=True)]
                assign(own, [p - RATE * s for p, s in zip(params(own), step, strict=True)])
                assign(y, [p - RATE * g for p, g in zip(params(y), gradients(y, batch), strict=True)])
            v[i] = params(own)
            models.append(params(y))
        sizes = [len(d) for d in DATA]
        w = [sum(n * p for n, p in zip(sizes, ps, strict=True)) / sum(sizes) for ps in zip(*models, strict=True)]
    assert_equals(run(FedAvg(), tmp_path, algorithm="ditto", algorithm_options={"pull": pull}), w)
    for mine, wanted in zip(kept(tmp_path, "own"), v, strict=True):
        assert_equals(mine, wanted)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_fedbn_averages_all_but_batch_normalisation(tmp_path: Path) -> None:
    modules = [with_batch_norm() for _ in range(CLIENTS)]
    sizes = [len(d) for d in DATA]
    for t in range(1, ROUNDS + 1):
        for i, module in enumerate(modules):
            module.train()
            optimizer = torch.optim.SGD(module.parameters(), RATE)
            drawn = batches(i, t)
            if len(drawn[-1][0]) == 1:  # BatchNorm needs two examples, so the last batch joins the one before
                drawn = [*drawn[:-2], tuple(torch.cat(parts) for parts in zip(*drawn[-2:], strict=True))]  # type: ignore[list-item]
            for inputs, targets in drawn:
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(inputs), targets).backward()
                optimizer.step()
        for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
            mean = sum(n * m.state_dict()[name] for n, m in zip(sizes, modules, strict=True)) / sum(sizes)
            for module in modules:
                module.state_dict()[name].copy_(mean)
    shared = run(FedAvg(), tmp_path, with_batch_norm, algorithm="fedbn")
    assert list(shared) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert_equals(shared, [modules[0].state_dict()[name] for name in shared])
    for mine, module in zip(kept(tmp_path, "personal"), modules, strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_fedrep_trains_the_head_and_then_the_rest(tmp_path: Path) -> None:
    body = params(start())[:2]
    heads = [params(start())[2:] for _ in range(CLIENTS)]
    sizes = [len(d) for d in DATA]
    for t in range(1, ROUNDS + 1):
        bodies = []
        for i in range(CLIENTS):
            y = assign(network(), [*body, *heads[i]])
            for batch in batches(i, t, 2):
                step = gradients(y, batch)
                assign(y, [*params(y)[:2], *(p - RATE * g for p, g in zip(params(y)[2:], step[2:], strict=True))])
            for batch in batches(i, t):
                step = gradients(y, batch)
                assign(y, [*(p - RATE * g for p, g in zip(params(y)[:2], step[:2], strict=True)), *params(y)[2:]])
            heads[i] = params(y)[2:]
            bodies.append(params(y)[:2])
        body = [sum(n * p for n, p in zip(sizes, ps, strict=True)) / sum(sizes) for ps in zip(*bodies, strict=True)]
    shared = run(FedAvg(), tmp_path, algorithm="fedrep", algorithm_options={"head_epochs": 2})
    assert_equals(shared, body)
    for own, wanted in zip(kept(tmp_path, "personal"), heads, strict=True):
        assert_equals(own, wanted)


@pytest.mark.parametrize("adapts", [False, True])
def test_apfl_is_algorithm_1_of_the_paper(tmp_path: Path, adapts: bool) -> None:
    w = params(start())
    v = [params(start()) for _ in range(CLIENTS)]
    mixes = [0.3] * CLIENTS
    sizes = [len(d) for d in DATA]
    for t in range(1, ROUNDS + 1):
        models = []
        for i in range(CLIENTS):
            y = assign(network(), w)
            for batch in batches(i, t):
                a = mixes[i]
                blend = assign(network(), [a * o + (1 - a) * p for o, p in zip(v[i], params(y), strict=True)])
                at_blend, at_shared = gradients(blend, batch), gradients(y, batch)
                if adapts:
                    slope = sum(float(((o - p) * g).sum()) for o, p, g in zip(v[i], params(y), at_blend, strict=True))
                    mixes[i] = min(1.0, max(0.0, a - RATE * slope))
                v[i] = [o - RATE * a * g for o, g in zip(v[i], at_blend, strict=True)]
                assign(y, [p - RATE * g for p, g in zip(params(y), at_shared, strict=True)])
            models.append(params(y))
        w = [sum(n * p for n, p in zip(sizes, ps, strict=True)) / sum(sizes) for ps in zip(*models, strict=True)]
    options = {"mix": 0.3, "adapts": adapts}
    assert_equals(run(FedAvg(), tmp_path, algorithm="apfl", algorithm_options=options), w)
    for own, wanted in zip(kept(tmp_path, "own"), v, strict=True):
        assert_equals(own, wanted)


def test_moon_is_equation_3_of_the_paper(tmp_path: Path) -> None:
    weight, temperature = 0.8, 0.5
    w = params(start())
    last = [params(start()) for _ in range(CLIENTS)]  # before a client's first round: the initial model
    sizes = [len(d) for d in DATA]

    def features(module: Any, inputs: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(module[0](inputs))
        return hidden

    for t in range(1, ROUNDS + 1):
        models = []
        for i in range(CLIENTS):
            y, received, before = assign(network(), w), assign(network(), w), assign(network(), last[i])
            for inputs, targets in batches(i, t):
                z = features(y, inputs)
                near = torch.cosine_similarity(z, features(received, inputs).detach()) / temperature
                far = torch.cosine_similarity(z, features(before, inputs).detach()) / temperature
                contrast = -torch.log(near.exp() / (near.exp() + far.exp())).mean()
                loss = nn.functional.cross_entropy(y(inputs), targets) + weight * contrast
                step = torch.autograd.grad(loss, list(y.parameters()))
                assign(y, [p - RATE * g for p, g in zip(params(y), step, strict=True)])
            last[i] = params(y)
            models.append(params(y))
        w = [sum(n * p for n, p in zip(sizes, ps, strict=True)) / sum(sizes) for ps in zip(*models, strict=True)]
    options = {"weight": weight, "temperature": temperature}
    assert_equals(run(FedAvg(), tmp_path, algorithm="moon", algorithm_options=options), w)


def test_scaffold_with_one_step_is_fedavg_with_its_correction(tmp_path: Path) -> None:
    """With one full-batch step and everyone taking part, corrections cancel in the mean: FedAvg by client."""
    state = run(Scaffold(), tmp_path, algorithm="scaffold", steps=1, shuffle=False, drop_last=True)
    plain = run(FedAvg(by_examples=False), tmp_path / "plain", steps=1, shuffle=False, drop_last=True)
    assert_equals(state, list(plain.values()))
