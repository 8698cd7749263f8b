"""The client app of a simulation: it handles the messages of all clients, one at a time or many in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Context, Message

Client = Callable[[Message, Context], Message]  # handles the messages of every client
Request = tuple[Message, Context]
IndexedReplies = Iterator[tuple[int, Message | Exception]]  # the index of a request, and its reply or the exception


@runtime_checkable
class CohortTrainer(Protocol):
    """An app that can train all clients of a push in one call."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the reply of one client to `message`."""

    def train_together(self, requests: Sequence[Request]) -> IndexedReplies:
        """Return an iterator of (index of the request, reply or exception), in order of completion.

        Training starts with this call, not with the first `next`.
        """


def with_hooks(
    app: Client,
    request: Callable[[Message, Context], Message] = lambda message, context: message,
    reply: Callable[[Message, Context, Message], Message] = lambda message, context, reply: reply,
) -> Client:
    """Return `app` with hooks that change messages on their way to it and replies on their way back.

    `app` gets `request(message, context)` as its message; the server gets `reply(message, context, reply)`, where
    `message` is the changed one. The result implements `CohortTrainer` if `app` does.
    """

    def handle_one(message: Message, context: Context) -> Message:
        message = request(message, context)
        return reply(message, context, app(message, context))

    if not isinstance(app, CohortTrainer):
        return handle_one
    train_all = app.train_together

    class Hooked:
        def __call__(self, message: Message, context: Context) -> Message:
            return handle_one(message, context)

        def train_together(self, requests: Sequence[Request]) -> IndexedReplies:
            changed = [(request(message, context), context) for message, context in requests]
            return change_replies(train_all(changed), changed)

    def change_replies(answers: IndexedReplies, requests: Sequence[Request]) -> IndexedReplies:
        for index, answer in answers:
            yield index, reply(*requests[index], answer) if isinstance(answer, Message) else answer
            del answer  # free its model before the next one is trained

    return Hooked()
