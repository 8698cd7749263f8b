"""The numbers of a federation in Prometheus' format, and the alarms that are made of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from corymb.pages.numbers import DAY, Number

# What each metric says; a name that ends in _total is a counter, all others are gauges.
METRICS = {
    "corymb_monitor_age_seconds": "Seconds since the monitor last saw the SuperLink's nodes.",
    "corymb_site_certificate_seconds": "Seconds for which the certificate of a site is valid.",
    "corymb_server_certificate_seconds": "Seconds for which the server's certificate is valid.",
    "corymb_sites_online": "Sites that the SuperLink sees online.",
    "corymb_sites_enrolled": "Sites on the roster.",
    "corymb_site_online": "Whether the SuperLink sees a site online.",
    "corymb_sites_missing": "Sites that a run under way lacks for its quorum, or to begin.",
    "corymb_run_active": "Whether a run is under way.",
    "corymb_run_paused": "Whether an operator has paused the run under way.",
    "corymb_stalled": "Whether a run is under way and nothing happens any more.",
    "corymb_round": "The last finished round of the newest run.",
    "corymb_rounds_left": "Rounds of the newest run that are still to come.",
    "corymb_round_seconds": "Duration of the last round.",
    "corymb_round_abandoned": "Whether the last round missed its quorum.",
    "corymb_seconds_since_counted_round": "Seconds since the last answer of a finished round arrived.",
    "corymb_score": "Metrics of the test after the last round.",
    "corymb_quorum": "Admitted replies without which a round is abandoned.",
    "corymb_replies_total": "Replies of the newest run by the server's verdict.",
    "corymb_replies_rejected": "Sites whose reply the server rejected in the last round.",
    "corymb_replies_overdue": "Sites that have not answered for three median times of an answer.",
    "corymb_zombies": "Sites that are online, and were silent in each of the last three rounds.",
    "corymb_bytes_total": "Bytes of models of the newest run, to the sites (down) and from them (up).",
    "corymb_disk_free_bytes": "Free space on the disk of the server's kit.",
    "corymb_memory_available_bytes": "Memory that the machine can still give to processes.",
    "corymb_clock_synchronised": "Whether something sets the machine's clock.",
    "corymb_clock_error_seconds": "By how much the clock may be off, as the kernel estimates.",
    "corymb_process_up": "Whether a process of the server runs.",
    "corymb_process_memory_bytes": "Resident memory of a process of the server, with its children.",
}


@dataclass(frozen=True)
class Alarm:
    """An alarm: `metric` compared with `threshold`, for at least `minutes`; `text` says what to do."""

    name: str
    metric: str
    comparison: str
    threshold: float
    text: str
    severity: str = "warning"
    minutes: int = 1

    @property
    def expression(self) -> str:
        """The alarm in PromQL."""
        return f"{self.metric} {self.comparison} {self.threshold:g}"

    def rings_for(self, number: Number) -> bool:
        """Return whether `number` is one of which the alarm warns."""
        compare = {">": operator.gt, "<": operator.lt, "==": operator.eq}[self.comparison]
        return number.metric == self.metric and compare(number.value, self.threshold)


ALARMS = (
    Alarm("CorymbStalled", "corymb_stalled", "==", 1,
          "A run is under way, but nothing happens; look at Flower's log of the run (`flwr log`).", "critical"),
    Alarm("CorymbProcessDown", "corymb_process_up", "==", 0,
          "A process of the server does not run; its log says why.", "critical"),
    Alarm("CorymbMonitorSilent", "corymb_monitor_age_seconds", ">", 60,
          "The monitor has not reached the SuperLink for a minute.", "critical"),
    Alarm("CorymbBelowQuorum", "corymb_sites_missing", ">", 0,
          "Fewer sites are online than the run needs to begin, or for its quorum.", "critical", 5),
    Alarm("CorymbRoundAbandoned", "corymb_round_abandoned", "==", 1,
          "The last round missed its quorum, so the model stayed as it was."),
    Alarm("CorymbRepliesRejected", "corymb_replies_rejected", ">", 0,
          "The server rejected replies of the last round; the table of sites says why."),
    Alarm("CorymbRepliesOverdue", "corymb_replies_overdue", ">", 0,
          "Sites take more than three times as long as usual.", "warning", 5),
    Alarm("CorymbZombies", "corymb_zombies", ">", 0,
          "Sites are online, but have not answered in three rounds; restart them."),
    Alarm("CorymbDiskFull", "corymb_disk_free_bytes", "<", 1e9,
          "Less than 1 GB is free; the journal cannot be written without space.", "critical"),
    Alarm("CorymbMemoryLow", "corymb_memory_available_bytes", "<", 5e8,
          "Less than 500 MB of memory is available.", "critical"),
    Alarm("CorymbServerCertificate", "corymb_server_certificate_seconds", "<", 14 * DAY,
          "The server's certificate ends soon; renew it with corymb provision.", "warning", 60),
    Alarm("CorymbSiteCertificate", "corymb_site_certificate_seconds", "<", 14 * DAY,
          "The certificate of a site ends soon; the site sends a new request.", "warning", 60),
    Alarm("CorymbClock", "corymb_clock_error_seconds", ">", 1,
          "The clock may be off by more than a second; Flower refuses sites whose clocks differ.", "warning", 10),
)  # fmt: skip


class _Numbers(Collector):
    def __init__(self, numbers: Iterable[Number]) -> None:
        self._numbers = list(numbers)

    def collect(self) -> Iterable[Any]:
        families: dict[str, Any] = {}
        for number in self._numbers:
            names = [name for name, _ in number.labels]
            if number.metric not in families:
                kind = CounterMetricFamily if number.metric.endswith("_total") else GaugeMetricFamily
                families[number.metric] = kind(number.metric, METRICS[number.metric], labels=names)
            families[number.metric].add_metric([value for _, value in number.labels], number.value)
        return families.values()


def exposition(numbers: Iterable[Number]) -> bytes:
    """Return `numbers` in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Numbers(numbers))
    return generate_latest(registry)


def ringing(numbers: Sequence[Number]) -> list[tuple[Alarm, list[str]]]:
    """Return the alarms that `numbers` set off, the critical ones first, each with the labels that it concerns."""
    found = []
    for alarm in ALARMS:
        numbers_of = [number for number in numbers if alarm.rings_for(number)]
        if numbers_of:
            found.append((alarm, [value for number in numbers_of for _, value in number.labels]))
    return sorted(found, key=lambda each: each[0].severity != "critical")


def alert_rules() -> str:
    """Return the alarms as rules for Prometheus, in YAML."""
    lines = ["# Made by `corymb alerts`; for rule_files of Prometheus.", "groups:", "  - name: corymb", "    rules:"]
    for alarm in ALARMS:
        lines += [
            f"      - alert: {alarm.name}",
            f"        expr: {alarm.expression}",
            f"        for: {alarm.minutes}m",
            f"        labels: {{severity: {alarm.severity}}}",
            f'        annotations: {{summary: "{alarm.text}"}}',
        ]
    return "\n".join(lines) + "\n"
