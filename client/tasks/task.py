"""A task: the loss and the metrics of a model's outputs, made from the table `[task]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from corymb.client.tasks import losses
from corymb.client.tasks.losses import IGNORED, like_targets, plain_outputs, plain_targets
from corymb.client.tasks.metrics import Metric, named_metrics
from corymb.protocol.task_settings import METRICS, TaskSettings
from corymb.strategies.core.registry import import_reference

Loss = Callable[[Any, Any], Tensor]
Correct = Callable[[Any, Any], Tensor | None]
RUNNING = ("accuracy", "perplexity")  # metrics that need no more than sums over batches
_OF_CLASSES = ("accuracy", "balanced-accuracy", "f1", "auroc", "ece")
FITTING = {  # the metrics that each kind may have
    **METRICS,
    "classification": _OF_CLASSES,
    "binary": _OF_CLASSES,
    "multilabel": ("accuracy", "f1", "auroc", "ece"),
}
CLASS_LOSSES = (nn.functional.cross_entropy, nn.functional.nll_loss)


@dataclass(frozen=True)
class Task:
    """What a model predicts.

    `loss(outputs, targets)` is a scalar. `losses`, if there is one, gives each example's loss, `[B]`, whose mean is the
    loss. `correct` gives the number of correct examples of a batch, and `hits` whether each is correct, `[B]`, or its
    share of correct positions; None if that has no meaning. `metrics` need all outputs of an evaluation, or what `kept`
    makes of those of a batch.
    """

    loss: Loss = nn.functional.cross_entropy
    losses: Loss | None = None
    correct: Correct = lambda outputs, targets: None
    hits: Correct = lambda outputs, targets: None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    kept: Callable[[Tensor], Tensor] = lambda outputs: outputs
    has_perplexity: bool = False


def task_of_loss(loss: Loss) -> Task:
    """Return the task of a user's own `loss`: its metrics are the loss and, for class scores, the accuracy."""
    return Task(loss, correct=partial(correct_share, loss=loss))


CLASSIFICATION = Task(
    nn.functional.cross_entropy,
    losses.classification,
    lambda o, t: correct_share(o, t, nn.functional.cross_entropy),
    lambda o, t: _class_hits(o, t),
)


@lru_cache(maxsize=64)
def _of_kind(kind: str, quantiles: tuple[float, ...]) -> Task:
    """Return the task of a kind without metrics."""
    one_each: dict[str, Loss] = {
        "segmentation": losses.classification,
        "tokens": losses.tokens,
        "binary": losses.binary,
        "multilabel": losses.binary,
        "regression": losses.regression,
        "quantile": partial(losses.quantile, quantiles=quantiles),
    }
    hits: dict[str, Correct] = {
        "segmentation": _class_hits,
        "tokens": lambda o, t: _class_hits(o.transpose(1, -1), t),
        "binary": _sign_hits,
        "multilabel": _sign_hits,
    }
    if kind == "survival":
        return Task(_with_plain(losses.survival))
    own, right = one_each[kind], _with_plain(hits.get(kind, lambda o, t: None))
    return Task(
        _with_plain(lambda outputs, targets: own(outputs, targets).mean()),
        own,
        lambda outputs, targets: None if (found := right(outputs, targets)) is None else found.sum(),
        right,
        kept=(lambda outputs: outputs.argmax(dim=1)) if kind == "segmentation" else (lambda outputs: outputs),
        has_perplexity=kind == "tokens",
    )


def make_task(settings: TaskSettings) -> Task:
    """Return the task of `settings`. Raises `ValueError` for a metric that does not exist or cannot be imported."""
    task = CLASSIFICATION if settings.kind == "classification" else _of_kind(settings.kind, tuple(settings.quantiles))
    known = named_metrics(settings.quantiles)
    metrics: dict[str, Metric] = {}
    references = dict(zip(settings.metric_names, settings.metrics or settings.metric_names, strict=True))
    for name, reference in references.items():
        if ":" in reference:
            metrics[name] = import_reference(reference, "metric")
        elif reference in known:
            if reference not in FITTING[settings.kind]:
                fitting = ", ".join(FITTING[settings.kind])
                raise ValueError(f"The metric {reference!r} does not fit task.kind = {settings.kind!r}; use {fitting}.")
            metrics[name] = known[reference]
        elif reference not in RUNNING:
            names = ", ".join(sorted([*known, *RUNNING]))
            raise ValueError(f"The metric {reference!r} is unknown; choose one of {names}, or 'module:function'.")
    own = {"loss": import_reference(settings.loss, "loss"), "losses": None} if settings.loss else {}
    return Task(**{**vars(task), **own, "metrics": metrics})


def _with_plain(function: Any) -> Any:
    """Return `function` for any outputs and batches from which tensors can be taken; see `plain_outputs`."""

    def wrapped(outputs: Any, targets: Any) -> Any:
        return function(plain_outputs(outputs), plain_targets(targets))

    return wrapped


def _sign_hits(outputs: Tensor, targets: Tensor) -> Tensor:
    right = (like_targets(outputs, targets) > 0) == (targets > 0.5)
    return right.flatten(1).double().mean(dim=1) if right.dim() > 1 else right.double()


def _class_hits(outputs: Tensor, targets: Tensor) -> Tensor:
    counted = targets != IGNORED
    right = (outputs.argmax(dim=1) == targets) & counted
    if right.dim() == 1:
        return right.double()
    return right.flatten(1).sum(dim=1).double() / counted.flatten(1).sum(dim=1).clamp(min=1)


def correct_share(outputs: Any, targets: Any, loss: Loss) -> Tensor | None:
    """Return how many examples of a batch are classified correctly; None if the outputs are not clearly class scores.

    Scores `[B, C]` of two or more classes with whole numbers `[B]` as targets are. With one of torch's losses for
    classes, scores `[B, C, ...]` with targets `[B, ...]` are, too; an example then counts with the share of its
    positions.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    if outputs.dim() != targets.dim() + 1 or targets.dim() < 1 or outputs.shape[1] < 2:
        return None
    is_class_loss = loss in CLASS_LOSSES or isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
    if outputs.shape[0] != targets.shape[0] or (targets.dim() > 1 and not is_class_loss):
        return None
    counted = targets != IGNORED
    correct = ((outputs.detach().argmax(dim=1) == targets) & counted).sum()
    return correct * (len(targets) / counted.sum().clamp(min=1))
