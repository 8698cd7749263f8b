"""The client: local training and evaluation as a Flower ClientApp."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corymb.client.app import make_client_app
    from corymb.client.memory import answer_from_memory
    from corymb.client.trainer import evaluate, train
    from corymb.protocol.train_settings import TrainSettings

__all__ = ["TrainSettings", "answer_from_memory", "evaluate", "make_client_app", "train"]
_PLACES = {
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
