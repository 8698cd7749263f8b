"""The files of what a client keeps: those stay that a repeated round reads, and their space is used again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from corymb.client.algorithms.memory_files import REPEATED_ROUNDS, keep, recall


def memory(number: int, length: int = 3) -> dict[str, torch.Tensor]:
    return {"kept": torch.full((length,), float(number))}


@given(st.sets(st.integers(1, 40), min_size=1), st.data())
def test_a_round_is_repeated_from_what_was_kept_before_it(
    tmp_path_factory: object, rounds: set[int], data: st.DataObject
) -> None:
    """The client takes part in `rounds`, which differ in what it keeps; the last ones may be repeated."""
    folder = tmp_path_factory.mktemp("kept")  # type: ignore[attr-defined]
    numbers = sorted(rounds)
    for number in numbers:
        keep(folder, number, memory(number, length=data.draw(st.integers(1, 9))))
    last = numbers[-1]
    for asked in range(last - REPEATED_ROUNDS, last + 1):
        expected = max((number for number in numbers if number <= asked), default=None)
        found = recall(folder, asked)
        assert (found["kept"].unique().item() if found else None) == expected
    assert len(list(folder.iterdir())) <= REPEATED_ROUNDS + 1


def test_a_repeated_round_replaces_its_file(tmp_path: Path) -> None:
    for number in (1, 2, 3, 2):
        keep(tmp_path, number, memory(10 * number + len(list(tmp_path.iterdir()))))
    assert recall(tmp_path, 2)["kept"][0] == 23  # written when there were three files


def test_a_torn_file_is_not_read(tmp_path: Path) -> None:
    keep(tmp_path, 1, memory(1))
    keep(tmp_path, 2, memory(2))
    newest = tmp_path / "000002.safetensors"
    os.truncate(newest, newest.stat().st_size - 1)
    assert recall(tmp_path, 2)["kept"][0] == 1


def test_the_space_of_an_old_file_is_used_again(tmp_path: Path) -> None:
    keep(tmp_path, 1, memory(1))
    oldest = (tmp_path / "000001.safetensors").stat().st_ino
    for number in range(2, REPEATED_ROUNDS + 4):
        keep(tmp_path, number, memory(number))
    assert oldest in {path.stat().st_ino for path in tmp_path.iterdir()}
    assert recall(tmp_path, 9)["kept"][0] == REPEATED_ROUNDS + 3
