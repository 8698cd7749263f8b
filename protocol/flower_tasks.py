"""The part of the shim for Flower's private API that concerns the processes of apps in a deployment.

Flower's SuperExec starts the commands `flwr-serverapp` and `flwr-clientapp` by name. These functions take them apart,
so that a ServerApp can run in a child process, and a ClientApp behind a gate. The test of `protocol/flower.py` covers
this module too.
"""

from __future__ import annotations

import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from importlib import import_module
from typing import Any

from flwr.app import Context, Error, Message
from flwr.common.serde import context_from_proto, context_to_proto, run_from_proto, run_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.run_pb2 import Run as RunProto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from corymb.protocol.flower import CLIENT_APP_RAISED, with_error

RunApp = Callable[..., Context]  # (grid, context, server_app_dir, server_app_attr) -> context
App = Callable[[Message, Context], Message]
MODULE = "flwr.superlink.runtime.run_serverapp"
CLIENT_MODULE = "flwr.supernode.runtime.run_clientapp"


def run_serverapp_command(run_app: RunApp) -> None:
    """Do what the command `flwr-serverapp` does, with `run_app` in place of Flower's own function that runs the app."""
    command = import_module("flwr.superlink.cli").flwr_serverapp
    import_module(MODULE)
    sys.modules[MODULE].__dict__["run_"] = run_app  # the package has a function of the module's name
    command()


def describe_task(grid: Any, context: Context, server_app_dir: str, server_app_attr: str) -> dict[str, Any]:
    """Return what `run_task` needs, as JSON. `grid` is Flower's grid for deployments."""
    return {
        "address": grid._addr,
        "insecure": grid._insecure,
        "certificates": None if grid._cert is None else b64encode(grid._cert).decode(),
        "token": grid._token,
        "run": b64encode(run_to_proto(grid.run).SerializeToString()).decode(),
        "context": b64encode(context_to_proto(context).SerializeToString()).decode(),
        "folder": server_app_dir,
        "app": server_app_attr,
        "task": TaskIdentity.task_id,
        "node": TaskIdentity.node_id,
    }


def run_task(task: dict[str, Any]) -> None:
    """Run the ServerApp that `describe_task` has described."""
    http_grid: Callable[..., Any] = import_module("flwr.superlink.grid").HttpGrid
    certificates = task["certificates"] and b64decode(task["certificates"])
    grid: Grid = http_grid(task["address"], task["insecure"], certificates, token=task["token"])
    run = run_from_proto(RunProto.FromString(b64decode(task["run"])))
    context = context_from_proto(ContextProto.FromString(b64decode(task["context"])))
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task["task"], run.run_id, task["node"]
    grid.set_run(run)
    import_module("flwr.server.run_serverapp").run(grid, context, task["folder"], task["app"])


def run_clientapp_command(
    admit: Callable[[bytes], None], around: Callable[[App], App], release: Callable[[Message], None]
) -> None:
    """Do what the command `flwr-clientapp` does, with a gate: `admit` sees the app's bundle before it is installed,
    `around` may change the loaded app, and `release` sees the reply before it leaves. Each may raise an exception.
    """
    command = import_module("flwr.supernode.cli").flwr_clientapp
    import_module(CLIENT_MODULE)
    module = sys.modules[CLIENT_MODULE].__dict__
    install, load, push = module["install_from_fab"], module["get_load_client_app_fn"], module["push_message"]

    def install_if_admitted(content: bytes, **options: Any) -> Any:
        admit(content)
        return install(content, **options)

    def load_with_gate(*arguments: Any, **options: Any) -> Callable[..., App]:
        load_app = load(*arguments, **options)

        def loaded(*names: Any) -> App:
            app = around(load_app(*names))
            return lambda message, context: app(message, context)

        return loaded

    def push_if_released(client: Any, reply: Message, context: Context) -> Any:
        try:
            release(reply)
        except Exception as error:
            reply = with_error(reply, Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"))
        return push(client, reply, context)

    module |= {
        "install_from_fab": install_if_admitted,
        "get_load_client_app_fn": load_with_gate,
        "push_message": push_if_released,
    }
    command()
