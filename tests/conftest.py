"""Settings of all tests: skipped tests fail in CI, and Flower's telemetry and update check are off."""

from __future__ import annotations

import os
import sys
import venv
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

hypothesis.settings.register_profile("untimed", deadline=None)  # machines are shared, so durations vary
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but CI allows no skipped tests: {report.longrepr}"
    return report


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep journals and caches of tests out of the user's home."""
    os.environ["CORYMB_HOME"] = str(tmp_path_factory.mktemp("corymb-home"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """Make a virtual environment with the packages of this one; return the environment variables that select it."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    packages = Path(pytest.__file__).parent.parent
    (site / "packages.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    # An editable install works without a network, because the build backend is installed already.
    pip = f'exec "{sys.executable}" -m pip --python "{python}" "$@" --no-build-isolation --no-deps --quiet'
    for name, command in (
        ("pip", pip),
        ("pytest", f'exec "{python}" -m pytest "$@"'),
        ("corymb", f'exec "{python}" -c "from corymb.cli import main; main()" "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{command}\n")
        (tools / name).chmod(0o755)
    return os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "COLUMNS": "200"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with the longest tests first, so that no worker waits for another at the end."""
    longest = ("test_quickstart.py", "test_docs.py", "test_add_a_rule.py", "test_packaging.py", "test_browser.py")
    items.sort(key=lambda item: item.path.name not in longest)
