"""A ClientApp that tries to leave its sandbox, and reports what it could do as metrics: 1 for each success."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def could(attempt: Callable[[], object]) -> int:
    try:
        return int(bool(attempt()))
    except OSError:
        return 0


def connect(host: str, port: int) -> bool:
    with socket.create_connection((host, port), timeout=3):
        return True


def other_processes() -> list[str]:
    mine = {"app_process", "bwrap"}
    lines = [path.read_bytes().decode() for path in Path("/proc").glob("[0-9]*/cmdline")]
    return [line for line in lines if line and not any(name in line for name in mine)]


def kill_others() -> bool:
    """Return whether a process may be signalled, apart from those of this sandbox."""
    for pid in range(1, 1 << 15):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"app_process" not in command and b"bwrap" not in command:
            return True
    return False


@app.train()
def train(message: Message, context: Context) -> Message:
    kit, data = Path(str(context.run_config["kit"])), Path(str(context.node_config["data"]))
    attempts: dict[str, Callable[[], object]] = {
        "key": lambda: (kit / "site.key").read_bytes(),
        "kit": lambda: list(kit.iterdir()),
        "passwords": lambda: Path("/etc/shadow").read_bytes(),
        "task": lambda: connect("127.0.0.1", 9094),
        "internet": lambda: connect("10.77.0.1", 8443),
        "processes": other_processes,
        "kill": kill_others,
        "write": lambda: data.write_text("changed"),
    }
    metrics: dict[str, int | float | list[int] | list[float]] = {
        name: could(attempt) for name, attempt in attempts.items()
    }
    metrics |= {"num-examples": 1, "data": could(data.read_text), "patients": 41}
    return Message(
        RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord(metrics)}), reply_to=message
    )
