"""A simulation that is killed and resumed ends with the model of one that was never interrupted."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.results.folder import prepare, rounds_in

EXPERIMENT = """
rounds = 60
seeds = 1
blocks = 2
[[rules]]
name = "fedau"
[[rules]]
name = "mifa"
server_optimizer = { optimizer = "Adam", learning_rate = 0.01 }
[partition]
clients = 12
alpha = 0.3
[participation]
kind = "markov"
mean = 0.4
[attack]
kind = "gaussian"
clients = 2
[model]
kind = "mlp"
[train]
steps = 2
"""

# Its clients keep what they need in files, as factors over their examples.
KEPT = """
rounds = 120
seeds = 1
fraction = 0.3
rules = ["scaffold"]
[partition]
clients = 60
[model]
kind = "mlp"
options = { hidden = 200 }
[evaluate]
every = 120
"""


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "corymb.cli", "simulate", str(folder / "killed.toml"), *options]


def models(folder: Path) -> dict[str, str]:
    return {run["rule"]: run["model_sha256"] for run in json.loads((folder / "summary.json").read_text())["runs"]}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("experiment", "rounds", "seconds"), [(EXPERIMENT, 120, 0.0), (KEPT, 120, 0.5)])
def test_a_killed_simulation_is_resumed_to_the_same_models(
    experiment: str, rounds: int, seconds: float, tmp_path: Path
) -> None:
    """The process is killed so many `seconds` after it has committed a round."""
    (tmp_path / "killed.toml").write_text(experiment)
    subprocess.run(command(tmp_path, "--out", "whole"), cwd=tmp_path, check=True, capture_output=True)
    expected = models(tmp_path / "whole")
    options = ["--out", "parts"]
    with subprocess.Popen(command(tmp_path, *options), cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < ends:
            if sum(map(rounds_in, (tmp_path / "parts" / "journals").glob("*"))):
                time.sleep(seconds)
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.02)
    finished = sum(map(rounds_in, (tmp_path / "parts" / "journals").glob("*")))
    assert 0 < finished < rounds, "the simulation was not killed in time"
    options = ["--out", "parts", "--resume"]
    resumed = subprocess.run(command(tmp_path, *options), cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert models(tmp_path / "parts") == expected
    written = [(tmp_path / folder / "rounds.jsonl").read_text().splitlines() for folder in ("whole", "parts")]
    whole, parts = ([re.sub(r'"seconds": [^,}]+', "", line) for line in lines] for lines in written)
    assert whole == parts


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_fifty_kills_at_random_moments_change_no_bit(tmp_path: Path) -> None:
    """Each process lives for up to 3 s after its first round, or is killed while it starts."""
    (tmp_path / "killed.toml").write_text(EXPERIMENT.replace("rounds = 60", "rounds = 6000"))
    subprocess.run(command(tmp_path, "--out", "whole"), cwd=tmp_path, check=True, capture_output=True)
    moments, kills = random.Random(5), 0
    for _ in range(50):
        options = ["--out", "parts", "--resume"]
        with subprocess.Popen(command(tmp_path, *options), cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(moments.uniform(1.0, 9.0))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    resumed = subprocess.run(command(tmp_path, *options), cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    print(f"{kills} kills")
    assert models(tmp_path / "parts") == models(tmp_path / "whole")


def test_a_stopped_simulation_says_how_far_it_came(tmp_path: Path) -> None:
    (tmp_path / "killed.toml").write_text(EXPERIMENT.replace("rounds = 60", "rounds = 3000"))
    with subprocess.Popen(command(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        while not any(map(rounds_in, (tmp_path / "runs" / "killed" / "journals").glob("*"))):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "killed: 0 of 2 runs are finished" in printed
    assert "run the same command with --resume" in printed


def test_earlier_results_are_moved_and_only_results_of_the_same_settings_resumed(tmp_path: Path) -> None:
    experiment = Experiment(name="one", rounds=2, rules=["fedavg"])
    folder = tmp_path / "one"
    assert prepare(experiment, folder, resume=False) is None
    (folder / "summary.json").write_text("first")
    assert prepare(experiment, folder, resume=True) is None
    assert (folder / "summary.json").exists()
    assert prepare(experiment, folder, resume=False) == tmp_path / "one.1"
    assert prepare(experiment, folder, resume=False) == tmp_path / "one.2"
    assert (tmp_path / "one.1" / "summary.json").read_text() == "first"
    longer = experiment.model_copy(update={"rounds": 3})
    with pytest.raises(ValueError, match=r"have other settings; leave out --resume"):
        prepare(longer, folder, resume=True)
    assert prepare(longer, tmp_path / "new", resume=True) is None  # nothing to resume yet
