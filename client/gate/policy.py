"""A site's policy: which apps may run, when, with which settings, and what may leave in their replies."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from datetime import date, datetime, time, timedelta
from math import inf, isfinite
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from pydantic import Field, ValidationError

from corymb.protocol.records import NONCE, STEPS, of_kind
from corymb.protocol.settings import Settings, problems

LONGEST_NAME, LONGEST_LIST = 60, 100  # characters of a record's name; numbers in one metric
TEMPLATE = """\
# What may run on this site's data, and what may leave. Corymb reads this file before each task.
pause = false
signed_tasks = SIGNED            # refuse what the federation's server has not signed
sandbox = true                   # apps see no network, no other process, and only the data below
data = []                        # this site's data, e.g. ["/srv/study-17"]; apps find the first as `data`
metrics = ["num-examples", "loss", "accuracy", "steps", "seconds", "completed"]   # others stay here
# largest_number = 1e6             # a reply with a larger number in a model, or with NaN, stays here
# least_seconds_between_rounds = 60
# error_text = true              # send the texts of an app's exceptions, which may contain data
# most_rounds_a_day = 100
# most_seconds = 3600              # the longest that one task may take
# from_hour = "20:00"              # of the site's clock
# to_hour = "06:00"

# [settings]                       # these override whatever a message says
# "train.batch_size" = 8

# One table for each app that may run. `corymb hash APP` and a refusal print the hash of an app.
# [[approved]]
# app = "the SHA-256 of the app"
# purpose = "Study 17, approved on 2026-11-01"
# expires = 2027-01-01
"""


def template(signed_tasks: bool) -> str:
    """Return a policy under which no app runs yet, with comments."""
    return TEMPLATE.replace("SIGNED", str(signed_tasks).lower().ljust(5))


def approve(path: Path, app: str, purpose: str, expires: date) -> None:
    """Add an approval to the policy in `path`. Raises `Refusal` if the policy would be invalid, and leaves it alone."""
    before = path.read_text()
    entry = f"\n[[approved]]\napp = {json.dumps(app)}\npurpose = {json.dumps(purpose)}\nexpires = {expires}\n"
    path.write_text(before.rstrip("\n") + "\n" + entry)
    try:
        SitePolicy.read(path)
    except Refusal:
        path.write_text(before)
        raise


class Refusal(PermissionError):
    """The site's policy forbids a task, or forbids its reply to leave."""


class Approval(Settings):
    """The approval of one app, by the SHA-256 of its bundle, for a purpose and until a day."""

    app: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The SHA-256 of the app's bundle, in hexadecimal."""
    purpose: str
    """The study, in words; it is written into the ledger."""
    expires: date
    """The first day on which the app no longer runs."""


