"""Checks of what a rule declares: consensus, equivariance, tolerated attacks, privacy modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from corymb.simulations.scaffold.checks import require
from corymb.simulations.scaffold.fixtures import (
    CLIENTS,
    close,
    first_model,
    learnt_vector,
    one_round,
    replies_to,
    with_parts,
)  # fmt: skip
from corymb.strategies import BlindRule, Reply, Rule, VotingRule
from corymb.strategies.core.rows import SingleRow

MAX_MOVE = 10.0  # under attack, the model may move by this multiple of the longest honest update


def check_single_reply(rule: Rule[Any]) -> None:
    """If the rule preserves consensus, a single reply is the next model; a voting rule keeps the old model."""
    origin = first_model()
    replies = replies_to(origin, clients=1)
    outcome = one_round(rule, origin, replies, known=())
    require(
        bool(learnt_vector(rule, outcome).isfinite().all()),
        f"{rule}: after a single reply, the model is not finite.",
    )
    if rule.preserves_consensus and "too-few-replies" not in outcome.notes:
        expected = origin.parameters if isinstance(rule, VotingRule) else replies[0].parts[0]
        model = outcome.model.parameters
        require(
            close(model, expected),
            f"{rule}: the next model differs from the only reply; if that is "
            "intended, declare preserves_consensus = False.",
        )


def check_unanimous(rule: Rule[Any]) -> None:
    """If the rule preserves consensus and all replies are equal, the next model equals them."""
    if not rule.preserves_consensus or isinstance(rule, VotingRule):
        return
    origin = first_model()
    same = [with_parts(r, *replies_to(origin)[0].parts) for r in replies_to(origin)]
    model = one_round(rule, origin, list(same)).model.parameters
    require(
        close(model, same[0].parts[0]),
        f"{rule}: all replies are equal, and the next model differs from them; if that is intended, declare "
        "preserves_consensus = False.",
    )


def check_equivariance(rule: Rule[Any]) -> None:
    """Shifting or scaling all models shifts or scales the outcome, if the rule declares so."""
    origin = first_model(torch.float64)
    replies = replies_to(origin)
    plain = learnt_vector(rule, one_round(rule, origin, list(replies)))
    for declared, name, factor, offset in (
        (rule.shift_equivariant, "shift", 1.0, 0.75),
        (rule.scale_equivariant, "scale", 4.0, 0.0),
    ):
        if declared:
            moved = [with_parts(r, factor * r.parts[0] + offset) for r in replies]
            start = replace(origin, parameters=factor * origin.parameters + offset)
            vector = learnt_vector(rule, one_round(rule, start, moved))
            same = close(vector, factor * plain + offset, 1e-9)
            require(same, f"{rule}: it is not {name}-equivariant; declare {name}_equivariant = False.")


def check_tolerated_attacks(rule: Rule[Any]) -> None:
    """As many hostile replies as `tolerates` declares cannot move the model far.

    The attacks differ in length and direction, in the numbers of the hostile clients, and in whether the round is the
    first one.
    """
    origin = first_model()
    honest = replies_to(origin)
    hostile = rule.tolerates(CLIENTS)
    if not hostile:
        return
    memory = one_round(rule, origin, replies_to(origin, 1)).memory
    limit = MAX_MOVE * max(1.0, *(float((r.parts[0] - origin.parameters).norm()) for r in honest))
    ones = torch.ones_like(origin.parameters)
    attacks: dict[str, Callable[[int, Tensor], Tensor]] = {
        f"all shifted by {length:g}": lambda i, model, length=length: origin.parameters + length * ones  # type: ignore[misc]
        for length in (3, 30, 300, 1e4, 1e19)
    }
    attacks["each shifted differently"] = lambda i, model: (
        origin.parameters + 1e4 * (i + 1) * (model - origin.parameters)
    )
    attacks["updates reversed"] = lambda i, model: origin.parameters - 1e3 * (model - origin.parameters)
    for name, attack in attacks.items():
        for first, before in ((0, None), (CLIENTS - hostile, None), (2, memory)):
            rows = {(first + i) % CLIENTS for i in range(hostile)}
            replies = [
                Reply(
                    replace(r.report, examples=2**53, metrics={"accuracy": 1e99, "steps": -1e99}),
                    SingleRow((attack(i, r.parts[0]),)),
                    0,
                    torch.full_like(r.buffers, 1e19),
                )
                if i in rows
                else r
                for i, r in enumerate(honest)
            ]
            model = one_round(rule, origin, replies, before).model
            moved = float((model.parameters.double() - origin.parameters).norm())
            replies_text = f"{hostile} hostile replies of {CLIENTS} ({name}, from reply {first} on)"
            require(
                moved <= limit,
                f"{rule}: {replies_text} move the model by {moved:g}, more than {limit:g}; tolerates is too high.",
            )
            require(float(model.buffers.abs().max()) <= 1e6, f"{rule}: {replies_text} move the buffers beyond 1e6.")


def check_privacy_modes(rule: Rule[Any]) -> None:
    """Only a rule that sees no models declares the privacy mode "masked"."""
    masked = "masked" in rule.privacy_modes
    require(
        masked <= isinstance(rule, BlindRule),
        f"{rule}: it sees models, so privacy_modes cannot contain 'masked'.",
    )
