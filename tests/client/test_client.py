from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from corymb.client import TrainSettings, evaluate, make_client_app, train
from corymb.client.batches import Examples, evaluation_batches, training_batches
from corymb.client.device import choose_device
from corymb.protocol.codec import to_arrays, to_state
from corymb.simulations.grid.local_grid import LocalGrid

INPUTS = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(23) % 3
DATA = TensorDataset(INPUTS, TARGETS)


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """The same examples as a dataset that returns one at a time."""

    def __len__(self) -> int:
        return len(TARGETS)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return INPUTS[row], TARGETS[row]


def sizes(settings: TrainSettings, data: Examples = DATA) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return [len(targets) for _, targets in training_batches(data, settings, generator)]


def test_batches() -> None:
    assert sizes(TrainSettings(batch_size=10)) == [10, 10, 3]
    assert sizes(TrainSettings(batch_size=10, epochs=2)) == [10, 10, 3] * 2
    assert sizes(TrainSettings(batch_size=10, epochs=2, drop_last=True)) == [10] * 4
    assert sizes(TrainSettings(batch_size=10, steps=5, drop_last=True)) == [10] * 5
    assert sizes(TrainSettings(batch_size=50, steps=2, drop_last=True)) == [23] * 2
    assert sizes(TrainSettings(steps=4), DataLoader(Rows(), batch_size=10)) == [10, 10, 3, 10]


def test_no_examples_raise_an_error_instead_of_an_endless_loop() -> None:
    empty = TensorDataset(INPUTS[:0], TARGETS[:0])
    for data in (empty, DataLoader(Rows(), batch_size=50, drop_last=True)):
        with pytest.raises(ValueError, match=r"has no training examples|yields no batch"):
            sizes(TrainSettings(steps=2), data)


def test_each_epoch_is_shuffled_and_complete() -> None:
    settings = TrainSettings(batch_size=23, epochs=2)
    generator = torch.Generator().manual_seed(1)
    first, second = (inputs for inputs, _ in training_batches(DATA, settings, generator))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(dim=0).values, second.sort(dim=0).values)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
def test_training_equals_a_plain_training_loop(options: dict[str, Any]) -> None:
    settings = TrainSettings(batch_size=8, epochs=2, learning_rate=0.2, optimizer_options=options)
    torch.manual_seed(0)
    module, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    reference.load_state_dict(module.state_dict())
    metrics = train(module, training_batches(DATA, settings, torch.Generator().manual_seed(5)), settings)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2, **options)
    losses, hits = [], 0
    for inputs, targets in training_batches(DATA, settings, torch.Generator().manual_seed(5)):
        optimizer.zero_grad()
        outputs = reference(inputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(targets))
        hits += int((outputs.argmax(1) == targets).sum())
    assert torch.equal(module.weight, reference.weight)
    assert metrics["loss"] == pytest.approx(sum(losses) / 46)
    assert metrics["accuracy"] == pytest.approx(hits / 46)
    assert metrics["seconds"] > 0


