"""A model of one number."""

from torch import nn


def make_model() -> nn.Module:
    return nn.Linear(1, 1, bias=False)
