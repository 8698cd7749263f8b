"""Batches of a client's examples, in an order that depends on the seed."""

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
    """Return the number of examples."""
    return len(data.dataset if isinstance(data, DataLoader) else data)  # type: ignore[arg-type]


def training_batches(data: Examples, settings: TrainSettings, generator: torch.Generator) -> Iterator[Batch]:
    """Yield the batches of one round: `settings.steps` batches, or those of `settings.epochs` (default 1).

    Every epoch shuffles a dataset again with `generator`; a DataLoader keeps its own order.
    Raises `ValueError` if there are no examples, or if the DataLoader yields no batch.
    """
    if settings.steps is not None:
        yield from islice(_epochs(data, settings, generator, None), settings.steps)
    else:
        yield from _epochs(data, settings, generator, settings.epochs or 1)


def _epochs(data: Examples, settings: TrainSettings, generator: torch.Generator, epochs: int | None) -> Iterator[Batch]:
    """Yield the batches of `epochs` epochs; without end if None."""
    epoch = 0
    while epochs is None or epoch < epochs:
        epoch += 1
        if isinstance(data, DataLoader):
            yield from _require_batches(data)
            continue
        for rows in shuffled_rows(count(data), settings, generator):
            yield _take(data, rows)


def shuffled_rows(examples: int, settings: TrainSettings, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the indices of the examples in each batch of one epoch. `examples` is the number of examples."""
    batches: tuple[Tensor, ...] = _order(examples, settings, generator).split(settings.batch_size)
    return batches


def draw_rows(examples: int, settings: TrainSettings, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Return the indices of the examples in all batches of one round, concatenated, and the length of each batch."""
    order = _order(examples, settings, generator)
    full, rest = divmod(len(order), settings.batch_size)
    lengths = [settings.batch_size] * full + [rest] * bool(rest)
    epochs = -(-settings.steps // len(lengths)) if settings.steps is not None else settings.epochs or 1
    if epochs > 1:
        order = torch.cat([order, *(_order(examples, settings, generator) for _ in range(epochs - 1))])
    lengths = (lengths * epochs)[: settings.steps]
    return order[: sum(lengths)], lengths


def _order(examples: int, settings: TrainSettings, generator: torch.Generator) -> Tensor:
    """Return the indices of the examples of one epoch, in training order. With `drop_last`, some are left out."""
    if not examples:
        raise ValueError("The client has no training examples; give it at least one, or leave it out of training.")
    order = torch.randperm(examples, generator=generator) if settings.shuffle else torch.arange(examples)
    full = examples - examples % settings.batch_size  # examples in full batches
    return order[:full] if settings.drop_last and full else order


def _require_batches(loader: DataLoader[Batch]) -> Iterator[Batch]:
    batch = None
    for batch in loader:
        yield batch
    if batch is None:
        raise ValueError("The DataLoader yields no batch; give it more examples, or set drop_last=False.")


def evaluation_batches(data: Examples, size: int = 1024) -> Iterator[Batch]:
    """Yield all examples once, in order, in batches of `size`; a DataLoader keeps its own batches.

    The batches of a TensorDataset are views, because a test set may be large. Raises `ValueError` if the model
    changed such a batch in place.
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
                    "The model changes its inputs in place, and so changes the evaluation examples; change a copy."
                )
        return
    for rows in torch.arange(count(data)).split(size):
        yield _take(data, rows)


def _take(data: Dataset[Batch], rows: Tensor) -> Batch:
    if isinstance(data, TensorDataset):  # 100 times faster than one example at a time
        inputs, targets = data.tensors
        return inputs[rows], targets[rows]
    inputs, targets = default_collate([data[row] for row in rows.tolist()])
    return inputs, targets
