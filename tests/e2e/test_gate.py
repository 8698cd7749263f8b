"""A federation whose sites have a gate: an app runs only where it is approved, and only listed metrics leave."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from corymb.client.gate.ledger import Ledger
from corymb.tests.e2e.federation import SITES, Federation
from corymb.tests.e2e.processes import processes, until


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_an_app_runs_only_where_it_is_approved(tmp_path: Path) -> None:
    with processes(tmp_path) as started:
        federation = Federation(started, gates=True)
        federation.run("rounds=1 max_abandoned=1")
        until(federation.ended, 600, "the end of the first run")  # nobody has approved the app yet
        assert started.status("here") == "finished:failed"
        assert not any(federation.trained().values())
        refusals = [next(Ledger(federation.site_folder(site) / "ledger.jsonl").entries()) for site in range(SITES)]
        (app,) = {entry["app"] for entry in refusals}
        assert all(entry["event"] == "refused" for entry in refusals)

        for site in range(2):
            policy = federation.site_folder(site) / "policy.toml"
            approval = f'[[approved]]\napp = "{app}"\npurpose = "a test"\nexpires = 2099-01-01\n'
            policy.write_text(re.sub(r"metrics = .*", 'metrics = ["num-examples"]', policy.read_text()) + approval)
        federation.run("rounds=3")
        until(federation.ended, 900, "the end of the second run")
        newest = max((federation.journals / "corymb" / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
        with sqlite3.connect(newest / "journal.sqlite") as database:
            rows = database.execute("SELECT node, code, reason FROM verdicts").fetchall()
            seconds = [row[0] for row in database.execute("SELECT seconds FROM rounds")]
        print(f"rounds took {', '.join(f'{each:.1f} s' for each in seconds)}")
        assert Counter(code for _, code, _ in rows) == {"admitted": 6, "error": 3}
        assert all(
            f"the app {app} is not approved at this site" in reason for _, code, reason in rows if code == "error"
        )
        assert [len(times) for times in federation.trained().values()] == [3, 3, 0]
        entries = list(Ledger(federation.site_folder(0) / "ledger.jsonl").entries())
        assert [entry["event"] for entry in entries] == ["refused", *["ran", "left"] * 3]
        assert [entry["metrics"] for entry in entries if "metrics" in entry] == [{"num-examples": 1}] * 3
