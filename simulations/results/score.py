"""The number that ranks the rules of an experiment: a metric of the task, at the server or at the clients."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan

from corymb.protocol.task_settings import LOWER_IS_BETTER
from corymb.simulations.experiments.experiment import Experiment

VIRTUAL = "virtual-seconds"  # note of a round: the virtual time at its end
AT_CLIENTS = "clients-"  # before the name of a metric: its mean over the clients' own tests
NEW = "new-clients-"  # the same over clients that took no part in the training
NEW_CLIENT = "new-client"  # metric of the test of such a client


@dataclass(frozen=True)
class Score:
    """A metric by `name`; `key` is its name in the records of rounds.

    `beside_clients` is True for a test at the server whose score stands beside that of the clients.
    """

    name: str
    key: str
    beside_clients: bool = False

    @classmethod
    def of(cls, experiment: Experiment) -> Score:
        """Return the score of `experiment`: its task's first metric."""
        return cls.all_of(experiment)[0]

    @classmethod
    def all_of(cls, experiment: Experiment) -> list[Score]:
        """Return the score of `experiment`, and then the further metrics of its task, measured at the same place.

        With tests at the clients, the last one is the score of the shared model on the server's test set.
        """
        names = experiment.task.metric_names
        if not experiment.evaluate.clients:
            return [cls(name, name) for name in names]
        return [*(cls(name, AT_CLIENTS + name) for name in names), cls(names[0], names[0], beside_clients=True)]

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower value is better, as of an error."""
        return self.name in LOWER_IS_BETTER

    @property
    def is_percent(self) -> bool:
        """Whether the metric is shown in percent."""
        return self.name.endswith("accuracy")

    @property
    def title(self) -> str:
        """The metric in words, for tables and axes."""
        place = "clients' mean test" if self.key.startswith(AT_CLIENTS) else "test"
        return f"{place} {self.name}{' %' if self.is_percent else ''}"

    @property
    def short_title(self) -> str:
        """The metric in a table that says elsewhere where it is measured."""
        return f"{'shared model' if self.beside_clients else self.name}{' %' if self.is_percent else ''}"

    def shown(self, value: float) -> float:
        """Return `value` in the unit of tables."""
        return 100 * value if self.is_percent else value

    def text(self, value: float) -> str:
        """Return `value` as tables show it."""
        return f"{100 * value:.2f}" if self.is_percent else (f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}")

    def rank(self, value: float) -> float:
        """Return a number that is larger for a better value, and least for NaN, as of a model that has diverged."""
        return -inf if isnan(value) else -value if self.lower_is_better else value


ACCURACY = Score("accuracy", "accuracy")
