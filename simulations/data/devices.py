"""The table `[devices]`: how long clients compute and how fast they send, for rounds in virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from corymb.protocol.settings import Settings

Amounts = NDArray[np.float64]


class Between(Settings):
    """A number for each client, drawn so that its logarithm is uniform between two bounds."""

    low: float = Field(gt=0)
    """The least."""
    high: float = Field(gt=0)
    """The greatest."""

    @model_validator(mode="after")
    def _check(self) -> Between:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")
        return self


Positive = Annotated[float, Field(gt=0)]
Amount = Positive | list[Positive] | Between


class DevicesSettings(Settings):
    """How long clients compute and how fast they send, in virtual time.

    A number holds for all clients; a list is a trace, given out in turn; `{low, high}` draws one for each client.
    """

    seconds_per_example: Amount | None = None
    """Seconds of training on an example. Default: no virtual time."""
    download: Amount = inf
    """Bytes per second from the server."""
    upload: Amount = inf
    """Bytes per second to the server."""
    drop_out: float = Field(0.0, ge=0, lt=1)
    """The probability that a client drops out during a round: it trains and does not reply."""
    deadline: float = Field(inf, gt=0)
    """The virtual seconds that a round waits for replies."""
    wait_for: float = Field(1.0, gt=0, le=1)
    """The share of the sampled clients that a round waits for."""
    buffer: int = Field(0, ge=0)
    """Asynchronous: the model changes after so many replies, and no one waits for others (FedBuff, Nguyen et al.
    2022); 1 is FedAsync (Xie et al. 2019). 0: rounds."""
    concurrency: int = Field(0, ge=0)
    """Asynchronous: the number of clients that train at a time; 0: the experiment's fraction of all clients."""
    staleness: float = Field(0.5, ge=0)
    """Asynchronous: an update that was begun s versions ago counts with the factor (1 + s)^(-staleness)."""
    max_staleness: int = Field(20, ge=0)
    """Asynchronous: an update that was begun more versions ago does not count."""

    @model_validator(mode="after")
    def _check(self) -> DevicesSettings:
        if self.seconds_per_example is None and self.model_dump(exclude_defaults=True):
            raise ValueError("set seconds_per_example, which the other keys need")
        if self.buffer and (self.deadline < inf or self.wait_for < 1):
            raise ValueError("devices.buffer has no rounds, so leave out deadline and wait_for")
        return self

    @property
    def is_timed(self) -> bool:
        """Whether there is virtual time."""
        return self.seconds_per_example is not None

    def make(self, clients: int, rng: np.random.Generator) -> Devices:
        """Return the devices of so many clients."""
        return Devices(
            _drawn(self.seconds_per_example or inf, clients, rng),
            _drawn(self.download, clients, rng),
            _drawn(self.upload, clients, rng),
            self.drop_out,
        )


@dataclass(frozen=True)
class Devices:
    """The clients' devices: seconds per example, and bytes per second from and to the server, each `[N]`."""

    seconds_per_example: Amounts
    download: Amounts
    upload: Amounts
    drop_out: float = 0.0

    def seconds(self, client: int, examples: int, down: int, up: int) -> float:
        """Return how long a client takes to receive `down` bytes, train on `examples` and send `up` bytes."""
        compute = float(self.seconds_per_example[client]) * examples
        return down / float(self.download[client]) + compute + up / float(self.upload[client])


def _drawn(amount: Amount, clients: int, rng: np.random.Generator) -> Amounts:
    if isinstance(amount, Between):
        return np.exp(rng.uniform(log(amount.low), log(amount.high), clients))
    values = amount if isinstance(amount, list) else [amount]
    return np.array([values[client % len(values)] for client in range(clients)], dtype=np.float64)
