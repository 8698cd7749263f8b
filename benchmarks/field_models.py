"""Models of the kinds that the field trains, for the workload: a small ResNet, a recurrent network, a transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions with norms, and a connection around them."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.one, self.norm_one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.two, self.norm_two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        self.around = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        hidden = self.norm_one(self.one(x)).relu()
        result: Tensor = (self.norm_two(self.two(hidden)) + self.around(x)).relu()
        return result


def resnet8(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Return ResNet-8 for images with one channel, with 16, 32 and 64 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), norm(16), nn.ReLU(),
        Residual(16, 16, norm), Residual(16, 32, norm), Residual(32, 64, norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Rows(nn.Module):
    """Reads an image as a sequence of 28 rows, and classifies what `body` makes of the last one."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(28, width), body, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores `[B, 10]`."""
        scores: Tensor = self.last(self.hidden(self.first(x[:, 0]))[:, -1])
        return scores

    def hidden(self, sequence: Tensor) -> Tensor:
        """Return the outputs of the body, `[B, 28, width]`."""
        outputs: Tensor = self.body(sequence)
        return outputs


class RecurrentRows(Rows):
    """`Rows` with a recurrent body, which also returns its state."""

    def hidden(self, sequence: Tensor) -> Tensor:
        """Return the outputs of the body, `[B, 28, width]`."""
        outputs, _ = self.body(sequence)
        return outputs  # type: ignore[no-any-return]


def transformer() -> nn.Module:
    """Return two layers of width 64 with four heads, without dropout."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


FIELD: dict[str, Callable[[], nn.Module]] = {
    "resnet_batch_norm": lambda: resnet8(nn.BatchNorm2d),
    "resnet_group_norm": lambda: resnet8(lambda channels: nn.GroupNorm(8, channels)),
    "gru": lambda: RecurrentRows(nn.GRU(64, 64, batch_first=True), 64),
    "transformer": lambda: Rows(transformer(), 64),
}


def field_model(name: str) -> nn.Module:
    """Return the model called `name`, always with the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return FIELD[name]()
