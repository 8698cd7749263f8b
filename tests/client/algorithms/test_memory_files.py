"""The files of what a client keeps: those stay that a resumed run reads, and the space of the others is used again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from corymb.client.algorithms.memory_files import keep, recall


def memory(number: int, length: int = 3) -> dict[str, torch.Tensor]:
    return {"kept": torch.full((length,), float(number))}


@given(st.integers(1, 40), st.data())
def test_a_run_is_resumed_with_what_was_kept_up_to_its_state(
    tmp_path_factory: object, last: int, data: st.DataObject
) -> None:
    """The server saves its state after some rounds, and the client takes part in others."""
    folder = tmp_path_factory.mktemp("kept")  # type: ignore[attr-defined]
    saved = data.draw(st.sets(st.integers(1, last)))
    resumable: list[int] = []  # after the newest two states
    taken: list[int] = []
    for number in range(1, last + 1):
        if data.draw(st.booleans()):
            keep(folder, number, memory(number, length=data.draw(st.integers(1, 9))), resumable)
            taken.append(number)
        for asked in {*resumable, number - 1, number}:
            expected = max((each for each in taken if each <= asked), default=None)
            found = recall(folder, asked)
            assert (found["kept"].unique().item() if found else None) == expected
        if number in saved:
            resumable = [*resumable, number][-2:]
    assert len(taken) == 0 or len(list(folder.iterdir())) <= 4


def test_a_repeated_round_replaces_its_file(tmp_path: Path) -> None:
    for number in (1, 2, 3, 2):
        keep(tmp_path, number, memory(10 * number + len(list(tmp_path.iterdir()))), resumable=[1, 2])
    assert recall(tmp_path, 2)["kept"][0] == 23  # written when there were three files


def test_a_torn_file_is_not_read(tmp_path: Path) -> None:
    keep(tmp_path, 1, memory(1), resumable=[])
    keep(tmp_path, 2, memory(2), resumable=[1])
    newest = tmp_path / "000002.safetensors"
    os.truncate(newest, newest.stat().st_size - 1)
    assert recall(tmp_path, 2)["kept"][0] == 1


def test_the_space_of_a_needless_file_is_used_again(tmp_path: Path) -> None:
    for number in range(1, 6):
        keep(tmp_path, number, memory(number), resumable=[2, 3])
    places = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    keep(tmp_path, 6, memory(6), resumable=[2, 3])
    assert (tmp_path / "000006.safetensors").stat().st_ino == places["000004.safetensors"]
    assert [recall(tmp_path, number)["kept"][0] for number in (2, 3, 5, 6)] == [2, 3, 5, 6]
