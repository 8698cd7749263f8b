"""The part of the shim for Flower's private API that concerns the processes of apps in a deployment.

Flower's SuperExec starts the commands `flwr-serverapp` and `flwr-clientapp` by name. These functions take them apart,
so that a ServerApp can run in a child process, and a ClientApp behind a gate. The test of `protocol/flower.py` covers
this module too.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tomllib
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.common.serde import context_from_proto, context_to_proto, run_from_proto, run_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.run_pb2 import Run as RunProto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from corymb.protocol.flower import CLIENT_APP_RAISED, with_error
from corymb.protocol.flower_programs import look_often, retry_heartbeats
from corymb.protocol.stored_arrays import store_pulled_arrays

RunApp = Callable[..., Context]  # (grid, context, server_app_dir, server_app_attr) -> context
App = Callable[[Message, Context], Message]
MODULE = "flwr.superlink.runtime.run_serverapp"
RAISED = re.compile(r"<class '(?:.*\.)?(\w+)'>:<'(.*)'>", re.DOTALL)  # Flower's text for an exception
CLIENT_MODULE = "flwr.supernode.runtime.run_clientapp"


def run_serverapp_command(run_app: RunApp) -> None:
    """Do what the command `flwr-serverapp` does, with `run_app` in place of Flower's own function that runs the app."""
    retry_heartbeats()
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


def run_task(task: dict[str, Any], prepare: Callable[[Grid], None] = lambda grid: None) -> None:
    """Run the ServerApp that `describe_task` has described, after `prepare` has seen its grid."""
    http_grid: Callable[..., Any] = import_module("flwr.superlink.grid").HttpGrid
    certificates = task["certificates"] and b64decode(task["certificates"])
    grid: Grid = http_grid(task["address"], task["insecure"], certificates, token=task["token"])
    run = run_from_proto(RunProto.FromString(b64decode(task["run"])))
    context = context_from_proto(ContextProto.FromString(b64decode(task["context"])))
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task["task"], run.run_id, task["node"]
    grid.set_run(run)
    prepare(grid)
    look_often()
    store_pulled_arrays()
    import_module("flwr.server.run_serverapp").run(grid, context, task["folder"], task["app"])


@dataclass(frozen=True)
class Bundle:
    """A Flower app as it travels to a site: its archive, and the names by which Flower knows it: id, version, hash."""

    content: bytes
    names: tuple[str, ...]


def run_clientapp_command(
    admit: Callable[[bytes], None],
    run_app: Callable[[Bundle, Message, Context], Message],
    release: Callable[[Message], None],
) -> None:
    """Do what the command `flwr-clientapp` does, but run the app by `run_app`, elsewhere than in this process.

    `admit` sees the app's archive before anything is done with it, and `release` the reply before it leaves. Each of
    the three may raise an exception, which becomes the reply.
    """
    command = import_module("flwr.supernode.cli").flwr_clientapp
    import_module(CLIENT_MODULE)
    module = sys.modules[CLIENT_MODULE].__dict__
    push, archives = module["push_message"], []

    def admit_archive(content: bytes, **options: Any) -> None:
        admit(content)
        archives.append(content)

    def app_elsewhere(*arguments: Any, **options: Any) -> Callable[..., App]:
        def loaded(*names: str) -> App:
            return lambda message, context: run_app(Bundle(archives[-1], names), message, context)

        return loaded

    def push_if_released(client: Any, reply: Message, context: Context) -> Any:
        try:
            release(reply)
        except Exception as error:
            reply = with_error(reply, Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"))
        if reply.has_error() and (found := RAISED.fullmatch(str(reply.error.reason))):
            reply = with_error(reply, Error(reply.error.code, f"{found[1]}: {found[2]}"))
        return push(client, reply, context)

    module |= {
        "install_from_fab": admit_archive,
        "get_load_client_app_fn": app_elsewhere,
        "push_message": push_if_released,
    }
    look_often()
    retry_heartbeats()
    command()


def load_app(bundle: Bundle) -> App:
    """Unpack and load a ClientApp, as the command `flwr-clientapp` does. Raises what its code raises."""
    import_module(CLIENT_MODULE)
    module = sys.modules[CLIENT_MODULE].__dict__
    module["install_from_fab"](bundle.content, skip_prompt=True)
    load = module["get_load_client_app_fn"](default_app_ref="", app_path=None, multi_app=True)
    app: App = load(*bundle.names)
    return app


def context_to_bytes(context: Context) -> bytes:
    """Return `context` in Flower's own encoding."""
    data: bytes = context_to_proto(context).SerializeToString()
    return data


def context_from_bytes(data: bytes) -> Context:
    """Return the context that `context_to_bytes` has encoded."""
    return context_from_proto(ContextProto.FromString(data))


def build_bundle(app: Path) -> Bundle:
    """Return the bundle that the command `flwr run` makes of the app in the folder `app`."""
    content: bytes = import_module("flwr.cli.build").build_fab_from_disk(app)
    project = tomllib.loads((app / "pyproject.toml").read_text())
    publisher, name = project["tool"]["flwr"]["app"]["publisher"], project["project"]["name"]
    digest = hashlib.sha256(content).hexdigest()
    return Bundle(content, (f"{publisher}/{name}", project["project"]["version"], digest))
