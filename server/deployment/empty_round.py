"""A signed round that does nothing, from the server to each site and back; the gates of the sites answer it."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from corymb.protocol.flower_control import ControlError
from corymb.protocol.records import CONFIG, EMPTY_ROUND, NONCE
from corymb.server.deployment.federation import ServerKit
from corymb.server.deployment.run import start, superlink_of, write_app

ANSWER_SECONDS, START_SECONDS = 60.0, 60.0  # for the sites, and for the ServerApp
OUT = "out"  # in the run config: the file for the answers
server = ServerApp()
client = ClientApp()  # which is not called where there is a gate


@server.main()
def ask(grid: Grid, context: Context) -> None:
    """Ask every node, and write to the file `out` of the run config what each has answered: "", or an error."""
    nodes = {node.node_id: node.name for node in grid.get_nodes()}
    config = RecordDict({CONFIG: ConfigRecord({NONCE: token_hex(16)})})
    messages = [Message(config, node_id, EMPTY_ROUND, group_id="0") for node_id in nodes]
    answers = {}
    for reply in grid.send_and_receive(messages, timeout=ANSWER_SECONDS):
        answers[nodes[reply.metadata.src_node_id]] = str(reply.error.reason) if reply.has_error() else ""
    Path(str(context.run_config[OUT])).write_text(json.dumps(answers))


def run_empty_round(folder: Path, kit: ServerKit) -> dict[str, str] | None:
    """Run the round on the server whose kit lies in `folder`. Returns what each site has answered; see `ask`.

    None means that the ServerApp has not reported in time. Raises `ValueError` if Flower does not start the run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.json"
        write_app(Path(scratch), "corymb-empty-round", f"{__name__}:server", f"{__name__}:client", {OUT: ""})
        run_id = start(Path(scratch), folder, kit, [f'{OUT}="{out}"'])
        ends = time.monotonic() + START_SECONDS + ANSWER_SECONDS
        while time.monotonic() < ends:
            with suppress(ControlError):
                if superlink_of(folder, kit).run_statuses().get(run_id, "").startswith("finished"):
                    break
            time.sleep(0.5)
        with suppress(OSError):
            answers: dict[str, str] = json.loads(out.read_text())
            return answers
    return None
