"""Clients of a simulation: one app that answers for all of them, one message at a time or many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Context, Message

Client = Callable[[Message, Context], Message]
Request = tuple[Message, Context]
Answers = Iterator[tuple[int, Message | Exception]]


@runtime_checkable
class TrainsTogether(Protocol):
    """An app that can train all clients of a push in one call."""

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply of one client by itself."""

    def train_together(self, requests: Sequence[Request]) -> Answers:
        """The number of each request and its reply, or what was raised, as they come; work begins at once."""


def changed(
    app: Client,
    request: Callable[[Message, Context], Message] = lambda message, context: message,
    reply: Callable[[Message, Context, Message], Message] = lambda message, context, reply: reply,
) -> Client:
    """`app`, whose clients get `request(message, context)` and whose replies are `reply(message, context, reply)`.

    It trains clients together if `app` does.
    """

    def alone(message: Message, context: Context) -> Message:
        message = request(message, context)
        return reply(message, context, app(message, context))

    if not isinstance(app, TrainsTogether):
        return alone
    together = app.train_together

    class Changed:
        def __call__(self, message: Message, context: Context) -> Message:
            return alone(message, context)

        def train_together(self, requests: Sequence[Request]) -> Answers:
            given = [(request(message, context), context) for message, context in requests]
            return _replies(together(given), given)

    def _replies(answers: Answers, given: Sequence[Request]) -> Answers:
        for number, answer in answers:
            yield number, reply(*given[number], answer) if isinstance(answer, Message) else answer
            del answer

    return Changed()
