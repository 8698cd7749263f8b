"""What a client keeps between rounds: one safetensors file per round, of which those stay that may be read again.

A file names the round after which it was written. With each task, the server names the rounds after which the run may
be resumed, and the client keeps what it needs to go on from there. Flower's Context is not used: a SuperNode keeps it
in memory and cuts a large one off.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from flwr.app import Context
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from corymb.protocol.home import CLIENTS, home

OVER_EXAMPLES = "@examples@"  # in the name of an entry that a simulation keeps as factors over the client's examples
PLACE = "client-memory"  # key of the run config with the folder for all clients of a run
SUFFIX = ".safetensors"


def folder_of(context: Context, client: object, run_id: int | None = None) -> Path:
    """Return the folder of what `client` keeps in the run of `context`.

    It lies in the folder that the run config names as `client-memory`, by default `~/.corymb/clients/RUN-ID`. `run_id`
    is another id than the context's, of a run that began under it; see `memory_run`.
    """
    place = context.run_config.get(PLACE)
    root = Path(str(place)) if place else home() / CLIENTS / str(context.run_id if run_id is None else run_id)
    return root / hashlib.sha256(str(client).encode()).hexdigest()[:16]


def recall(folder: Path, server_round: int) -> dict[str, Tensor]:
    """Return what the client kept after a round up to `server_round`; nothing if there is none."""
    for number, name in reversed(_files(folder)):
        if number <= server_round:
            with suppress(SafetensorError, OSError):  # a file that a crash has torn
                loaded: dict[str, Tensor] = load((folder / name).read_bytes())  # no map of a file that may change
                return loaded
    return {}


def keep(folder: Path, server_round: int, memory: Mapping[str, Tensor], resumable: Collection[int]) -> None:
    """Keep `memory` after round `server_round`, and what was kept up to each of the `resumable` rounds.

    What was kept before this round stays too, for a client that trains again because its reply was lost.
    Raises `ValueError` for a value that is no tensor.
    """
    if other := [name for name, value in memory.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"A client keeps tensors only, and {other[0]!r} is a {type(memory[other[0]]).__name__}; use torch.tensor."
        )
    older = dict(file for file in _files(folder) if file[0] < server_round)
    if not older:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = os.path.join(folder, "new.part")
    needed = {max((number for number in older if number <= each), default=0) for each in (*resumable, server_round - 1)}
    needless = older.keys() - needed
    for number in needless:
        os.replace(os.path.join(folder, older[number]), part)  # its space is used again, which is faster than new space
    with open(part, "r+b" if needless else "wb") as file:
        file.write(save({name: tensor.detach().contiguous().cpu() for name, tensor in memory.items()}))
        file.truncate()
    os.replace(part, os.path.join(folder, f"{server_round:06d}{SUFFIX}"))


def forget_after(place: Path, server_round: int) -> None:
    """Delete what the clients with folders in `place` kept after `server_round`, in rounds that will be repeated."""
    for folder in place.glob("*/"):
        for number, name in _files(folder):
            if number > server_round:
                (folder / name).unlink()


def _files(folder: Path) -> list[tuple[int, str]]:
    """Return the rounds and the names of the files, oldest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((int(name.removesuffix(SUFFIX)), name) for name in names if name.endswith(SUFFIX))
