"""One task at a site, in a process that was forked for it: Flower's command, the gate, and the app elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import isinf
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from corymb.client.gate.gate import Gate
from corymb.client.gate.kept import Kept
from corymb.client.gate.pipe import Pipe
from corymb.client.gate.policy import Refusal, SitePolicy, short_name
from corymb.protocol.flower_tasks import Bundle, context_from_bytes, context_to_bytes, run_clientapp_command
from corymb.protocol.message_file import from_bytes, to_pieces

MOST_KEPT = 8  # how many times as much as may leave, an app may keep


class AppFailed(RuntimeError):
    """The app at this site raised an exception, or its process has ended. The site's log has the traceback."""


def run_task(task: dict[str, Any], folder: Path, control: socket.socket) -> int:
    """Run Flower's command with the arguments and the environment in `task`. Returns its exit code.

    `control` leads to the process that keeps the processes of the apps.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(task["environment"])
    sys.argv = ["flwr-clientapp", *task["arguments"]]
    gate, apps = Gate(folder), _Apps(control, folder)

    def run_app(bundle: Bundle, message: Message, context: Context) -> Message:
        guarded = gate.around(lambda message, context: apps.run(gate.policy(), bundle, message, context))
        return guarded(message, context)

    try:
        run_clientapp_command(gate.admit, run_app, gate.release)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the main thread after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.0 if isinf(seconds) else seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _reason(policy: SitePolicy, kind: str, text: str) -> str:
    """Return what the server is told of an exception in an app. Its text may contain data."""
    return text[:500] if policy.error_text else f"{short_name(kind)}; its text is in gate.log of the site"


class _Apps:
    """The processes of apps, which the parent of this process keeps."""

    def __init__(self, control: socket.socket, folder: Path) -> None:
        self._control, self._folder = control, folder

    def run(self, policy: SitePolicy, bundle: Bundle, message: Message, context: Context) -> Message:
        """Run the app in `bundle` in the process of its run. Raises `AppFailed` if it does not return a reply."""
        data = [str(path) for path in policy.data]
        run = f"{context.run_id}/{bundle.names[-1]}/{policy.sandbox}/{data}"  # another sandbox is another process
        answer, connection = self._ask(what="process", run=run, sandbox=policy.sandbox, data=data)
        if connection is None:
            raise Refusal(answer["error"])
        pipe = Pipe(connection)
        header = {"run": context.run_id, "node": context.node_id, "names": bundle.names, "is_boxed": policy.sandbox}
        parts = {"message": to_pieces(message), "context": [context_to_bytes(context)]}
        kept = Kept(self._folder, hashlib.sha256(bundle.content).hexdigest(), message, context)
        if answer["is_new"]:
            parts["bundle"] = [bundle.content]
            if policy.sandbox and (copy := kept.read()) is not None:
                parts["kept"] = [copy]
        try:
            with closing(pipe), _limit(policy.most_seconds):
                pipe.send(header, **parts)
                result, received = pipe.receive(MOST_KEPT * policy.most_bytes)
        except TimeoutError:
            self._forget()
            raise AppFailed(f"it took longer than the {policy.most_seconds:g} s that the site allows") from None
        except (EOFError, OSError, ValueError):  # it has ended, or sends what is no answer
            ended = self._forget(has_ended=True)
            raise AppFailed(f"the process of the app has ended {ended or 'early'}") from None
        if not result["is_done"]:
            if not result.get("is_loaded"):  # the process will not get the app again
                self._forget()
            raise AppFailed(_reason(policy, result["kind"], result["error"]))
        if policy.sandbox and "kept" in received:
            try:
                kept.write(received["kept"])
            except OSError as error:
                print(f"What the app keeps is lost if its process ends, as it cannot be written: {error}", flush=True)
        if not policy.warm:
            self._forget()
        context.state = context_from_bytes(received["context"]).state
        reply = from_bytes(received["reply"])
        if reply.has_error():
            raise AppFailed(_reason(policy, f"error {reply.error.code}", str(reply.error.reason)))
        return Message(reply.content, reply_to=message)

    def _forget(self, has_ended: bool = False) -> str:
        return str(self._ask(what="forget", has_ended=has_ended)[0]["ended"])

    def _ask(self, **question: Any) -> tuple[dict[str, Any], socket.socket | None]:
        self._control.sendall(json.dumps(question).encode() + b"\n")
        data, descriptors, _, _ = socket.recv_fds(self._control, 65536, 1)
        answer: dict[str, Any] = json.loads(data)
        return answer, socket.socket(fileno=descriptors[0]) if descriptors else None