class SitePolicy(Settings):
    """The policy of a site. Without any approval, no app runs."""

    pause: bool = False
    """While true, nothing runs."""
    signed_tasks: bool = False
    """Whether tasks must be signed by the federation's server."""
    sandbox: bool = True
    """Whether apps run in a sandbox (bubblewrap): no network, no other process, no files but `data` and programs."""
    data: list[Path] = Field(default_factory=list)
    """The folders and files that apps may read in the sandbox. The first is `data` in Flower's node config."""
    warm: bool = True
    """Whether an app's process serves all tasks of a run, so that it loads its data once. Else one per task."""
    most_seconds: float = Field(inf, gt=0)
    """The longest that one task may take; its process is then killed."""
    approved: list[Approval] = Field(default_factory=list)
    """The apps that may run."""
    metrics: list[str] = Field(default_factory=lambda: ["num-examples"])
    """The metrics that may leave; others are taken out of the reply."""
    records: int = Field(3, ge=1)
    """The largest number of records in a reply."""
    same_arrays: bool = True
    """Whether arrays that leave must have the names and shapes of the model that was received."""
    most_bytes: float = Field(2e9, gt=0)
    """The largest size of a record of arrays that may leave."""
    error_text: bool = False
    """Whether the text of an app's exception leaves; it may contain data. Else only its kind, such as KeyError."""
    largest_number: float = Field(inf, gt=0)
    """The largest absolute value in a model that may leave."""
    least_seconds_between_rounds: float = Field(0.0, ge=0)
    """The time between two trainings."""
    most_rounds_a_day: int = Field(0, ge=0)
    """The number of trainings in 24 hours; 0: no limit."""
    from_hour: time = time(0)
    """Tasks run from this time of the day on."""
    to_hour: time = time(0)
    """And until this one; the same as `from_hour`: the whole day."""
    settings: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Settings that override those of a message and of the run."""

    @classmethod
    def read(cls, path: Path) -> SitePolicy:
        """Read a policy. Raises `Refusal` if the file is missing or invalid, so that nothing runs by mistake."""
        try:
            return cls(**tomllib.loads(path.read_text()))
        except ValidationError as error:
            raise Refusal(f"the site's policy is invalid: {problems(error, cls)}") from None
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise Refusal(f"the site's policy cannot be read: {error}") from None

    def approval(self, app: str, now: datetime) -> Approval:
        """Return the approval under which `app` may run `now`, by the site's clock. Raises `Refusal` if it may not."""
        if self.pause:
            raise Refusal("the site has paused")
        matching = [approval for approval in self.approved if approval.app == app]
        if not matching:
            raise Refusal(f"the app {app} is not approved at this site")
        found = max(matching, key=lambda approval: approval.expires)  # it may have been renewed
        if now.date() >= found.expires:
            raise Refusal(f"the approval of the app {app} has expired on {found.expires}")
        if not _is_within(now.time(), self.from_hour, self.to_hour):
            raise Refusal(f"the site runs tasks from {self.from_hour:%H:%M} to {self.to_hour:%H:%M} only")
        return found

    def check_training(self, now: datetime, trained: Iterable[datetime]) -> None:
        """Raise `Refusal` if it is too early for another training; `trained` are the times of those so far."""
        recent = sorted(trained)
        elapsed = (now - recent[-1]).total_seconds() if recent else inf
        if 0 <= elapsed < self.least_seconds_between_rounds:  # below 0, the clock was set back
            raise Refusal(f"the site trains at most every {self.least_seconds_between_rounds:g} s")
        if self.most_rounds_a_day and sum(now - at < timedelta(days=1) for at in recent) >= self.most_rounds_a_day:
            raise Refusal(f"the site has trained {self.most_rounds_a_day} times in 24 hours")

    def with_settings(self, message: Message) -> None:
        """Put the site's settings into the configs of `message`, in place."""
        if self.settings and message.has_content():
            for record in message.content.values():
                if isinstance(record, ConfigRecord):
                    record.update(self.settings)

    def released(self, reply: Message, request: Message | None) -> list[str]:
        """Take out of `reply`, in place, what may not leave, and return its names. Raises `Refusal` if that is all.

        Arrays may only have the names and shapes of those in the `request`; None: there was none. Metrics must be
        listed. Of configs, only the nonce of the request leaves.
        """
        if reply.has_error():
            return []
        if len(of_kind(reply.content, ArrayRecord)) + len(of_kind(reply.content, MetricRecord)) > self.records:
            raise Refusal(f"the reply has {len(reply.content)} records, and {self.records} may leave")
        from corymb.protocol.codec import to_arrays, to_state  # imports torch, which takes seconds

        withheld = []
        shapes, nonce = _shapes(request), _nonce(request)
        for place, record in list(reply.content.items()):
            if isinstance(record, MetricRecord):
                for name in [name for name, value in record.items() if not self._may_leave(name, value)]:
                    del record[name]
                    withheld.append(name)
            elif isinstance(record, ConfigRecord):
                if dict(record) != {NONCE: nonce}:
                    del reply.content[place]
                    withheld.append(place)
            elif request is None or not request.metadata.message_type.startswith("train"):
                raise Refusal("only replies to training may have arrays")
            else:
                self._check_arrays(record, shapes, is_stack=place == STEPS)
                reply.content[place] = to_arrays(to_state(record))  # without what else its bytes may hold
            if len(place) > LONGEST_NAME:
                raise Refusal("a record has a long name")
        return [short_name(name) for name in withheld]

    def _may_leave(self, name: str, value: object) -> bool:
        """Return whether a metric may leave: it is listed, and it is a finite number, or a short list of such."""
        numbers = value if isinstance(value, list) else [value]
        is_short = len(numbers) <= LONGEST_LIST
        return name in self.metrics and is_short and all(isinstance(n, (int, float)) and isfinite(n) for n in numbers)

    def _check_arrays(self, record: ArrayRecord, shapes: dict[str, tuple[int, ...]], is_stack: bool) -> None:
        """Raise `Refusal` unless the arrays are like the request's. `is_stack`: each is a stack of such arrays."""
        from corymb.protocol.codec import to_state  # imports torch, which takes seconds

        if sum(len(array.data) for array in record.values()) > self.most_bytes:
            raise Refusal(f"its arrays have more than {self.most_bytes:g} bytes")
        for name, tensor in to_state(record).items():
            shape = tuple(tensor.shape[1:] if is_stack else tensor.shape)
            if self.same_arrays and shapes.get(name) != shape:
                raise Refusal("it has an array whose name or shape is not one of the model's")
            if not _is_bounded(tensor.double().numpy(), self.largest_number):
                raise Refusal(f"the array {name!r} has NaN or numbers beyond {self.largest_number:g}")


def short_name(name: str) -> str:
    """Return a name that an app has chosen, in a form that is safe for a ledger and a terminal."""
    return name if len(name) <= 60 and name.isprintable() else ascii(name[:60])


def _shapes(request: Message | None) -> dict[str, tuple[int, ...]]:
    if request is None:
        return {}
    records = of_kind(request.content, ArrayRecord)
    return {name: tuple(array.shape) for record in records for name, array in record.items()}


def _nonce(request: Message | None) -> object:
    configs = of_kind(request.content, ConfigRecord) if request is not None else []
    return next((config[NONCE] for config in configs if NONCE in config), None)


def _is_within(now: time, start: time, end: time) -> bool:
    if start == end:
        return True
    return start <= now < end if start < end else now >= start or now < end


def _is_bounded(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], bound: float) -> bool:
    return bool(np.isfinite(values).all() and (not values.size or np.abs(values).max() <= bound))