def test_examples_read_one_at_a_time_give_the_same_batches() -> None:
    settings = TrainSettings(batch_size=8)
    for one, two in zip(
        training_batches(DATA, settings, torch.Generator().manual_seed(2)),
        training_batches(Rows(), settings, torch.Generator().manual_seed(2)),
        strict=True,
    ):
        assert torch.equal(one[0], two[0])
    module = nn.Linear(4, 3)
    whole, rows = evaluate(module, evaluation_batches(DATA)), evaluate(module, evaluation_batches(Rows(), 5))
    assert whole["loss"] == pytest.approx(rows["loss"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_any_torch_optimiser_learns(optimizer: str) -> None:
    module = nn.Linear(4, 3)
    settings = TrainSettings(optimizer=optimizer, learning_rate=0.05, epochs=30)
    before = evaluate(module, evaluation_batches(DATA))["loss"]
    train(module, training_batches(DATA, settings, torch.Generator()), settings)
    assert evaluate(module, evaluation_batches(DATA))["loss"] < before


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_and_keeps_float32_weights(precision: Any) -> None:
    module = nn.Linear(4, 3)
    settings = TrainSettings(precision=precision, epochs=20)
    metrics = train(module, training_batches(DATA, settings, torch.Generator()), settings)
    assert module.weight.dtype == torch.float32
    assert metrics["loss"] < 1.3


def test_schedules_make_one_step_per_round() -> None:
    settings = TrainSettings(learning_rate=0.8, schedule="StepLR", schedule_options={"step_size": 2, "gamma": 0.5})
    assert [settings.rate(number) for number in (5, 1, 2, 3, 4)] == [0.2, 0.8, 0.8, 0.4, 0.4]
    assert TrainSettings(learning_rate=0.8).rate(100) == 0.8
    warm = TrainSettings(learning_rate=0.1, schedule="LinearLR", schedule_options={"start_factor": 0.1})
    assert warm.rate(1) == pytest.approx(0.01)
    steps = TrainSettings(schedule="MultiStepLR", schedule_options={"milestones": [1]})
    assert steps.rate(2) == pytest.approx(0.01)
    assert TrainSettings.read({"train.optimizer": "Adam", "train.optimizer_options.betas": [0.5, 0.9]})


def test_settings_can_be_written_to_and_read_from_a_run_config() -> None:
    settings = TrainSettings(steps=3, optimizer="Adam", optimizer_options={"eps": 1e-6}, seed=4)
    flat = settings.flat()
    assert flat == {
        "train.steps": 3,
        "train.optimizer": "Adam",
        "train.optimizer_options.eps": 1e-6,
        "train.seed": 4,
    }
    assert TrainSettings.read({"other": 1, **flat}) == settings
    assert TrainSettings.read(flat, {"train.steps": 9}).steps == 9
    by_epochs = TrainSettings.read(flat, {"train.epochs": 2})  # the later config decides
    assert (by_epochs.epochs, by_epochs.steps) == (2, None)
    by_steps = TrainSettings.read({"train.epochs": 2}, flat)
    assert (by_steps.epochs, by_steps.steps) == (None, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train.learning_rate": 0.0, "train.batch_sise": 3}, r"train\.learning_rate = 0.*train\.batch_sise"),
        ({"train.epochs": 1, "train.steps": 1}, "set only one of them"),
        ({"train.optimizer": "SDG"}, "no attribute 'SDG'"),
        ({"train.optimizer_options.momentun": 0.9}, "momentun"),
        ({"train.schedule": "StepLR"}, "step_size"),
        ({"train.schedule": "ReduceLROnPlateau"}, "metrics"),
        ({"train.optimizer": "LBFGS"}, "closure"),
    ],
)
def test_wrong_settings_raise_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings.read(wrong)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="'warp' is not available"):
        choose_device("warp")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available"):
            choose_device("cuda")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def ask(kind: str, config: dict[str, Any], *, data: Any = lambda context: (DATA, DATA), **options: Any) -> Message:
    torch.manual_seed(0)
    grid = LocalGrid(make_client_app(network, data, **options), 2, run_config={"train.epochs": 2})
    record = RecordDict({"arrays": to_arrays(network().state_dict()), "config": ConfigRecord(config)})
    (reply,) = grid.send_and_receive([Message(record, 1001, kind)])
    return reply


def test_the_app_trains_and_reports_metrics() -> None:
    reply = ask("train", {"server-round": 1})
    metrics = reply.content.metric_records["metrics"]
    assert metrics["num-examples"] == 23
    assert metrics.keys() == {"num-examples", "loss", "accuracy", "steps", "seconds"}
    state = to_state(reply.content.array_records["arrays"])
    assert state["1.num_batches_tracked"] == 2


