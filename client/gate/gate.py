"""The gate around any ClientApp at a site: approval before its code runs, the site's settings, and what may leave."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from corymb.client.gate.identity import Identity
from corymb.client.gate.ledger import Ledger
from corymb.client.gate.policy import Refusal, SitePolicy
from corymb.client.gate.program import POLICY
from corymb.client.memory import answer_from_memory
from corymb.protocol.records import EMPTY_ROUND, of_kind
from corymb.protocol.signatures import RECORD, ForgedMessage

LEDGER = "ledger.jsonl"
App = Callable[[Message, Context], Message]


class Gate:
    """The gate of the site whose policy and ledger lie in `folder`. One task passes through it at a time."""

    def __init__(self, folder: Path, now: Callable[[], datetime] = datetime.now) -> None:
        self._policy_path, self._ledger, self._now = folder / POLICY, Ledger(folder / LEDGER), now
        self._identity = Identity.read(folder)
        self._task: dict[str, Any] = {}
        self._is_refused = False
        self._refusal: Refusal | None = None  # of the task's app
        self._request: Message | None = None

    def policy(self) -> SitePolicy:
        """Return the site's policy as it is now. Raises `Refusal` if it cannot be read."""
        return SitePolicy.read(self._policy_path)

    def admit(self, bundle: bytes) -> None:
        """Take note of the app in `bundle`, of which nothing has run yet, and of whether the policy allows it."""
        app = hashlib.sha256(bundle).hexdigest()
        self._task, self._refusal = {"app": app}, None
        try:
            self._task["purpose"] = self.policy().approval(app, self._now()).purpose
        except Refusal as refusal:
            self._refusal = refusal

    def around(self, app: App) -> App:
        """Return `app` with the site's settings, and with a memory of its last answers.

        Calls of it raise `Refusal`, and note it in the ledger, if the policy does not allow the app that `admit` has
        seen, or wants tasks to be signed and the message is not. A message of an empty round needs no approval: the
        gate answers it, and the app is not called.
        """

        def guarded(message: Message, context: Context) -> Message:
            kind, run = message.metadata.message_type, str(message.metadata.run_id)
            if self._refusal is not None and kind != EMPTY_ROUND:
                self._note_refusal(self._refusal)
                raise self._refusal
            policy = self.policy()
            if policy.signed_tasks:
                self._check_signature(message)
            message.content.pop(RECORD, None)  # not all of it is signed, and apps read settings from all configs
            policy.with_settings(message)
            context.run_config.update(policy.settings)
            self._task |= {"run": run, "round": message.metadata.group_id, "kind": kind}
            self._request = message
            if kind == EMPTY_ROUND:
                return Message(RecordDict(), reply_to=message)
            return answer_from_memory(message, context, partial(self._run, policy, app))

        return guarded

    def _run(self, policy: SitePolicy, app: App, message: Message, context: Context) -> Message:
        """Run `app`, if its answer is not in memory and, for a training, if it is not too early for another one."""
        if message.metadata.message_type.startswith("train"):
            try:
                policy.check_training(self._now(), self._trainings())
            except Refusal as refusal:
                self._note_refusal(refusal)
                raise
        self._ledger.add("ran", self._now(), **self._task)
        return app(message, context)

    def release(self, reply: Message) -> None:
        """Take out of `reply` what may not leave, and note what leaves. Raises `Refusal` if nothing may."""
        try:
            withheld = self.policy().released(reply, self._request)
        except Exception as error:  # the reply comes from the app
            refusal = (
                error if isinstance(error, Refusal) else Refusal(f"the reply cannot be read ({type(error).__name__})")
            )
            self._ledger.add("withheld", self._now(), **self._task, reason=str(refusal))
            raise refusal from None
        if reply.has_error():
            if self._is_refused:  # which is in the ledger already
                return
            self._ledger.add("left", self._now(), **self._task, error=str(reply.error.reason)[:500])
            return
        arrays = [array for record in of_kind(reply.content, ArrayRecord) for array in record.values()]
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array.data)
        if self._identity is not None:
            self._identity.sign(reply)
        metrics = {name: value for record in of_kind(reply.content, MetricRecord) for name, value in record.items()}
        details = {"arrays": len(arrays), "bytes": sum(len(array.data) for array in arrays), "metrics": metrics}
        self._ledger.add("left", self._now(), **self._task, **details, sha256=digest.hexdigest(), withheld=withheld)

    def _check_signature(self, message: Message) -> None:
        try:
            if self._identity is None:
                raise ForgedMessage("this site has no certificate to check its signature with")
            self._identity.check_task(message)
        except ForgedMessage as problem:
            refusal = Refusal(f"the task is not one of the federation's server: {problem}")
            self._note_refusal(refusal)
            raise refusal from None

    def _note_refusal(self, refusal: Refusal) -> None:
        self._is_refused = True
        self._ledger.add("refused", self._now(), **self._task, reason=str(refusal))

    def _trainings(self) -> list[datetime]:
        entries = self._ledger.entries()
        return [
            datetime.fromisoformat(entry["at"])
            for entry in entries
            if entry["event"] == "ran" and str(entry.get("kind", "")).startswith("train")
        ]
