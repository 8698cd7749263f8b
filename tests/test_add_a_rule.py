"""Execute the steps of docs/add-a-rule.md in a separate virtual environment."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from corymb.testing import check_rule

PAGE = (Path(__file__).parent.parent / "docs" / "add-a-rule.md").read_text()


def run(command: str, folder: Path, shell: dict[str, str]) -> str:
    result = subprocess.run(["sh", "-ec", command], cwd=folder, env=shell, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_every_step_of_the_page_works(tmp_path: Path, shell: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "python", "bash", "bash"]
    outputs = []
    for language, text in blocks:
        if "class MedianOfMeans" in text:
            (tmp_path / "median_of_means" / "median_of_means.py").write_text(text)
        elif language == "python":
            (tmp_path / "slow_trust.py").write_text(text)
            monkeypatch.syspath_prepend(tmp_path)
            check_rule(import_module("slow_trust").SlowTrust())
        else:
            outputs.append(run(text, tmp_path, shell))
    assert "median_of_means" in outputs[1]
    assert "2 passed" in outputs[2]
    assert "median_of_means" in outputs[3]
    source = tmp_path / "median_of_means" / "median_of_means.py"
    source.write_text(source.read_text().replace("clients) - 1) // 2", "clients) - 1) // 2 + 1"))
    with pytest.raises(AssertionError, match=r"3 hostile replies of 11 .* move the model by"):
        run("pytest median_of_means", tmp_path, shell)


def test_new_blind_rules_work_and_bad_names_are_rejected(tmp_path: Path, shell: dict[str, str]) -> None:
    run("corymb new rule by_loss --kind blind && pip install -e by_loss && pytest by_loss", tmp_path, shell)
    for wrong, message in (
        ("By-Loss", "is not a module name"),
        ("fedavg", "A rule 'fedavg' exists already"),
        ("by_loss", "A rule 'by_loss' exists already"),
        ("other --kind voting", "The kind 'voting' is unknown; choose one of sighted, blind"),
    ):
        with pytest.raises(AssertionError, match=message):
            run(f"corymb new rule {wrong}", tmp_path, shell)
