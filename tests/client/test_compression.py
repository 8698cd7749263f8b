"""Compressed updates from the client through the door: what is sent, what is restored, and what is left for later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, make_client_app
from corymb.client.algorithms.memory_files import recall
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.compression import CompressionSettings
from corymb.server import FlowerStrategy, RoundRecord
from corymb.server.rounds.door import Door
from corymb.server.rounds.rejections import Rejection
from corymb.simulations import LocalGrid
from corymb.strategies import FedAvg, Layout, Reply
from corymb.tests.support import reply


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 2))


def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    inputs = torch.randn(64, 6, generator=generator)
    examples = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())
    return examples, examples


def run(
    folder: Path, rounds: int = 4, clients: int = 4, **compression: Any
) -> tuple[dict[str, Tensor], list[RoundRecord]]:
    settings = TrainSettings(batch_size=16, learning_rate=0.1, **compression)
    grid = LocalGrid(
        make_client_app(network, data), clients, run_config={**settings.flat(), "client-memory": str(folder)}
    )
    records: list[RoundRecord] = []
    buffers = [name for name, tensor in network().named_buffers() if tensor.is_floating_point()]
    strategy = FlowerStrategy(
        FedAvg(), fraction_evaluate=0, on_round=records.append, buffers=buffers, min_available_nodes=1
    )
    result = strategy.start(grid, to_arrays(network().state_dict()), rounds)
    grid.require_replies()
    return to_state(result.arrays), records


CODECS = [
    {"kind": "top_k", "share": 0.1}, {"kind": "drop", "share": 0.3}, {"kind": "quantize", "bits": 8},
    {"kind": "quantize", "bits": 4}, {"kind": "sign"}, {"kind": "fp8"},
]  # fmt: skip


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_training_goes_on_with_fewer_bytes(codec: dict[str, Any], tmp_path: Path) -> None:
    plain, whole = run(tmp_path / "plain")
    state, records = run(tmp_path, compression=codec)
    assert all(len(record.admitted) == 4 for record in records)
    losses = [record.train["loss"] for record in records]
    assert losses[-1] < losses[0]
    if codec["kind"] in ("quantize", "fp8"):  # these keep every number
        change = torch.cat([(state[n] - t).flatten() for n, t in network().state_dict().items() if "0.w" in n])
        wanted = torch.cat([(plain[n] - t).flatten() for n, t in network().state_dict().items() if "0.w" in n])
        assert torch.cosine_similarity(change, wanted, dim=0) > 0.95
    assert all(verdict.bytes_up < whole[0].bytes_up / 4 / 1.2 for verdict in records[0].admitted)
    assert records[0].bytes_down == whole[0].bytes_down > 0


def test_what_is_sent_and_what_is_kept_are_the_update(tmp_path: Path) -> None:
    """With one client, the model's change is what was sent; with error feedback, the rest is kept for the next time."""
    start = network().state_dict()
    parameters = [name for name, _ in network().named_parameters()]
    plain, _ = run(tmp_path / "plain", 1, clients=1)
    sent, _ = run(tmp_path / "top", 1, clients=1, compression=CompressionSettings(kind="top_k", share=0.05))
    (folder,) = (tmp_path / "top").iterdir()
    change, update = (torch.cat([(s[n] - start[n]).flatten() for n in parameters]) for s in (sent, plain))
    residual = recall(folder, 1)["residual"]
    assert int((change != 0).sum()) <= round(0.05 * len(update))
    torch.testing.assert_close(change + residual, update, rtol=0, atol=1e-6)
    run(tmp_path / "drop", 1, clients=1, compression=CompressionSettings(kind="drop"))
    assert not (tmp_path / "drop").exists()  # unbiased, so nothing is kept


def test_a_compressed_update_is_checked_at_the_door() -> None:
    state = network().state_dict()
    layout = Layout.of_module(network())
    sent = layout.flatten(state)
    codec = CompressionSettings(kind="top_k", share=0.5)
    rest = {name: state[name] for name in state if name.startswith("1.") and name not in ("1.weight", "1.bias")}
    update = torch.arange(layout.num_parameters) / 100.0

    def judged(tensors: dict[str, Tensor], config: dict[str, Any]) -> Reply | Rejection:
        content = RecordDict({
            "arrays": to_arrays(rest), "update": to_arrays(tensors), "metrics": MetricRecord({"num-examples": 3}),
            "compression": ConfigRecord(config),
        })  # fmt: skip
        return Door(layout).admit("a", reply(1, content), sent)

    tensors = codec.compress(update, torch.Generator())
    good = judged(tensors, {"kind": "top_k", "share": 0.5})
    assert isinstance(good, Reply)
    torch.testing.assert_close(good.vector(torch.float32), sent.parameters + codec.restore(tensors, len(update)))
    wrong: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({**tensors, "values": tensors["values"] * float("inf")}, {"kind": "top_k"}, "not-finite"),
        ({**tensors, "places": tensors["places"] + 9999}, {"kind": "top_k"}, "shape"),
        (tensors, {"kind": "zip"}, "shape"),
        (tensors, {"kind": "sign"}, "shape"),
        ({}, {"kind": "fp8"}, "shape"),
    ]
    for tensors_sent, config, code in wrong:
        verdict = judged(tensors_sent, config)
        assert isinstance(verdict, Rejection)
        assert verdict.code == code
        assert "\n" not in verdict.reason


def test_a_reply_without_its_update_is_refused() -> None:
    layout = Layout.of_module(network())
    content = RecordDict({
        "arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": 3}),
        "compression": ConfigRecord({"kind": "sign"}),
    })  # fmt: skip
    message: Message = reply(1, content)
    verdict = Door(layout).admit("a", message, layout.flatten(network().state_dict()))
    assert isinstance(verdict, Rejection)
    assert "lacks the record 'update'" in verdict.reason
