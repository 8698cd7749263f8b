"""Metrics and alarms: what Prometheus' own tools say of them, and each alarm on a federation that has the problem."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from corymb.pages import metrics as module
from corymb.pages.health import health_problems, progress_problems
from corymb.pages.metrics import ALARMS, METRICS, alert_rules, exposition, ringing
from corymb.pages.numbers import Federation, Number, numbers
from corymb.server.journal import Journal
from corymb.server.rounds.events import Event
from corymb.tests.pages.world import NAMES, federation, make_kit, publish, run_rounds

PROMTOOL = shutil.which("promtool")
DASHBOARD = Path(module.__file__).parent / "monitoring" / "dashboard.json"


def names(found: list[Number]) -> set[str]:
    return {alarm.name for alarm, _ in ringing(found)}


def quiet(found: list[Number]) -> set[str]:
    """Return the alarms but those that depend on this test's machine, on which no server runs."""
    return names(found) - {"CorymbProcessDown", "CorymbClock", "CorymbMemoryLow", "CorymbDiskFull"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return federation(tmp_path_factory.mktemp("finished"))


def value(found: list[Number], name: str, **labels: str) -> float:
    (number,) = [n for n in found if n.metric == name and dict(n.labels) == labels]
    return number.value


def test_the_numbers_of_a_run(finished: Federation) -> None:
    found = numbers(finished)
    assert value(found, "corymb_round") == 3
    assert value(found, "corymb_rounds_left") == 0
    assert value(found, "corymb_replies_total", verdict="admitted") == 9
    assert (
        value(found, "corymb_bytes_total", direction="up") == 9 * 4128
    )  # a thousand numbers and the header of an array
    assert value(found, "corymb_score", metric="accuracy") == pytest.approx(0.75)
    assert value(found, "corymb_sites_online") == 3
    assert value(found, "corymb_site_online", site="north") == 1
    assert 363 < value(found, "corymb_site_certificate_seconds", site="west") / 86400 < 366
    assert quiet(found) == set()


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")
def test_promtool_accepts_metrics_and_rules(finished: Federation, tmp_path: Path) -> None:
    assert PROMTOOL is not None
    text = exposition(numbers(finished))
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, b"")
    rules = tmp_path / "alerts.yml"
    rules.write_text(alert_rules())
    said = subprocess.run([PROMTOOL, "check", "rules", str(rules)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    assert f"SUCCESS: {len(ALARMS)} rules found" in said.stdout


def test_every_query_of_the_dashboard_and_every_alarm_names_a_metric(finished: Federation) -> None:
    queries = re.findall(r'"expr": "([^"]*)"', DASHBOARD.read_text())
    assert len(queries) >= 10
    used = set(re.findall(r"corymb_\w+", " ".join(queries + [alarm.expression for alarm in ALARMS])))
    assert used <= METRICS.keys()
    assert {n.metric for n in numbers(finished)} <= METRICS.keys()
    assert json.loads(DASHBOARD.read_text())["title"] == "Corymb"


def test_a_rejected_reply(tmp_path: Path) -> None:
    found = numbers(federation(tmp_path, wrong="south"))
    assert quiet(found) == {"CorymbRepliesRejected"}
    assert value(found, "corymb_replies_total", verdict="not-finite") == 3


def test_an_abandoned_round(tmp_path: Path) -> None:
    assert "CorymbRoundAbandoned" in quiet(numbers(federation(tmp_path, rounds=1, wrong="south", quorum=3)))


def test_sites_missing_for_the_quorum(finished: Federation) -> None:
    publish(finished.folder, online=("north",), runs={"1": "running"})
    try:
        found = numbers(finished)
        assert quiet(found) == {"CorymbBelowQuorum"}
        assert "1 more sites are needed for the quorum" in progress_problems(found)
    finally:
        publish(finished.folder, runs={"1": "finished:completed"})


def test_a_stalled_run_is_not_ready_and_health_alone_does_not_see_it(finished: Federation) -> None:
    publish(finished.folder, runs={"1": "running"})
    try:
        later = time.time() + 200  # a deadline of 60 s and a minute, without an event
        publish(finished.folder, runs={"1": "running"}, ago=-200)
        found = numbers(finished, later)
        assert "CorymbStalled" in quiet(found)
        assert "a run is under way, but nothing happens" in progress_problems(found)
        assert "a run is under way, but nothing happens" not in health_problems(found)
    finally:
        publish(finished.folder, runs={"1": "finished:completed"})


def test_a_run_that_no_superexec_begins_is_stalled(tmp_path: Path) -> None:
    kit = make_kit(tmp_path)
    publish(kit, runs={"7": "pending"}, ago=90)
    assert {"CorymbStalled", "CorymbMonitorSilent"} <= quiet(numbers(Federation(kit, parent=os.getppid())))


def test_overdue_answers_and_zombies(tmp_path: Path) -> None:
    kit = make_kit(tmp_path)
    folder = kit / "var" / "corymb" / "runs" / "run-1"
    run_rounds(folder, rounds=4, names=("north", "south"))
    journal = Journal(folder)
    assert journal.asks is not None
    with journal._database as database:  # the site west was asked in each round, and silent
        database.executemany(
            "INSERT INTO verdicts VALUES (?, 'west', 'silent', 'west: no reply', 0, NULL, '{}', 0, 0)",
            [(number,) for number in range(1, 5)],
        )
        database.execute(
            "INSERT INTO asks VALUES (5, 'train', '1', 'n', ?, ?)",
            (time.time() - 100, json.dumps({"by_message": {}, "nodes": list(NAMES), "connected": {}, "down": {}})),
        )
    journal.asks.note_event(Event(5, "train", "north", "replied", 1.0))
    journal.close()
    publish(kit, runs={"1": "running"})
    found = numbers(Federation(kit, parent=os.getppid()))
    assert value(found, "corymb_replies_overdue") == 2
    assert value(found, "corymb_zombies") == 1
    assert quiet(found) == {"CorymbRepliesOverdue", "CorymbZombies"}


def test_certificates_that_end(tmp_path: Path) -> None:
    kit = make_kit(tmp_path, days=7)
    publish(kit)
    assert quiet(numbers(Federation(kit, parent=os.getppid()))) == {"CorymbServerCertificate", "CorymbSiteCertificate"}


def test_a_process_that_is_down(finished: Federation) -> None:
    found = numbers(finished)  # no server runs here
    assert "CorymbProcessDown" in names(found)
    assert "superexec does not run" in health_problems(found)


@pytest.mark.parametrize(
    ("metric", "number", "alarm"),
    [
        ("corymb_disk_free_bytes", 5e8, "CorymbDiskFull"),
        ("corymb_memory_available_bytes", 1e8, "CorymbMemoryLow"),
        ("corymb_clock_error_seconds", 3.0, "CorymbClock"),
    ],
)
def test_what_a_test_cannot_do_to_its_machine(metric: str, number: float, alarm: str) -> None:
    assert names([Number(metric, number)]) == {alarm}


def test_every_alarm_was_provoked() -> None:
    text = Path(__file__).read_text()
    assert all(text.count(alarm.name) >= 1 for alarm in ALARMS)
