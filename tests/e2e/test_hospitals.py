"""A federation of three hospitals, as docs/operate.md sets it up: real processes, TLS, nginx, and networks that fail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from corymb.client.gate.ledger import Ledger
from corymb.tests.e2e.hospitals import APP, IS_POSSIBLE, SERVER, SITES, WHY_NOT, Hospitals
from corymb.tests.e2e.processes import processes, until

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not IS_POSSIBLE, reason=WHY_NOT),
]


@pytest.fixture
def hospitals(tmp_path: Path) -> Iterator[Hospitals]:
    with processes(tmp_path) as started:
        hospitals = Hospitals(started)
        try:
            yield hospitals
        finally:
            hospitals.end()


def test_from_a_file_to_the_first_round_and_the_exported_model(hospitals: Hospitals) -> None:
    began = time.monotonic()
    hospitals.provision()
    hospitals.approve(APP, *SITES)
    provisioned = time.monotonic() - began
    hospitals.start(SERVER, *SITES)
    hospitals.wait_for_all()
    online = time.monotonic() - began
    run = hospitals.run(APP, "rounds=3")
    until(lambda: "round 1:" in hospitals.said(), 120, "the first round")
    first = time.monotonic() - began
    until(lambda: run.poll() is not None, 240, "the end of the run")
    assert run.returncode == 0, hospitals.said()
    model = hospitals.folder / "model.safetensors"
    hospitals.corymb("model", "export", hospitals.journal(), "--out", model)
    with safe_open(model, "pt") as file:
        assert set(file.keys()) == {"weight", "bias"}
    for site in SITES:
        audit = hospitals.corymb("audit", hospitals.kit(site))
        assert "The ledger is whole" in audit
        assert sum(entry["event"] == "ran" for entry in Ledger(hospitals.kit(site) / "ledger.jsonl").entries()) == 6
    print(hospitals.said())
    print(f"provisioned after {provisioned:.0f} s, online after {online:.0f} s, first round after {first:.0f} s")
    assert first < 180
