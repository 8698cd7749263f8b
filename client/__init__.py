"""The client: local training and evaluation as a Flower ClientApp."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corymb.client.algorithms.algorithm import ClientAlgorithm, Correction, Local
    from corymb.client.app import make_client_app
    from corymb.client.memory import answer_from_memory
    from corymb.client.trainer import evaluate, train
    from corymb.protocol.shared_state import shared_state
    from corymb.protocol.train_settings import TrainSettings

__all__ = [
    "ClientAlgorithm", "Correction", "Local", "TrainSettings", "answer_from_memory", "evaluate", "make_client_app",
    "shared_state", "train",
]  # fmt: skip
_PLACES = {
    "ClientAlgorithm": "corymb.client.algorithms.algorithm",
    "Correction": "corymb.client.algorithms.algorithm",
    "Local": "corymb.client.algorithms.algorithm",
    "shared_state": "corymb.protocol.shared_state",
    "make_client_app": "corymb.client.app",
    "answer_from_memory": "corymb.client.memory",
    "evaluate": "corymb.client.trainer",
    "train": "corymb.client.trainer",
    "TrainSettings": "corymb.protocol.train_settings",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: the programs of a deployment need no torch, which takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
