"""Batches of a client's examples, in an order that depends on the seed, and what a module and a loss get of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from corymb.protocol.train_settings import TrainSettings

# (inputs, targets); (inputs, more inputs, ..., targets); or a dict. Each part is a tensor [B, ...], or tensors in
# tuples, lists and dicts.
Batch = Any
Examples = Dataset[Batch] | DataLoader[Batch]


def count(data: Examples) -> int | None:
    """Return the number of examples in an epoch; None for a DataLoader that does not know it.

    A DataLoader may use fewer examples than its dataset has: its sampler and `drop_last` decide.
    """
    if not isinstance(data, DataLoader):
        return len(data)  # type: ignore[arg-type]
    if data.batch_size is None or isinstance(data.dataset, IterableDataset):  # own batch sampler, or a stream
        return None
    examples = len(data.sampler)  # type: ignore[arg-type]
    return examples - examples % data.batch_size if data.drop_last else examples


def size(batch: Batch) -> int:
    """Return the number of examples in a batch. Raises `ValueError` if the batch has no tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    for part in parts:
        return size(part)
    raise ValueError(f"A batch holds a {type(batch).__name__}; give tensors, or tuples, lists and dicts of tensors.")


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with all tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: on_device(part, device) for name, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(on_device(part, device) for part in batch)
    return batch


def outputs_and_targets(module: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Return the outputs of `module` for a batch, and what the loss compares them with.

    The module gets all parts but the last, which are the targets. It gets the entries of a dict as keyword arguments,
    and the loss the whole dict. Raises `ValueError` for a batch that has no targets.
    """
    if isinstance(batch, Mapping):
        return module(**batch), batch
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(f"A batch is a {type(batch).__name__} without targets; give (inputs, targets), or a dict.")
    *inputs, targets = batch
    return module(*inputs), targets


def augmented(batches: Iterable[Batch], augment: Callable[[Any], Any]) -> Iterator[Batch]:
    """Yield `batches` with their inputs, the first part, changed by `augment`; it gets a dict as a whole."""
    for batch in batches:
        yield augment(batch) if isinstance(batch, Mapping) else (augment(batch[0]), *batch[1:])


def training_batches(
    data: Examples, settings: TrainSettings, generator: torch.Generator, no_single: bool = False
) -> Iterator[Batch]:
    """Yield the batches of one round: `settings.steps` batches, or those of `settings.epochs` (default 1).

    Every epoch shuffles a dataset again with `generator`; a DataLoader keeps its own order. With `no_single`, for
    modules with BatchNorm, a last batch of one example joins the batch before it.
    Raises `ValueError` if there are no examples, or if the DataLoader yields no batch.
    """
    if settings.steps is not None:
        yield from islice(_epochs(data, settings, generator, None, no_single), settings.steps)
    else:
        yield from _epochs(data, settings, generator, settings.epochs or 1, no_single)


def _epochs(
    data: Examples, settings: TrainSettings, generator: torch.Generator, epochs: int | None, no_single: bool
) -> Iterator[Batch]:
    """Yield the batches of `epochs` epochs; without end if None."""
    epoch = 0
    while epochs is None or epoch < epochs:
        epoch += 1
        if isinstance(data, DataLoader):
            yield from _require_batches(data)
            continue
        batches = shuffled_rows(len(data), settings, generator)  # type: ignore[arg-type]
        if no_single and len(batches) > 1 and len(batches[-1]) == 1:
            batches = (*batches[:-2], torch.cat(batches[-2:]))
        for rows in batches:
            yield _take(data, rows)


def shuffled_rows(examples: int, settings: TrainSettings, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the indices of the examples in each batch of one epoch. `examples` is the number of examples."""
    batches: tuple[Tensor, ...] = _order(examples, settings, generator).split(settings.batch_size)
    return batches


def draw_rows(
    examples: int, settings: TrainSettings, generator: torch.Generator, no_single: bool = False
) -> tuple[Tensor, list[int]]:
    """Return the indices of the examples in all batches of one round, concatenated, and the length of each batch.

    `no_single` is that of `training_batches`.
    """
    order = _order(examples, settings, generator)
    full, rest = divmod(len(order), settings.batch_size)
    lengths = [settings.batch_size] * full + [rest] * bool(rest)
    if no_single and full and rest == 1:
        lengths[-2:] = [settings.batch_size + 1]
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


def evaluation_batches(data: Examples, batch_size: int = 1024) -> Iterator[Batch]:
    """Yield all examples once, in order, in batches of `batch_size`; a DataLoader keeps its own batches.

    The batches of a TensorDataset are views, because a test set may be large. Raises `ValueError` if the model
    changed such a batch in place.
    """
    if isinstance(data, DataLoader):
        yield from data
        return
    if isinstance(data, TensorDataset):
        for batch in zip(*(tensor.split(batch_size) for tensor in data.tensors), strict=True):
            before = [tensor._version for tensor in batch]
            yield batch
            if [tensor._version for tensor in batch] != before:
                raise ValueError(
                    "The model changes its inputs in place, and so changes the evaluation examples; change a copy."
                )
        return
    for rows in torch.arange(len(data)).split(batch_size):  # type: ignore[arg-type]
        yield _take(data, rows)


def _take(data: Dataset[Batch], rows: Tensor) -> Batch:
    if isinstance(data, TensorDataset):  # 100 times faster than one example at a time
        return tuple(tensor[rows] for tensor in data.tensors)
    return default_collate([data[row] for row in rows.tolist()])
