"""The same experiment file in Flower's own simulation: real SuperLink, real Ray actors, the same model bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from corymb.server.journal import committed
from corymb.simulations.experiments.reader import read
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.ray import run_with_ray
from corymb.tests.e2e.processes import processes, until

EXPERIMENT = """
rounds = 3
rules = ["fedau"]
seeds = [1]
partition = { clients = 5 }
participation = { kind = "bernoulli", probability = 0.6 }
train = { epochs = 2, batch_size = 16, learning_rate = 0.1 }
"""


ONLY_HERE = """
import os
from corymb.simulations.experiments.models import softmax


def make(shape, classes):
    if "FLWR_HOME" in os.environ:
        raise RuntimeError("not under Flower")
    return softmax(shape, classes)
"""


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_ray_gives_the_model_that_serial_gives(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    found = {}
    for engine in ("ray", "serial"):
        out = tmp_path / engine
        (tmp_path / f"for-{engine}").mkdir()
        with processes(tmp_path / f"for-{engine}") as started:
            started.run(
                "corymb", "simulate", str(tmp_path / "small.toml"), "--out", str(out), "--set", f'engine="{engine}"'
            )
        (summary,) = json.loads((out / "summary.json").read_text())["runs"]
        replies = [json.loads(line)["replies"] for line in (out / "rounds.jsonl").read_text().splitlines()]
        found[engine] = (summary["model_sha256"], summary["final_accuracy"], replies)
    assert found["ray"] == found["serial"]
    assert any(counts.get("offline") for counts in found["ray"][2])


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_run_that_fails_there_shows_the_end_of_flower_s_log(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text(ONLY_HERE)
    (tmp_path / "wrong.toml").write_text(EXPERIMENT + 'model = { kind = "only_here:make" }\n')
    resolved = resolve(read(tmp_path / "wrong.toml", {"engine": "ray"}))
    with pytest.raises(ValueError, match=r"(?s)after round 0 of 3.*not under Flower"):
        run_with_ray(resolved, 0, 1, tmp_path / "journal")


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "long.toml").write_text(EXPERIMENT.replace("rounds = 3", "rounds = 4000"))
    command = [str(Path(sys.executable).parent / "corymb"), "simulate", str(tmp_path / "long.toml")]
    command += ["--out", str(tmp_path / "out"), "--set", 'engine="ray"']
    journal = tmp_path / "out/journals/fedau-seed1"
    with TemporaryDirectory(prefix="c-") as short:  # Ray's sockets have no room for pytest's long names
        process = subprocess.Popen(command, env=os.environ | {"TMPDIR": short})
        try:
            until(lambda: committed(journal, 0), 120, "the first round")
            assert left_of(short)
            process.send_signal(number)
            process.wait(60)
        finally:
            process.kill()
        assert not left_of(short)
        assert not list(Path(short).glob("corymb-*"))


def left_of(folder: str) -> list[str]:
    """The processes that have a FLWR_HOME in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={folder}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found
