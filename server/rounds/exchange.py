"""The exchange of messages with the nodes in a run: asking, receiving, and asking again.

In a deployment, what is asked is noted before it is sent, and replies are kept until the round is committed. So a
server that is killed and started again receives what it still lacks, and no node trains twice.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from math import inf

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from corymb.protocol.flower import forget_chunks, is_simulation, set_message_ids
from corymb.protocol.grids import SigningGrid
from corymb.protocol.records import DEADLINE, MEMORY, NONCE
from corymb.server.rounds.arrivals import arrivals, first, polled
from corymb.server.rounds.asking import Asking, copy_of
from corymb.server.rounds.codes import ADMITTED, SILENT
from corymb.server.rounds.events import Event, EventLog, some
from corymb.server.rounds.late import LateReplies
from corymb.server.rounds.patience import Patience
from corymb.server.rounds.record import Verdict
from corymb.server.rounds.rejections import Code
from corymb.server.rounds.requests import push
from corymb.server.rounds.roster import is_complete
from corymb.server.rounds.round import Asked, Requests
from corymb.server.rounds.round_journal import AskJournal

log = logging.getLogger("flwr.corymb")
PAUSE_SECONDS = 1.0  # between two looks for nodes that come back
LEAST_SECONDS = 10.0  # that a restarted server waits for replies, even if the deadline has passed meanwhile


class Exchange:
    """The exchange with the nodes behind `grid`, one phase of a round at a time: `begin`, `push`, `replies`.

    `timeout` is the limit for each phase in seconds, None for no limit. `journal` keeps what was asked and answered;
    None if nothing is kept. In a simulation, nothing is noted, kept or asked again.
    """

    def __init__(self, grid: Grid, timeout: float | None, journal: AskJournal | None = None) -> None:
        self._grid, self._timeout = grid, timeout
        self.is_deployed = not is_complete(grid) and not is_simulation(grid)
        self._journal = journal if self.is_deployed else None
        self._events = EventLog(self._journal, self.is_deployed)
        self._late = LateReplies(grid, self._events)
        self._round, self._phase, self._nonce = 0, "", ""
        self._asked: Asked | None = None  # by an earlier process of this server
        self._sent: dict[str, Message] = {}
        self._asking: Asking | None = None
        self._remembers: dict[str, bool] = {}  # of each node: whether its client answers from memory
        self._longest: dict[str, float] = {}  # of each phase: the longest duration of a reply in the last round

    @property
    def durations(self) -> Sequence[float] | None:
        """The seconds after which the replies of this phase have come so far; None in a simulation."""
        return self._asking.durations if self._asking is not None else None

    def busy(self, number: int) -> frozenset[str]:
        """Return the nodes that still owe a reply to an earlier round, and so are not to be asked in round `number`."""
        return self._late.busy(number) if self.is_deployed else frozenset()

    def begin(self, number: int, phase: str, config: ConfigRecord) -> ConfigRecord:
        """Begin a phase. Returns the config of its messages: in a deployment, with a nonce and the deadline."""
        self._round, self._phase, self._asking = number, phase, None
        if not self.is_deployed:
            return config
        self._asked = self._journal.asked(number, phase, self._run_id) if self._journal else None
        self._nonce = self._asked.nonce if self._asked else secrets.token_hex(8)
        extra: dict[str, str | float] = {NONCE: self._nonce}
        if self._timeout is not None:
            extra[DEADLINE] = float(self._timeout)
        if self._journal is not None:
            extra[MEMORY] = str(self._journal.first_run(self._run_id))
        return ConfigRecord({**config, **extra})

    def push(self, messages: list[Message], requests_of: Callable[[list[Message]], Requests]) -> Requests:
        """Push `messages`, and return what has been asked.

        If an earlier process of this server has pushed the messages of this phase, they are not pushed again.
        """
        if not self.is_deployed:
            self._sent = push(self._grid, messages)
            return requests_of(messages)
        if self._asked is not None and self._asked.requests.by_message:
            requests, number = self._asked.requests, self._round
            log.info("[ROUND %d] These nodes were asked before the restart: %s", number, some(requests.nodes))
            self._remembers = {**self._asked.remembers, **self._remembers}
            self._asking = self._make_asking(self._asked, messages)
            return requests
        messages, asked, accepted = self._pushed(messages, requests_of)
        for message in messages:
            forget_chunks(message)
        if set(asked.requests.by_message) - set(accepted):  # refused, or a grid that gives ids of its own
            asked = replace(asked, requests=requests_of(messages))
            self._note(asked)
        self._asking = self._make_asking(asked, messages)
        for node in asked.requests.by_message.values():
            self._events.add(Event(self._round, self._phase, node, "asked"))
        return asked.requests

    def _pushed(
        self, messages: list[Message], requests_of: Callable[[list[Message]], Requests]
    ) -> tuple[list[Message], Asked, Collection[str]]:
        """Note and push `messages`. Returns them as pushed, what is noted, and the ids that the grid has accepted.

        If the SuperLink fails, nobody knows which of them it has. They are pushed again as new ones, with the same
        nonce, which ready clients answer only once.
        """
        patience = Patience()
        while True:
            if isinstance(self._grid, SigningGrid):
                messages = [self._grid.sign(message) for message in messages]
            set_message_ids(messages)
            asked = Asked(self._nonce, requests_of(messages), time.time(), self._run_id, dict(self._remembers))
            self._note(asked)  # before the push: after a crash, Flower tells which of these ids it does not know
            try:
                return messages, asked, push(self._grid, messages)
            except Exception as error:
                patience.wait(error)
                messages = [copy_of(message, self._timeout or inf) for message in messages]

    def replies(self, enough: int | None = None) -> Iterator[Message]:
        """Yield the replies to the messages of this phase as they arrive; see `arrivals`."""
        if self._asking is None:
            yield from arrivals(self._grid, self._sent, self._timeout, enough)
            return
        asking, number, phase = self._asking, self._round, self._phase
        enough = len(asking.asked.requests.by_message) if enough is None else enough
        deadline = time.monotonic() + self._seconds_left(asking)
        try:
            with closing(self._kept_then_arriving(asking, deadline)) as replies:
                yield from first(enough, replies)
        finally:
            self._late.add(number, phase, asking.unanswered())

    def judged(self, verdicts: Iterable[Verdict]) -> None:
        """Store the rejections among the `verdicts` of this phase as events."""
        for verdict in verdicts:
            if verdict.code not in (ADMITTED, SILENT, Code.OFFLINE):
                self._events.store(Event(self._round, self._phase, verdict.node, verdict.code, detail=verdict.reason))

    def _kept_then_arriving(self, asking: Asking, deadline: float) -> Generator[Message]:
        """Yield the replies that an earlier process of this server has kept, and then those that arrive."""
        number, phase = self._round, self._phase
        kept = self._journal.kept_replies(number, phase) if self._journal else iter(())
        for reply, at in kept:
            if asking.accept(reply, at):
                yield reply
            del reply
        if self._is_closed():
            return
        for reply in self._arriving(asking, deadline):
            if asking.accept(reply):
                if self._journal is not None:
                    self._journal.keep_reply(number, phase, reply, time.time())
                yield reply
            del reply

    def _arriving(self, asking: Asking, deadline: float) -> Generator[Message]:
        """Yield the replies that arrive until `deadline`, and errors for the nodes that stay offline."""
        while True:
            yield from polled(self._grid, asking.sent, asking.waiting, deadline, asking.attend)
            yield from asking.still_offline(is_over=time.monotonic() >= deadline)
            if not asking.awaits_return:
                return
            time.sleep(PAUSE_SECONDS)
            asking.attend()

    def _make_asking(self, asked: Asked, messages: list[Message]) -> Asking:
        ends = inf if self._timeout is None else asked.at + self._timeout
        known = self._remembers, self._longest, self._events
        return Asking(self._grid, self._round, self._phase, asked, messages, ends, *known)

    def _seconds_left(self, asking: Asking) -> float:
        return max(LEAST_SECONDS, asking.ends - time.time())

    def _is_closed(self) -> bool:
        """Return whether an earlier process of this server has ended the training of this round, and gone on.

        Then no further reply counts, because evaluations of the resulting model may have come.
        """
        if self._phase != "train" or self._journal is None:
            return False
        return self._journal.asked(self._round, "evaluate", self._run_id) is not None

    def _note(self, asked: Asked) -> None:
        if self._journal is not None:
            self._journal.note_asked(self._round, self._phase, asked)

    @property
    def _run_id(self) -> int:
        return int(self._grid.run.run_id)
