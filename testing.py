"""What every rule promises, as one call for any test suite: `corymb.testing.check_rule(MyRule())`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.scaffold import promises
from corymb.simulations.scaffold.fixtures import CLIENTS, alike, make_module, make_proxy
from corymb.strategies import Layout, Rule


def check_rule(rule: Rule[Any]) -> None:
    """Raise `AssertionError` for the first promise that `rule` breaks, in a sentence that says which.

    The promises are those of all rules (order of replies, empty rounds, memory at rest, dtypes, ...) and what the
    rule declares: `unanimous`, `shift_equivariant`, `scale_equivariant`, `tolerates`. Sites are called "site-00"
    to "site-10", report "accuracy" and "steps", and a proxy with a small classifier is at hand.
    """
    for check in CHECKS:
        check(rule)


def flowers_own_start_gives_the_same(rule: Rule[Any]) -> None:
    results = []
    for start in (FlowerStrategy.start, Strategy.start):
        grid = LocalGrid(_drifting_app(), [f"site-{i:02d}" for i in range(CLIENTS)])
        layout = Layout.of_module(make_module())
        strategy = FlowerStrategy(
            rule, fraction_evaluate=0, proxy=make_proxy(), buffers=[entry.name for entry in layout.buffers]
        )
        results.append(
            (start(strategy, grid, to_arrays(make_module().state_dict()), num_rounds=2).arrays, strategy.state.memory)
        )
    (one, memory), (two, other) = results
    left, right = to_state(one), to_state(two)
    same = all(torch.equal(left[name], right[name]) for name in left) and alike(memory, other)
    assert same, f"{rule}: under Flower's own start() the result is another."


def _drifting_app() -> ClientApp:
    """Sites that add a little of their own to what they get."""
    app = ClientApp()

    @app.train()
    def _train(message: Message, context: Any) -> Message:
        site = int(context.node_config["partition-id"])
        generator = torch.Generator().manual_seed(site)
        arrays = next(record for record in message.content.values() if isinstance(record, ArrayRecord))
        rounds = next(record for record in message.content.values() if isinstance(record, ConfigRecord))
        state = {
            name: t + 0.1 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in to_state(arrays).items()
        }
        metrics = MetricRecord({"num-examples": 3 + site, "accuracy": 0.5, "loss": float(len(rounds))})
        return Message(RecordDict({"arrays": to_arrays(state), "metrics": metrics}), reply_to=message)

    return app


CHECKS: tuple[Callable[[Rule[Any]], None], ...] = (
    promises.it_is_a_frozen_record_of_its_settings,
    promises.the_order_of_replies_does_not_matter,
    promises.how_a_model_is_cut_does_not_matter,
    promises.an_empty_round_keeps_the_model,
    promises.a_single_site_gets_its_model,
    promises.replies_that_agree_are_the_model,
    promises.it_moves_and_scales_with_the_models,
    promises.zero_and_huge_counts_of_examples_are_harmless,
    promises.sites_that_stand_still_are_harmless,
    promises.inputs_are_left_as_they_were,
    promises.the_servers_data_are_left_as_they_were,
    promises.a_resumed_run_is_the_same,
    promises.half_precision_is_read_and_kept,
    promises.hostile_replies_that_it_tolerates_do_not_carry_it_away,
    promises.it_serves_the_privacy_that_its_kind_can,
    flowers_own_start_gives_the_same,
)
