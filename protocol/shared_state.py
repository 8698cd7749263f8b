"""Which entries of a model travel between server and clients, and which stay at each client."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from corymb.protocol.train_settings import TrainSettings

LAST_LAYER, BATCH_NORM = "@last-layer", "@batch-norm"  # patterns for layers that are found by their kind
MOST_NAMES = 8  # of the model's entries in an error
PERSONAL_BY_DEFAULT = {"fedper": [LAST_LAYER], "fedrep": [LAST_LAYER], "fedbn": [BATCH_NORM]}  # by algorithm


def personal_names(module: nn.Module, settings: TrainSettings) -> set[str]:
    """Return the entries of the state dict that each client trains for itself.

    `settings.personal` names them, or else the algorithm does: FedPer and FedRep the last layer with parameters, FedBN
    the layers of batch normalisation. Raises `ValueError` for a pattern that matches no entry.
    """
    names = list(module.state_dict())
    personal: set[str] = set()
    for pattern in settings.personal or PERSONAL_BY_DEFAULT.get(settings.algorithm, []):
        found = _matching(module, pattern, names)
        if not found and pattern == BATCH_NORM:
            raise ValueError(
                f"The model has no batch normalisation for the clients to keep (personal = {pattern!r}); choose "
                "another model or algorithm."
            )
        if not found:
            raise ValueError(
                f"personal = {pattern!r} matches no entry of the model, which has {', '.join(names[:MOST_NAMES])}"
                f"{', ...' * (len(names) > MOST_NAMES)}."
            )
        if pattern == LAST_LAYER and found == set(names):
            raise ValueError(
                f"The model has only one layer, which stays at the clients (personal = {pattern!r}), so nothing would "
                "be shared; choose a deeper model, or the rule 'local'."
            )
        personal |= found
    return personal


def fixed_names(module: nn.Module) -> set[str]:
    """Return the parameters that are not trained. They do not travel: every client makes the same ones."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def shared_state(module: nn.Module, settings: TrainSettings) -> dict[str, Tensor]:
    """Return the part of the state dict that travels: all entries but the personal ones and those that are not trained.

    A server begins with it: `strategy.start(grid, to_arrays(shared_state(module, settings)), ...)`.
    """
    home = personal_names(module, settings) | fixed_names(module)
    return {name: tensor for name, tensor in module.state_dict().items() if name not in home}


def _matching(module: nn.Module, pattern: str, names: Collection[str]) -> set[str]:
    if pattern == BATCH_NORM:
        return _inside(names, [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)])
    if pattern == LAST_LAYER:
        return _inside(names, [n for n, m in module.named_modules() if list(m.parameters(recurse=False))][-1:])
    return {name for name in names if fnmatchcase(name, pattern)}


def _inside(names: Collection[str], layers: Sequence[str]) -> set[str]:
    return {name for name in names if name.rpartition(".")[0] in layers}
