"""The ClientApp of a site, made from a model function and a data function."""

from functools import cache

import torch
from flwr.app import Context
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from corymb.client import make_client_app
from quickstart.model import make_model


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


def load_data(context: Context) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and evaluation examples of a site. A fifth of its digits is held out for evaluation."""
    pixels, labels = digits()
    site, sites = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    rows = torch.arange(site, len(labels), sites)
    held_out = torch.arange(len(rows)) % 5 == 0
    train, test = rows[~held_out], rows[held_out]
    return TensorDataset(pixels[train], labels[train]), TensorDataset(pixels[test], labels[test])


app = make_client_app(make_model, load_data)
