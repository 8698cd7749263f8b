"""docs/add-a-rule.md, done as it says, in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "add-a-rule.md").read_text()


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment that has what this one has, and takes what is installed; what commands need to find it."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    ours = Path(pytest.__file__).parent.parent
    (site / "ours.pth").write_text(f"import site; site.addsitedir({str(ours)!r})\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    # An editable install without the network: the backend is there already.
    pip = f'exec "{sys.executable}" -m pip --python "{python}" "$@" --no-build-isolation --no-deps --quiet'
    for name, command in (
        ("pip", pip),
        ("pytest", f'exec "{python}" -m pytest "$@"'),
        ("corymb", f'exec "{python}" -c "from corymb.cli import main; main()" "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{command}\n")
        (tools / name).chmod(0o755)
    return os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "COLUMNS": "200"}


def run(command: str, folder: Path, shell: dict[str, str]) -> str:
    result = subprocess.run(["sh", "-ec", command], cwd=folder, env=shell, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_page_works_as_it_stands(tmp_path: Path, shell: dict[str, str]) -> None:
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "bash", "bash"]
    said = []
    for language, text in blocks:
        if language == "python":
            (tmp_path / "median_of_means" / "median_of_means.py").write_text(text)
        else:
            said.append(run(text, tmp_path, shell))
    assert "median_of_means" in said[1]
    assert "2 passed" in said[2]
    assert "median_of_means" in said[3]
    source = tmp_path / "median_of_means" / "median_of_means.py"
    source.write_text(source.read_text().replace("clients) - 1) // 2", "clients) - 1) // 2 + 1"))
    with pytest.raises(AssertionError, match=r"3 of 11 replies, .* move the model by"):
        run("pytest median_of_means", tmp_path, shell)


def test_a_blind_rule_begins_as_well(tmp_path: Path, shell: dict[str, str]) -> None:
    run("corymb new rule by_loss --kind blind && pip install -e by_loss && pytest by_loss", tmp_path, shell)
    for wrong, message in (
        ("By-Loss", "cannot be a module's"),
        ("fedavg", "There is a rule 'fedavg' already"),
        ("by_loss", "There is a rule 'by_loss' already"),
        ("other --kind voting", "The kind 'voting' is unknown; choose one of sighted, blind"),
    ):
        with pytest.raises(AssertionError, match=message):
            run(f"corymb new rule {wrong}", tmp_path, shell)