def test_equal_rounds_give_equal_weights_and_others_do_not() -> None:
    def weights(number: int) -> Tensor:
        return to_state(ask("train", {"server-round": number}).content.array_records["arrays"])["0.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_random_numbers_do_not_depend_on_the_order_of_clients() -> None:
    """Dropout draws from torch's generator. So does the creation of the module, in a process's first message."""

    def weights(order: list[int]) -> dict[int, Tensor]:
        grid = LocalGrid(make_client_app(network, lambda context: (DATA, None)), 2)
        content = RecordDict({"arrays": to_arrays(state)})
        replies = [grid.send_and_receive([Message(content, node_id, "train")])[0] for node_id in order]
        return {
            reply.metadata.src_node_id: to_state(reply.content.array_records["arrays"])["0.weight"] for reply in replies
        }

    state = network().state_dict()
    one, two = weights([1000, 1001]), weights([1001, 1000])
    assert all(torch.equal(one[node], two[node]) for node in one)


def test_a_reply_does_not_change_with_the_next_message() -> None:
    """The app may reuse a module for the next message; a reply sent before must not change with it."""
    grid = LocalGrid(make_client_app(network, lambda context: (DATA, None)), 2)
    content = RecordDict({"arrays": to_arrays(network().state_dict())})
    first, _ = (Message(content, node_id, "train") for node_id in grid.get_node_ids())
    (reply,) = grid.send_and_receive([first])
    weight = to_state(reply.content.array_records["arrays"])["0.weight"].clone()
    grid.send_and_receive([Message(content, 1001, "train")])
    assert torch.equal(to_state(reply.content.array_records["arrays"])["0.weight"], weight)


def test_the_app_evaluates_the_model_in_the_message() -> None:
    metrics = ask("evaluate", {}).content.metric_records["metrics"]
    torch.manual_seed(0)
    expected = evaluate(network(), evaluation_batches(DATA))
    assert metrics["num-examples"] == 23
    assert metrics["accuracy"] == expected["accuracy"]
    without_data = ask("evaluate", {}, data=lambda context: (DATA, None))
    assert dict(without_data.content.metric_records["metrics"]) == {"num-examples": 0}


def test_another_loss_with_targets_that_are_not_classes() -> None:
    numbers = TensorDataset(INPUTS, INPUTS[:, :3])
    reply = ask("train", {}, data=lambda context: (numbers, None), loss=nn.functional.mse_loss)
    assert "accuracy" not in reply.content.metric_records["metrics"]


def test_a_message_may_change_the_settings() -> None:
    reply = ask("train", {"train.learning_rate": -1.0})
    assert reply.has_error()
    assert "train.learning_rate" in str(reply.error.reason)


def test_the_data_function_receives_the_context() -> None:
    partitions = []

    def data(context: Context) -> tuple[Examples, None]:
        partitions.append(context.node_config["partition-id"])
        return DATA, None

    ask("train", {}, data=data)
    assert partitions == [1]


def test_with_batch_updates_the_update_of_each_batch_is_sent() -> None:
    reply = ask("train", {"server-round": 1, "train.batch_updates": True, "train.batch_size": 10})
    torch.manual_seed(0)
    after, steps = (to_state(reply.content.array_records[name]) for name in ("arrays", "steps"))
    before = network().state_dict()
    assert all(tensor.shape[0] == 6 for tensor in steps.values())  # two epochs of three batches
    for name, tensor in steps.items():
        torch.testing.assert_close(before[name] + tensor.sum(dim=0), after[name])


def test_a_model_that_changes_the_examples_raises_an_error() -> None:
    module = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 2))
    examples = TensorDataset(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="changes its inputs in place"):
        evaluate(module, evaluation_batches(examples))


def _arrays(reply: Message) -> dict[str, Tensor]:
    return to_state(reply.content.array_records["arrays"])


def noisy(inputs: Tensor) -> Tensor:
    """Negate the inputs, and add noise from torch's default generator."""
    return -inputs + 0.1 * torch.randn_like(inputs)


def negated(inputs: Tensor) -> Tensor:
    """Negate the inputs."""
    return -inputs


def test_augmented_inputs_are_trained_on_and_repeat() -> None:
    opposite = TensorDataset(-INPUTS, TARGETS)
    expected = _arrays(ask("train", {}, data=lambda context: (opposite, DATA)))
    found = _arrays(ask("train", {"train.augment": f"{__name__}:negated"}))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    first, again = (_arrays(ask("train", {"train.augment": f"{__name__}:noisy"})) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], expected["0.weight"])


def test_augmentation_does_not_change_tests() -> None:
    plain, other = (
        ask("evaluate", config).content["metrics"] for config in ({}, {"train.augment": f"{__name__}:noisy"})
    )
    assert plain["loss"] == other["loss"]
