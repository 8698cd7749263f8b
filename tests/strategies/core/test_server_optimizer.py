"""Server optimisers give the same results as torch's optimisers, also if their state is stored between rounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from corymb.strategies import Model, ServerOptimizer
from corymb.strategies.core.serialization import pack_memory, unpack_memory
from corymb.strategies.core.yogi import Yogi

STEPS = [
    ServerOptimizer(),
    ServerOptimizer("SGD", 0.5, {"momentum": 0.9}),
    ServerOptimizer("SGD", 0.5, {"momentum": 0.9, "nesterov": True}),
    ServerOptimizer("Adam", 0.01, {"betas": (0.9, 0.99), "eps": 1e-3}),
    ServerOptimizer("AdamW", 0.01),
    ServerOptimizer("Adagrad", 0.1, {"eps": 1e-3}),
    ServerOptimizer("RMSprop", 0.01),
    ServerOptimizer("Yogi", 0.01),
]


@pytest.mark.parametrize("step", STEPS, ids=repr)
@pytest.mark.parametrize("stored", [False, True])
def test_steps_equal_those_of_torch(step: ServerOptimizer, stored: bool) -> None:
    """With `stored`, the optimiser's state is stored and loaded after each round."""
    generator = torch.Generator().manual_seed(0)
    alone = torch.randn(6, generator=generator).requires_grad_()
    model, memory = Model(alone.detach().clone()), step.initial()
    kinds: dict[str, Any] = {"Yogi": Yogi}
    optimizer = (kinds.get(step.optimizer) or getattr(torch.optim, step.optimizer))(
        [alone], lr=step.learning_rate, **step.options
    )
    for _ in range(5):
        target = torch.randn(6, generator=generator)
        alone.grad = alone.detach() - target
        optimizer.step()
        model, memory = step.step(model, Model(target), memory)
        if stored:
            plain, tensors = pack_memory(memory)
            memory = unpack_memory(
                step.initial(), json.loads(json.dumps(plain)), load(save(tensors)) if tensors else {}
            )
        assert torch.equal(model.parameters, alone.detach())


def test_a_round_that_leaves_the_model_unchanged_makes_no_step() -> None:
    step = ServerOptimizer("SGD", 1.0, {"momentum": 0.9})
    model, memory = step.step(Model(torch.zeros(2)), Model(torch.ones(2)), step.initial())
    assert step.step(model, model, memory) == (model, memory)
    same = Model(model.parameters.clone())
    assert step.step(model, same, memory) == (same, memory)


def test_wrong_settings_are_refused() -> None:
    for unfit in ("LBFGS", "SparseAdam"):
        with pytest.raises(ValueError, match=f"server optimiser '{unfit}' cannot be used"):
            ServerOptimizer(unfit)
    with pytest.raises(ValueError, match=r"server optimiser 'Adamm' cannot be used"):
        ServerOptimizer("Adamm")
    with pytest.raises(ValueError, match=r"server optimiser 'SGD' cannot be used with options \{'momentun': 1\}"):
        ServerOptimizer("SGD", 1.0, {"momentun": 1})
    with pytest.raises(ValueError, match="learning_rate is 0; use a positive"):
        ServerOptimizer(learning_rate=0)
