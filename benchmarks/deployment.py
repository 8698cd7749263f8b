"""Measure what the journal costs in a deployment: its share of a round, and the memory of the ServerApp's process.

A SuperLink and three SuperNodes run on this machine, with a model of 10M parameters (40 MB of float32) and without
training. The peak memory of the ServerApp is counted in models, above the least once it has its first model: the
memory of the process alone, and with the pages of the replies' files that are mapped into it, which the system drops
when memory is short. The journal's time is that of its own calls for one round of this size, measured in this process
on the same disk.

    python benchmarks/deployment.py [--parameters 10000000] [--rounds 4]
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from corymb.protocol.flower import set_message_id, set_task_identity
from corymb.server import Journal, Method, RoundRecord
from corymb.server.rounds.events import Event
from corymb.server.rounds.record import Verdict
from corymb.server.rounds.round import Asked, Requests
from corymb.strategies import FedAvg, Layout
from corymb.tests.e2e.federation import SITES, Federation
from corymb.tests.e2e.processes import processes

TARGET_MODELS, TARGET_SHARE = 3.0, 0.02


def memory(pid: int) -> dict[str, int]:
    """Return the memory of a process in bytes, its own and with mapped files; {} if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {"own": sizes["RssAnon"] + sizes["RssShmem"], "all": sizes["VmRSS"]} if "VmRSS" in sizes else {}


def deployed(parameters: int, rounds: int) -> tuple[float, list[dict[str, int]]]:
    """Return the median seconds of a round, and samples of the ServerApp's memory since it has its model."""
    with tempfile.TemporaryDirectory() as folder, processes(Path(folder)) as started:
        federation = Federation(started)
        federation.run(f"rounds={rounds} model.options.padding={parameters}")
        samples: list[dict[str, int]] = []
        while not federation.ended():
            pid, log = federation.child(), (Path(folder) / "run.log").read_text()
            if pid is not None and "Required nodes" in log:
                samples += [now] if (now := memory(pid)) else []
            time.sleep(0.02)
        federation.assert_exact(rounds)
        with sqlite3.connect(federation.journal() / "journal.sqlite") as database:
            seconds = [row[0] for row in database.execute("SELECT seconds FROM rounds WHERE round > 1")]
    return median(seconds), samples


def journal_seconds(parameters: int) -> float:
    """Return the seconds that the journal takes for one round of this size: the median of three."""
    set_task_identity(run_id=1, node_id=1)
    state = {"w": torch.randn(parameters)}
    method = Method(FedAvg())
    after = method.initial(Layout.of(state).flatten(state))
    nodes = {11 + site: f"site-{site}" for site in range(SITES)}
    replies = []
    for node_id in nodes:
        request = Message(RecordDict(), node_id, "train")
        set_message_id(request, f"m-{node_id}")
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(state["w"].numpy())}), "metrics": MetricRecord({"num-examples": 1})}
        )
        replies.append(Message(content, reply_to=request))
    times = []
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(folder)
        journal.begin(method.about(), resume=False)
        assert journal.asks is not None
        for number in range(1, 4):
            started = time.perf_counter()
            requests = Requests({f"m-{node_id}": name for node_id, name in nodes.items()}, tuple(nodes.values()), nodes)
            journal.asks.note_asked(number, "train", Asked("nonce", requests, time.time(), 1))
            for name, reply in zip(nodes.values(), replies, strict=True):
                journal.asks.note_event(Event(number, "train", name, "asked"))
                journal.asks.keep_reply(number, "train", reply, time.time())
                journal.asks.note_event(Event(number, "train", name, "replied", 1.0, 4 * parameters))
            verdicts = tuple(Verdict(name, "admitted", examples=1, weight=1 / SITES) for name in nodes.values())
            journal.write(RoundRecord(number, verdicts), after)
            times.append(time.perf_counter() - started)
        journal.close()
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    size = 4 * options.parameters
    seconds, samples = deployed(options.parameters, options.rounds)
    journal = journal_seconds(options.parameters)
    base = {kind: min(sample[kind] for sample in samples) for kind in ("own", "all")}
    models = {kind: (max(sample[kind] for sample in samples) - base[kind]) / size for kind in base}
    share = journal / seconds
    print(f"a round of {SITES} sites with {size / 1e6:.0f} MB each takes {seconds:.1f} s (median)")
    print(f"the journal takes {journal:.2f} s of it: {100 * share:.1f} % (bar {100 * TARGET_SHARE:.0f} %)")
    print(
        f"the ServerApp has at least {base['own'] / 1e6:.0f} MB, with its model, and at most {models['own']:.1f} models"
    )
    print(f"more (bar {TARGET_MODELS:g}); with the mapped files of replies, {models['all']:.1f} models more")
    raise SystemExit(models["own"] > TARGET_MODELS or share > TARGET_SHARE)


if __name__ == "__main__":
    main()
