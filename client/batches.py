"""Batches of a site's examples, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from corymb.protocol.train_settings import TrainSettings

Batch = tuple[Tensor, ...]  # inputs [B, ...] and targets [B, ...]
Examples = Dataset[Batch] | DataLoader[Batch]


def count(data: Examples) -> int:
    """How many examples there are."""
    return len(data.dataset if isinstance(data, DataLoader) else data)  # type: ignore[arg-type]


def training_batches(data: Examples, settings: TrainSettings, generator: torch.Generator) -> Iterator[Batch]:
    """The batches of one round: `settings.steps` of them, or those of `settings.epochs` (default 1).

    Every pass over a dataset is shuffled anew by `generator`; a DataLoader keeps its own order.
    """
    if settings.steps is not None:
        yield from islice(_passes(data, settings, generator, None), settings.steps)
    else:
        yield from _passes(data, settings, generator, settings.epochs or 1)


def _passes(data: Examples, settings: TrainSettings, generator: torch.Generator, epochs: int | None) -> Iterator[Batch]:
    passed = 0
    while epochs is None or passed < epochs:
        passed += 1
        if isinstance(data, DataLoader):
            yield from _not_empty(data)
            continue
        for rows in shuffled_rows(count(data), settings, generator):
            yield _take(data, rows)


def shuffled_rows(examples: int, settings: TrainSettings, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The rows of each batch of one pass over so many `examples`."""
    batches: tuple[Tensor, ...] = _order(examples, settings, generator).split(settings.batch_size)
    return batches


def drawn_rows(examples: int, settings: TrainSettings, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """The rows of all batches of one round, one after another, and the length of each batch."""
    order = _order(examples, settings, generator)
    whole, rest = divmod(len(order), settings.batch_size)
    lengths = [settings.batch_size] * whole + [rest] * bool(rest)
    passes = -(-settings.steps // len(lengths)) if settings.steps is not None else settings.epochs or 1
    if passes > 1:
        order = torch.cat([order, *(_order(examples, settings, generator) for _ in range(passes - 1))])
    lengths = (lengths * passes)[: settings.steps]
    return order[: sum(lengths)], lengths


def _order(examples: int, settings: TrainSettings, generator: torch.Generator) -> Tensor:
    """The order in which one pass takes the examples that it takes."""
    if not examples:
        raise ValueError("The site has no examples to train on; give it some, or leave it out.")
    order = torch.randperm(examples, generator=generator) if settings.shuffle else torch.arange(examples)
    whole = examples - examples % settings.batch_size
    return order[:whole] if settings.drop_last and whole else order


def _not_empty(loader: DataLoader[Batch]) -> Iterator[Batch]:
    batch = None
    for batch in loader:
        yield batch
    if batch is None:
        raise ValueError("The DataLoader gives no batch; give it more examples, or drop_last=False.")


def evaluation_batches(data: Examples, size: int = 1024) -> Iterator[Batch]:
    """All examples, once, in order.

    Raises `ValueError` where a model has changed them in place: a tensor's batches are views, as a test set is large.
    """
    if isinstance(data, DataLoader):
        yield from data
        return
    if isinstance(data, TensorDataset):
        for batch in zip(*(tensor.split(size) for tensor in data.tensors), strict=True):
            before = batch[0]._version
            yield batch
            if batch[0]._version != before:
                raise ValueError(
                    "The model changes its inputs in place, which are the examples; let it work on a copy."
                )
        return
    for rows in torch.arange(count(data)).split(size):
        yield _take(data, rows)


def _take(data: Dataset[Batch], rows: Tensor) -> Batch:
    if isinstance(data, TensorDataset):  # a hundred times faster than row by row
        inputs, targets = data.tensors
        return inputs[rows], targets[rows]
    inputs, targets = default_collate([data[row] for row in rows.tolist()])
    return inputs, targets
