"""What the manual shows works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from corymb.simulations.experiments.experiment import Experiment
from corymb.strategies import RULES

ROOT = Path(__file__).parent.parent
MANUAL = (ROOT / "docs" / "manual.md").read_text()


def block(language: str, first: str) -> str:
    """The code block of the manual that begins with `first`."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", MANUAL, re.DOTALL)
    return next(code for code in blocks if code.startswith(first))


def corymb(*arguments: str, folder: Path) -> str:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "corymb"), *arguments],
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_rule_of_ones_own_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """As `pip install` leaves it: a module, and the metadata of its distribution."""
    imports = "from dataclasses import dataclass\nfrom corymb.strategies import BlindRule, Report\n\n\n"
    (tmp_path / "my_package.py").write_text(imports + block("python", "@dataclass"))
    entry_points = tomllib.loads(block("toml", "[project.entry-points"))["project"]["entry-points"]
    (metadata := tmp_path / "my_package-1.0.dist-info").mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in names.items()) for group, names in entry_points.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    assert "floor = 0.1" in corymb("rules", folder=tmp_path)
    small = [f"--set={change}" for change in ("rounds=2", "train.steps=1", "partition.clients=4")]
    assert "inverse_loss" in corymb(
        "compare", "--rules", "fedavg,inverse_loss", "--seeds", "1", *small, folder=tmp_path
    )


def test_the_keys_of_an_experiment_are_all_there() -> None:
    """Every key of the manual exists and every key that exists is in the manual."""
    shown = tomllib.loads(re.sub(r"^rules = .*$", "", block("toml", "name ="), flags=re.MULTILINE))

    def keys(model: type, table: dict[str, object], place: str) -> None:
        fields = model.model_fields  # type: ignore[attr-defined]
        known = set(fields) - ({"seed", "steps"} if place == "train" else set())
        assert set(table) == known, place
        for name, value in table.items():
            annotation = fields[name].annotation
            if isinstance(value, dict) and hasattr(annotation, "model_fields"):
                keys(annotation, value, name)

    keys(Experiment, shown, "")


def test_the_tour_has_every_rule() -> None:
    tour = (ROOT / "docs" / "which-rule.md").read_text()
    assert not {name for name in RULES if f"`{name}`" not in tour}
