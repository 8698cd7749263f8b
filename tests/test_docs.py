"""The documentation works as written: the tutorial, the examples of the guides, the reference, the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

from corymb.docs.make_keys import PAGE, page
from corymb.protocol.settings import Settings
from corymb.server.settings import ServerSettings
from corymb.strategies import RULES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BIN = Path(sys.executable).parent


def run(command: str, folder: Path, **variables: str) -> str:
    """What a shell command prints, with further environment variables. Fails if the command does."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "120"} | variables
    result = subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def blocks(name: str) -> list[tuple[str, str, str]]:
    """The code blocks of a page: language, file name if there is one, text."""
    return re.findall(r"```(\w+)(?: file=(\S+))?\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def shape(line: str) -> str:
    """A line without its numbers, which depend on the machine in their last digits."""
    return re.sub(r"[\d.]+", "#", " ".join(line.split()))


@pytest.mark.timeout(600)
def test_the_tutorial(tmp_path: Path) -> None:
    """Every block in order: files are saved, commands run, and each printed line that the page shows is printed."""
    printed = ""
    for language, file, text in blocks("tutorial.md"):
        if file:
            (tmp_path / file).write_text(text)
        elif language == "bash":
            printed = run(text, tmp_path)
        elif language == "text":
            lines = [shape(line) for line in printed.splitlines()]
            shown = [shape(line) for line in text.splitlines()]
            assert sorted(line for line in shown if line not in lines) == []


def test_the_tutorials_lesson_holds(tmp_path: Path) -> None:
    """FedAU is above FedAvg by several points where one office takes part on Mondays only, as the page says."""
    for _, file, text in blocks("tutorial.md"):
        if file in ("make_offices.py", "offices.toml", "weekly.py"):
            (tmp_path / file).write_text(text)
    run(f"{sys.executable} make_offices.py", tmp_path)
    table = run("corymb simulate offices.toml --set participation.kind=weekly:Weekly --set seeds=1", tmp_path)
    accuracy = {rule: float(found) for rule, found in re.findall(r"^(fedau|fedavg) +([\d.]+)", table, re.MULTILINE)}
    assert accuracy["fedau"] > accuracy["fedavg"] + 3


def test_a_client_layer_of_ones_own(tmp_path: Path) -> None:
    for language, file, text in blocks("add-a-client-layer.md"):
        if file:
            (tmp_path / file).write_text(text)
        elif language == "bash":
            assert "fedavg" in run(text, tmp_path)


def test_from_a_paper_to_a_row(tmp_path: Path) -> None:
    """Every file and command of the page, in order; the table has a row for each method."""
    printed = []
    for language, file, text in blocks("from-paper-to-row.md"):
        if file:
            (tmp_path / file).write_text(text)
        elif language == "bash":
            printed.append(run(text, tmp_path))
    rows = [line.split("|")[1].strip() for line in printed[1].splitlines() if line.startswith("| ")]
    assert set(rows[2:]) == {"fedavg", "scaffold", "FedExP", "FedNTD"}
    assert "best setting" in printed[2]


def test_experiments_from_python(tmp_path: Path) -> None:
    text = next(text for _, _, text in blocks("guide-research.md") if "import Experiment, run" in text)
    (tmp_path / "page.py").write_text(text)
    assert "| local |" in run(f"{sys.executable} page.py", tmp_path)
    assert (tmp_path / "score.png").exists()


def test_parts_of_ones_own(tmp_path: Path) -> None:
    """A participation process, a data source and a rule, as the guide and the data page show them."""
    sources = {"weekdays": "class Weekdays", "my_data": "def load", "my_package": "class InverseLoss"}
    python = [text for page in ("guide-research.md", "data.md") for lang, _, text in blocks(page) if lang == "python"]
    for module, part in sources.items():
        (tmp_path / f"{module}.py").write_text(next(text for text in python if part in text))
    (tmp_path / "own.toml").write_text(
        'rounds = 8\nrules = ["fedavg", "my_package:InverseLoss"]\n'
        '[data]\nsource = "my_data:load"\noptions = { noise = 0.2 }\n[partition]\nkind = "site"\n'
        '[participation]\nkind = "weekdays:Weekdays"\noptions = { weekend = 0.2 }\n'
    )
    assert "my_package:InverseLoss" in run("corymb simulate own.toml", tmp_path)
    offline = run("grep -c '\"round\": 6,' runs/own/clients.jsonl || true", tmp_path)  # a Saturday
    assert int(offline) < 6


def test_a_rule_of_ones_own_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """As `pip install` leaves it, in a folder on Python's path: a module, and the metadata of its distribution."""
    packages, work = tmp_path / "packages", tmp_path / "work"
    packages.mkdir()
    work.mkdir()
    installed = partial(run, folder=work, PYTHONPATH=str(packages))
    guide = blocks("guide-research.md")
    (packages / "my_package.py").write_text(next(text for _, _, text in guide if "class InverseLoss" in text))
    toml = next(text for _, _, text in guide if text.startswith("[project.entry-points"))
    entry_points = tomllib.loads(toml)["project"]["entry-points"]
    (metadata := packages / "my_package-1.0.dist-info").mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {target}" for name, target in names.items())
        for group, names in entry_points.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    assert "inverse_loss" in installed("corymb rules")
    assert "floor = 0.1" in installed("corymb rules inverse_loss")
    small = "--seeds 1 --set rounds=2 --set train.steps=1 --set partition.clients=4"
    assert "inverse_loss" in installed(f"corymb compare --rules fedavg,inverse_loss {small}")


def test_the_experiments_of_the_guide_are_valid(tmp_path: Path) -> None:
    first, rules, *_ = [text for language, _, text in blocks("guide-research.md") if language == "toml"]
    (tmp_path / "first.toml").write_text(first)
    assert "fedau" in run("corymb simulate first.toml --set rounds=2 --set seeds=1", tmp_path)
    (tmp_path / "second.toml").write_text("rounds = 2\n[proxy]\nexamples = 50\n" + rules)
    assert "FedLAW, Adam" in run("corymb simulate second.toml --set partition.clients=4", tmp_path)


def test_the_run_config_of_the_operators_guide_is_valid() -> None:
    app = next(text for language, _, text in blocks("guide-operations.md") if "serverapp =" in text)
    config = tomllib.loads(app)["tool"]["flwr"]["app"]["config"]
    settings = ServerSettings.read(config)
    assert (settings.rules[0].name, settings.rounds, settings.train.epochs) == ("fedau", 100, 5)
    cells = re.findall(r"^\| .+ \| (`.+`) \|$", (DOCS / "guide-operations.md").read_text(), re.MULTILINE)
    short, *flat = [line for cell in cells for line in re.findall(r"`([a-z_.]+ = [^`]+)`", cell)]
    model = {"model": "m:make"}
    assert ServerSettings.read(model | tomllib.loads(short)).rules[0].name == "fedau"
    rule = ServerSettings.read(model | tomllib.loads("\n".join(flat))).rules[0]
    assert (rule.name, rule.parameters) == ("krum", {"hostile": 2})
    assert rule.server_optimizer is not None
    assert rule.server_optimizer.optimizer == "Adam"


def test_the_reference_of_keys_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python docs/make_keys.py"


def test_every_key_has_an_entry() -> None:
    def classes(kind: type[Settings]) -> list[type[Settings]]:
        return [kind, *(inner for child in kind.__subclasses__() for inner in classes(child))]

    tags = ("kind", "reference")
    missing = [
        f"{kind.__name__}.{name}"
        for kind in classes(Settings)
        if kind.__module__.startswith("corymb.")
        for name, field in kind.model_fields.items()
        if not field.description and name not in tags
    ]
    assert not missing


def test_which_rule_when_has_every_rule() -> None:
    tour = (DOCS / "which-rule.md").read_text()
    assert not {name for name in RULES if f"`{name}`" not in tour}


def test_the_site_builds_and_has_every_public_name(tmp_path: Path) -> None:
    """`--strict` fails at broken links and at names that the reference cannot find."""
    run(f"cd {ROOT} && mkdocs build --strict --quiet --site-dir {tmp_path}", ROOT)
    for room in ("strategies", "server", "client", "simulations"):
        module = __import__(f"corymb.{room}", fromlist=["__all__"])
        html = (tmp_path / "reference" / room / "index.html").read_text()
        missing = [name for name in module.__all__ if f'id="corymb.{room}.{name}"' not in html]
        assert not missing, room
