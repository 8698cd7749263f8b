"""The vectors of a client algorithm, in two forms: whole, and as coordinates over each client's examples.

Under plain SGD, the gradients of a first linear layer are combinations `F^T X` of a client's own examples X, with
factors F, and so is what SCAFFOLD and FedDyn keep of that layer. Where clients have few examples, they keep F, and
their weights need never be written out. An algorithm that is linear works on such coordinates as on
whole vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from corymb.client.algorithms.algorithm import Memory
from corymb.client.algorithms.memory_files import OVER_EXAMPLES
from corymb.client.local_work import PERSONAL
from corymb.simulations.data.population import Population
from corymb.simulations.engine.block_result import BlockResult
from corymb.simulations.engine.client_layers import parameter_of
from corymb.simulations.engine.gram_weights import GramOffset, GramWeights
from corymb.strategies import Layout
from corymb.strategies.core.layout import Entry

ROUNDING = 1e-6  # a share below it is zero


class Vectors(Protocol):
    """The vectors of K clients in one of the forms, D numbers each."""

    start: Tensor
    """The start that is common to all clients, `[D]`."""
    second: Tensor | None
    """The rule's second vector, `[D]`, if it sends one."""

    def stacked(self, memories: Sequence[Memory]) -> dict[str, Tensor]:
        """Return an algorithm's vectors of all clients, `[K, D]`; zeros for a client that has none."""

    def offsets(self, offset: Tensor) -> dict[str, Any]:
        """Return `offset [K, D]` or `[D]` as the argument of `Trainer.train`."""

    def ends(self, result: BlockResult) -> Tensor:
        """Return the models after training, `[K, D]`."""

    def kept(self, vectors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """Return what client number `row` keeps of `vectors [K, D]`."""


class Whole:
    """Vectors in full: the parameters at the positions `columns` of a vector of `layout`, which are shared."""

    def __init__(
        self, layout: Layout, columns: Tensor | slice, parameters: Mapping[str, Tensor], second: Tensor | None,
        clients: int,
    ) -> None:  # fmt: skip
        self._layout, self._columns, self._clients = layout, columns, clients
        self.start = layout.vector(parameters)[columns]
        self.second = None if second is None else second[columns]

    def stacked(self, memories: Sequence[Memory]) -> dict[str, Tensor]:
        """See `Vectors`."""
        names = {name for memory in memories for name in memory if not name.startswith(f"{PERSONAL}.")}
        zeros = torch.zeros_like(self.start)
        return {name: torch.stack([memory.get(name, zeros) for memory in memories]) for name in names}

    def offsets(self, offset: Tensor) -> dict[str, Any]:
        """See `Vectors`; zero for the parameters that are not shared."""
        whole = offset.to(self._layout.dtype).expand(self._clients, -1)
        if isinstance(self._columns, Tensor):
            shared, whole = whole, whole.new_zeros(self._clients, self._layout.num_parameters)
            whole[:, self._columns] = shared
        return self._layout.split(whole)

    def ends(self, result: BlockResult) -> Tensor:
        """See `Vectors`."""
        return result.models()[:, self._columns]

    def kept(self, vectors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """See `Vectors`."""
        return {name: each[row] for name, each in vectors.items()}


class Coordinates:
    """Vectors as the numbers of all layers but the `first`, the factors `[N, out]` of that layer, and two shares in it.

    In the first layer, the vector is `F^T X + share * start + share * second`; its bias belongs to an input that is
    one. A client with n examples keeps the part before the shares, with n rows of factors. `clients` are numbers in
    `population`.
    """

    def __init__(
        self, first: str, layout: Layout, parameters: Mapping[str, Tensor], second: Tensor | None,
        population: Population, clients: Sequence[int],
    ) -> None:  # fmt: skip
        self._first, self._layout, self._population, self._clients = first, layout, population, clients
        self._weight = next(entry for entry in layout.parameters if entry.name == parameter_of(first, "weight"))
        self._others = _all_but(first, layout)
        self._rows = max(population.size(client) for client in clients)
        self._second = {} if second is None else layout.split(second)
        self.start = self._common((1.0, 0.0), parameters)
        self.second = None if second is None else self._common((0.0, 1.0), self._second)

    def _common(self, shares: tuple[float, float], vector: Mapping[str, Tensor]) -> Tensor:
        others = [vector[entry.name].flatten() for entry in self._others]
        zeros = vector[self._weight.name].new_zeros(self._rows * self._weight.shape[0])
        return torch.cat([*others, zeros, zeros.new_tensor(shares)])

    def stacked(self, memories: Sequence[Memory]) -> dict[str, Tensor]:
        """See `Vectors`. Raises `ValueError` if a client's examples have changed."""
        found: dict[str, Tensor] = {}
        for row, (client, memory) in enumerate(zip(self._clients, memories, strict=True)):
            for key, values in memory.items():
                name = _Key.read(key, self._population, client).vector
                if name not in found:
                    found[name] = self.start.new_zeros(len(memories), len(self.start))
                found[name][row, : len(values)] = values
        return found

    def offsets(self, offset: Tensor) -> dict[str, Any]:
        """See `Vectors`."""
        offset = offset.expand(len(self._clients), -1)
        others, factors, shares = offset.tensor_split([self._length(0), self._length(self._rows)], dim=1)
        second = (self._second.get(parameter_of(self._first, kind)) for kind in ("weight", "bias"))
        first = GramOffset(factors.unflatten(1, (self._rows, -1)), float(shares[0, 1]), *second)
        return {self._weight.name: first, **_split(others, self._others)}

    def ends(self, result: BlockResult) -> Tensor:
        """See `Vectors`."""
        forms = dict(zip([entry.name for entry in self._layout.parameters], result.parameters, strict=True))
        first = forms[self._weight.name]
        assert isinstance(first, GramWeights)
        others = [forms[entry.name].dense() for entry in self._others]
        parts = [*others, first.factors, first.alpha, first.share.to(first.alpha.dtype)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def kept(self, vectors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """See `Vectors`. Raises `ValueError` if a vector has a share of the start or of the rule's second vector."""
        client, found = self._clients[row], {}
        for name, each in vectors.items():
            if any(abs(share) > ROUNDING for share in each[row, -2:].tolist()):
                raise ValueError("The client algorithm keeps more than gradients; set its keeps_gradients to False.")
            key = _Key(name, self._first, self._population.fingerprint(client))
            found[str(key)] = each[row, : self._length(self._population.size(client))]
        return found

    def _length(self, examples: int) -> int:
        """Return the length of the numbers of all other layers and of the factors over so many examples."""
        return sum(entry.stop - entry.start for entry in self._others) + examples * self._weight.shape[0]


@dataclass(frozen=True)
class _Key:
    """The name under which a client keeps the coordinates of a `vector` of its algorithm, without the shares.

    `first` is the name of the first layer, and `fingerprint` that of the client's examples.
    """

    vector: str
    first: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.vector}{OVER_EXAMPLES}{self.fingerprint}.{self.first}"

    @classmethod
    def read(cls, key: str, population: Population, client: int) -> _Key:
        """Return the parts of `key`. Raises `ValueError` if the client's examples have changed."""
        vector, _, rest = key.partition(OVER_EXAMPLES)
        fingerprint, _, first = rest.partition(".")
        if fingerprint != population.fingerprint(client):
            raise ValueError(
                f"The examples of client {client} have changed since it kept what its algorithm needs; begin the run "
                "anew."
            )
        return cls(vector, first, fingerprint)


def is_over_examples(memory: Memory) -> bool:
    """Return whether a client keeps its vectors as coordinates."""
    return any(OVER_EXAMPLES in key for key in memory)


def written_out(memory: Memory, layout: Layout, population: Population, client: int) -> dict[str, Tensor]:
    """Return what a client keeps, with vectors in full. Raises `ValueError` if its examples have changed."""
    if not is_over_examples(memory):
        return dict(memory)
    found = {}
    for key, values in memory.items():
        kept = _Key.read(key, population, client)
        inputs, others = population.flat_inputs(client).cpu(), _all_but(kept.first, layout)
        rest, factors = values.tensor_split([sum(entry.stop - entry.start for entry in others)])
        factors = factors.view(len(inputs), -1)
        first = {"weight": factors.T @ inputs, "bias": factors.sum(dim=0)}
        state = {parameter_of(kept.first, kind): values for kind, values in first.items()}
        found[kept.vector] = layout.vector({**state, **_split(rest, others)})
    return found


def _all_but(first: str, layout: Layout) -> list[Entry]:
    """Return the parameters of all layers but the `first`."""
    names = [parameter_of(first, kind) for kind in ("weight", "bias")]
    return [entry for entry in layout.parameters if entry.name not in names]


def _split(rest: Tensor, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return views of `rest [..., R]`, one per entry, by name."""
    pieces = rest.split([entry.stop - entry.start for entry in entries], dim=-1)
    return {e.name: piece.reshape(*rest.shape[:-1], *e.shape) for e, piece in zip(entries, pieces, strict=True)}
