"""The process in which a site runs an app, in its sandbox: it has imported torch and Flower, and waits for tasks.

It runs the tasks of one app in one run, one after the other, so that the app loads its data once. The gate, another
process, talks to Flower, applies the policy and signs; this one has no secrets.
"""

from __future__ import annotations

import socket
import sys
import traceback
from importlib import import_module
from typing import Any

from corymb.client.gate.kept import packed, stamps, unpack
from corymb.client.gate.pipe import Pipe
from corymb.protocol.flower import set_task_identity
from corymb.protocol.flower_tasks import App, Bundle, context_from_bytes, context_to_bytes, load_app
from corymb.protocol.home import CLIENTS, home
from corymb.protocol.message_file import from_bytes, to_pieces


def serve(pipe: Pipe) -> None:
    """Run the tasks that come through `pipe` until its other end closes."""
    _warm_up()
    app: App | None = None
    kept = home() / CLIENTS
    while True:
        try:
            header, parts = pipe.receive()
        except EOFError:
            return
        set_task_identity(header["run"], header["node"])
        try:
            if "kept" in parts:
                unpack(parts["kept"], kept)
            before = stamps(kept) if header["is_boxed"] else {}
            if app is None:
                app = load_app(Bundle(parts["bundle"], tuple(header["names"])))
            context = context_from_bytes(parts["context"])
            reply = app(from_bytes(parts["message"]), context)
            answer: dict[str, Any] = {"is_done": True}
            results = {"reply": to_pieces(reply), "context": [context_to_bytes(context)]}
            if header["is_boxed"] and stamps(kept) != before:  # else it lies at the site anyway
                results["kept"] = [packed(kept)]
        except BaseException as error:  # SystemExit too: an app may call sys.exit
            traceback.print_exc()
            kind = type(error).__name__
            answer = {"is_done": False, "kind": kind, "error": f"{kind}: {error}"[:2000], "is_loaded": app is not None}
            results = {}
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(answer, **results)


def _warm_up() -> None:
    """Import what every app needs, past the first step of an optimiser, whose imports take seconds."""
    import torch

    import_module("corymb.client")
    import_module("flwr.supernode.runtime.run_clientapp")
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.SGD([parameter], lr=0.1).step()


if __name__ == "__main__":
    serve(Pipe(socket.socket(fileno=int(sys.argv[1]))))
