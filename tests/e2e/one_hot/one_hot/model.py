"""The model: one number for each site in each round."""

import torch

SITES, MOST_ROUNDS = 3, 64


class OneHot(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.nn.Parameter(torch.zeros(MOST_ROUNDS, SITES))


def make_model() -> torch.nn.Module:
    return OneHot()
