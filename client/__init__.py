"""The client: local training and evaluation as a Flower ClientApp."""

from corymb.client.app import make_client_app
from corymb.client.memory import answer_from_memory
from corymb.client.trainer import evaluate, train
from corymb.protocol.train_settings import TrainSettings

__all__ = ["TrainSettings", "answer_from_memory", "evaluate", "make_client_app", "train"]
