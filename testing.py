"""Check a rule against the requirements on all rules, in any test suite: `corymb.testing.check_rule(MyRule())`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.scaffold import checks, declared_checks
from corymb.simulations.scaffold.fixtures import CLIENTS, equal_memories, make_module, make_proxy
from corymb.strategies import Layout, Rule


def check_rule(rule: Rule[Any]) -> None:
    """Raise `AssertionError` for the first requirement that `rule` violates; the message names it.

    The requirements are those on all rules (order of replies, empty rounds, stored memory, dtypes, ...) and the
    properties that the rule declares: `preserves_consensus`, `shift_equivariant`, `scale_equivariant`, `tolerates`. The
    test clients are "site-00" to "site-10" and report the metrics "loss", "accuracy" and "steps", with a different
    value each; and positive numbers for `needs_metrics`. The rule gets proxy data with a small classifier.
    """
    for check in CHECKS:
        check(rule)


def check_flower_start(rule: Rule[Any]) -> None:
    """Flower's own `Strategy.start` gives the same model and memory as `FlowerStrategy.start`."""
    results = []
    for start in (FlowerStrategy.start, Strategy.start):
        grid = LocalGrid(_noisy_app(rule.needs_metrics), [f"site-{i:02d}" for i in range(CLIENTS)])
        layout = Layout.of_module(make_module())
        strategy = FlowerStrategy(
            rule, fraction_evaluate=0, proxy=make_proxy(), buffers=[entry.name for entry in layout.buffers]
        )
        results.append(
            (start(strategy, grid, to_arrays(make_module().state_dict()), num_rounds=2).arrays, strategy.state.memory)
        )
    (arrays_one, memory_one), (arrays_two, memory_two) = results
    one, two = to_state(arrays_one), to_state(arrays_two)
    same = all(torch.equal(one[name], two[name]) for name in one) and equal_memories(memory_one, memory_two)
    checks.require(same, f"{rule}: Flower's own Strategy.start gives a different model or memory.")


def _noisy_app(needed: Iterable[str]) -> ClientApp:
    """Return an app whose clients add their own random numbers to the model, and report the `needed` metrics."""
    app = ClientApp()

    @app.train()
    def _train(message: Message, context: Any) -> Message:
        client = int(context.node_config["partition-id"])
        generator = torch.Generator().manual_seed(client)
        arrays = next(record for record in message.content.values() if isinstance(record, ArrayRecord))
        rounds = next(record for record in message.content.values() if isinstance(record, ConfigRecord))
        state = {
            name: t + 0.1 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in to_state(arrays).items()
        }
        own = {"num-examples": 3 + client, "accuracy": 0.5, "loss": float(len(rounds)), "steps": 1.0 + client}
        metrics = MetricRecord({**own, **dict.fromkeys(needed, 1.0 + client)})
        return Message(RecordDict({"arrays": to_arrays(state), "metrics": metrics}), reply_to=message)

    return app


CHECKS: tuple[Callable[[Rule[Any]], None], ...] = (
    checks.check_frozen_dataclass,
    checks.check_repeatability,
    checks.check_reply_order,
    checks.check_recorded_weights,
    checks.check_extreme_reply,
    checks.check_model_parts,
    checks.check_empty_round,
    declared_checks.check_single_reply,
    declared_checks.check_unanimous,
    declared_checks.check_equivariance,
    checks.check_example_counts,
    checks.check_zero_updates,
    checks.check_inputs_unchanged,
    checks.check_proxy_unchanged,
    checks.check_resumed_run,
    checks.check_half_precision,
    declared_checks.check_tolerated_attacks,
    declared_checks.check_privacy_modes,
    check_flower_start,
)
