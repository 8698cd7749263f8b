"""The tests of a model at every client, each on its own test part, also at clients that are offline or new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import make_client_app
from corymb.protocol.flower import unchecked_messages
from corymb.protocol.records import ARRAYS, CONFIG, ROUND
from corymb.server.rounds.codes import ADMITTED
from corymb.server.rounds.door import Door
from corymb.server.rounds.record import Verdict
from corymb.simulations.data.population import Population
from corymb.simulations.experiments.scenario import Scenario
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.results.score import AT_CLIENTS, NEW, NEW_CLIENT
from corymb.strategies import Layout, Report


class ClientTests:
    """Tests models at the clients of `scenario` on their examples in `tests`, in `workers` processes.

    The clients evaluate with the run config `config`, as they do in a deployment: a client algorithm may adapt the
    model first, with what the client keeps. Hostile clients are not tested.
    """

    def __init__(
        self, model: Callable[[], nn.Module], scenario: Scenario, tests: Population, config: Mapping[str, Any],
        workers: int,
    ) -> None:  # fmt: skip
        train = scenario.population
        self._tested = [k for k in range(len(tests)) if tests.size(k) and k not in scenario.hostile]
        self._scenario, self._names = scenario, [scenario.names[k] for k in self._tested]

        def data(context: Any) -> tuple[TensorDataset, TensorDataset]:
            client = int(context.node_config["partition-id"])
            return TensorDataset(*train.examples(client)), TensorDataset(*tests.examples(client))

        self._grid = LocalGrid(
            make_client_app(model, data), self._names, run_config=config, workers=workers,
            node_config=lambda row: {"partition-id": self._tested[row]},
        )  # fmt: skip

    def close(self) -> None:
        """End the processes."""
        self._grid.close()

    def verdicts(self, arrays: ArrayRecord, server_round: int) -> tuple[Verdict, ...]:
        """Return the metrics of every client for the model `arrays` after round `server_round`.

        Raises `ValueError` if a client cannot evaluate the model.
        """
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({ROUND: server_round})})
        ids = self._grid.get_node_ids()
        names = dict(zip(ids, self._names, strict=True))
        messages = unchecked_messages(content, ids, MessageType.EVALUATE, str(server_round))
        door, found = Door(Layout(())), []
        for message, reply in zip(messages, self._grid.send_and_receive(messages), strict=True):
            report = door.admit_metrics(names[message.metadata.dst_node_id], reply)
            if not isinstance(report, Report):
                raise ValueError(f"A client cannot test the model: {report.reason}")
            mark = {NEW_CLIENT: 1.0} if report.node in self._scenario.new_names else {}
            found.append(Verdict(report.node, ADMITTED, "", report.examples, None, {**report.metrics, **mark}))
        return tuple(found)

    def summary(self, verdicts: Iterable[Verdict]) -> dict[str, float]:
        """Return the means of all metrics over the clients, each client counting once, and over the new clients."""
        verdicts, new = list(verdicts), set(self._scenario.new_names)
        groups = (
            (AT_CLIENTS, [v for v in verdicts if v.node not in new]),
            (NEW, [v for v in verdicts if v.node in new]),
        )
        return {
            prefix + name: value
            for prefix, group in groups
            for name, value in means([v.metrics for v in group]).items()
            if name not in ("seconds", NEW_CLIENT)
        }


def means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over those that have it."""
    names = sorted({name for each in metrics for name in each})
    return {name: float(np.mean([each[name] for each in metrics if name in each])) for name in names}
