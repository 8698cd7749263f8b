"""Ten Flower apps, written for this test in the styles that people use, give on LocalGrid what `flwr run` gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from corymb.tests.e2e.processes import processes, until

APPS = sorted((Path(__file__).parent / "apps").glob("*.py"))
PROJECT = """
[project]
name = "{project}"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "corymb"

[tool.flwr.app.components]
serverapp = "{name}:server"
clientapp = "{name}:client"

[tool.flwr.app.config]
out = ""
"""


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", APPS, ids=lambda path: path.stem)
def test_an_app_gives_the_same_on_local_grid(source: Path, tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    shutil.copy(source, app / f"app_{source.name}")
    project = f"app-{source.stem.replace('_', '-')}"
    (app / "pyproject.toml").write_text(PROJECT.format(name=f"app_{source.stem}", project=project))
    found: dict[str, Any] = {}
    with processes(tmp_path) as started:
        for workers in ("1", "2"):
            out = tmp_path / f"local-{workers}.json"
            settings = ("--nodes", "3", "--workers", workers, "--set", f"out={out}")
            started.run("corymb", "simulate", "--app", str(app), *settings)
            found[f"LocalGrid, {workers} workers"] = json.loads(out.read_text())
        out = tmp_path / "flower.json"
        run = started.start(
            "run", "flwr", "run", str(app), "--stream", "-c", f'out="{out}"',
            "--federation-config", "num-supernodes=3 client-resources-num-cpus=1",
        )  # fmt: skip
        until(lambda: run.poll() is not None, 300, "the end of the run")
        assert out.exists(), started.logs()
        found["Flower"] = json.loads(out.read_text())
    assert all(result == found["Flower"] for result in found.values()), found
