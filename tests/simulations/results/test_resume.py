"""A simulation that is killed and resumed ends with the model of one that was never interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corymb.simulations.results.folder import rounds_in

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


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "corymb.cli", "simulate", str(folder / "killed.toml"), *options]


def models(folder: Path) -> dict[str, str]:
    return {run["rule"]: run["model_sha256"] for run in json.loads((folder / "summary.json").read_text())["runs"]}


@pytest.mark.timeout(600)
def test_a_killed_simulation_is_resumed_to_the_same_models(tmp_path: Path) -> None:
    (tmp_path / "killed.toml").write_text(EXPERIMENT)
    subprocess.run(command(tmp_path, "--out", "whole"), cwd=tmp_path, check=True, capture_output=True)
    expected = models(tmp_path / "whole")
    options, kills = ["--out", "parts"], 0
    for wanted in (1, 61):  # rounds, of both runs together
        with subprocess.Popen(command(tmp_path, *options), cwd=tmp_path, stderr=subprocess.PIPE) as process:
            ends = time.monotonic() + 200
            while process.poll() is None and time.monotonic() < ends:
                journals = (tmp_path / "parts" / "journals").glob("*")
                if sum(map(rounds_in, journals)) >= wanted:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.02)
        options = ["--out", "parts", "--resume"]
    assert kills >= 1
    resumed = subprocess.run(command(tmp_path, *options), cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert models(tmp_path / "parts") == expected
    written = [(tmp_path / folder / "rounds.jsonl").read_text().splitlines() for folder in ("whole", "parts")]
    whole, parts = ([re.sub(r'"seconds": [^,}]+', "", line) for line in lines] for lines in written)
    assert whole == parts
    other = command(tmp_path, *options, "--set", "rounds=61")
    refused = subprocess.run(other, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "have other settings" in refused.stderr + refused.stdout
    assert models(tmp_path / "parts") == expected


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


def test_earlier_results_are_moved_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "killed.toml").write_text(EXPERIMENT.replace("rounds = 60", "rounds = 1"))
    for _ in range(3):
        result = subprocess.run(command(tmp_path), cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "Earlier results are in runs/killed.2." in result.stdout
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["killed", "killed.1", "killed.2"]
