"""Models of the kinds that the field trains, for the workload: small ResNets, recurrent networks, transformers."""

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


def resnet8(norm: Callable[[int], nn.Module], colours: int = 1) -> nn.Module:
    """Return ResNet-8 for images with this many `colours`, with 16, 32 and 64 channels."""
    return nn.Sequential(
        nn.Conv2d(colours, 16, 3, 1, 1, bias=False), norm(16), nn.ReLU(),
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


class Adapted(nn.Module):
    """A linear layer that is not trained, with a low-rank adapter: of `up @ down`, only `up` is trained."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4) -> None:
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inputs) / rank, requires_grad=False)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self.frozen(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return outputs


class CausalLayer(nn.Module):
    """A layer of a transformer that reads text from the left, with adapters on all its matrices."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_one, self.norm_two = (nn.LayerNorm(width).requires_grad_(False) for _ in range(2))
        self.attention, self.mix = Adapted(width, 3 * width), Adapted(width, width)
        self.widen, self.narrow = Adapted(width, 2 * width), Adapted(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs `[B, T, width]`."""
        batch, length, width = x.shape
        split = self.attention(self.norm_one(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.narrow(nn.functional.gelu(self.widen(self.norm_two(x))))
        return result


class Text(nn.Module):
    """Predicts the next token at every place of a text, `[B, T]` to `[B, T, tokens]`."""

    def __init__(self, body: nn.Module, width: int, hidden: int, tokens: int = 64) -> None:
        super().__init__()
        self.tokens, self.body, self.last = nn.Embedding(tokens, width), body, nn.Linear(hidden, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        found = self.body(self.tokens(x))
        scores: Tensor = self.last(found[0] if isinstance(self.body, nn.GRU) else found)
        return scores


def adapted_transformer() -> nn.Module:
    """Return two layers of width 64 with four heads, of which only the adapters are trained."""
    text = Text(nn.Sequential(CausalLayer(64, 4), CausalLayer(64, 4)), 64, 64)
    for part in (text.tokens, text.last):
        part.requires_grad_(False)
    return text


FIELD: dict[str, Callable[[], nn.Module]] = {
    "resnet_batch_norm": lambda: resnet8(nn.BatchNorm2d),
    "resnet_group_norm": lambda: resnet8(lambda channels: nn.GroupNorm(8, channels)),
    "gru": lambda: RecurrentRows(nn.GRU(64, 64, batch_first=True), 64),
    "resnet_cifar": lambda: resnet8(nn.BatchNorm2d, 3),
    "gru_text": lambda: Text(nn.GRU(64, 128, batch_first=True), 64, 128),
    "lora": adapted_transformer,
    "transformer": lambda: Rows(transformer(), 64),
}


def field_model(name: str) -> nn.Module:
    """Return the model called `name`, always with the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return FIELD[name]()
