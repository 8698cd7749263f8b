"""The repository root is the package `corymb`; its folders must not be installed as top-level packages."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_no_folder_is_a_top_level_package() -> None:
    for name in ("server", "client", "strategies", "protocol", "simulations"):
        assert "corymb" not in packages_distributions().get(name, [])


def test_the_link_points_to_the_root() -> None:
    assert (ROOT / ".links" / "corymb").resolve() == ROOT


def test_the_wheel_holds_only_corymb_and_its_experiments(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"corymb"}
    experiment, report = "simulations/experiments/shipped/demo.toml", "simulations/results/report.html.j2"
    for name in ("__init__.py", "py.typed", "cli.py", experiment, report):
        assert f"corymb/{name}" in names


def test_the_wheel_works_in_another_environment_and_folder(tmp_path: Path, shell: dict[str, str]) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (folder := tmp_path / "elsewhere").mkdir()
    commands = f"""
        pip install {tmp_path}/*.whl
        corymb simulate --set rounds=2 --set seeds=1
        {tmp_path}/venv/bin/python -c "import corymb; print(corymb.__file__, corymb.__version__)"
    """
    result = subprocess.run(["sh", "-ec", commands], cwd=folder, env=shell, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Report: runs/demo/report.html" in result.stdout
    file, version = result.stdout.splitlines()[-1].split()
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert version in (ROOT / "CITATION.cff").read_text()


def test_every_folder_named_in_pyproject_exists() -> None:
    tool = PROJECT["tool"]
    for folder in (
        tool["pytest"]["ini_options"]["testpaths"] + tool["hatch"]["build"]["targets"]["wheel"]["only-include"]
    ):
        assert (ROOT / folder).exists()
    for package in tool["mypy"]["packages"]:
        assert (ROOT / ".links" / package.replace(".", "/")).is_dir()
