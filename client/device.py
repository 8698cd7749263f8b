"""Selection of the device for training and evaluation."""

from __future__ import annotations

import torch


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`. "auto" selects CUDA if it is available, else MPS, else the CPU.

    Raises `ValueError` if the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Device {name!r} is not available: {str(error).splitlines()[0]}") from None
    return device
