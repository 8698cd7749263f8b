"""The ClientApp of a hospital, which reads one of the UCI heart disease files (13 columns and the diagnosis)."""

import csv
from functools import cache

import torch
from flwr.app import Context
from torch.utils.data import TensorDataset

from corymb.client import make_client_app
from hospitals.model import make_model

USED = [0, 1, 3, 4, 5, 7, 8, 9]  # numbers: age, sex, blood pressure, cholesterol, sugar, pulse, angina, ST depression
MEAN = torch.tensor([53.0, 0.7, 132.0, 210.0, 0.15, 138.0, 0.4, 0.9])  # the same at all hospitals
DEVIATION = torch.tensor([9.5, 0.45, 18.5, 100.0, 0.35, 26.0, 0.5, 1.1])
CATEGORIES = {2: 4, 6: 3}  # chest pain (1 to 4) and ECG at rest (0 to 2), with their numbers of values
DIAGNOSIS = 13


@cache
def patients(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs `[n, 15]` and whether each patient is ill `[n]`. Patients with missing cells are left out."""
    with open(path, newline="") as file:
        rows = [[row[column] for column in range(14)] for row in csv.reader(file) if row]
    known = [row for row in rows if "?" not in row[:10] + row[DIAGNOSIS:]]
    table = torch.tensor([[float(cell) if cell != "?" else 0.0 for cell in row] for row in known])
    numbers = (table[:, USED] - MEAN) / DEVIATION
    groups = [torch.nn.functional.one_hot(table[:, c].long() - int(c == 2), n).float() for c, n in CATEGORIES.items()]
    return torch.cat([numbers, *groups], dim=1), (table[:, DIAGNOSIS] > 0).long()


def load_data(context: Context) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and evaluation patients of a hospital, whose file is `data` in its node config."""
    inputs, ill = patients(str(context.node_config["data"]))
    held_out = torch.arange(len(ill)) % 4 == 0
    return TensorDataset(inputs[~held_out], ill[~held_out]), TensorDataset(inputs[held_out], ill[held_out])


app = make_client_app(make_model, load_data)
