"""What `corymb doctor` finds: one sentence for each check, and an exit code for each kind of fault."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Fault(IntEnum):
    """The kinds of faults. Each is an exit code of `corymb doctor`."""

    NONE = 0
    NAME = 10  # the server's name has no address
    CONNECTION = 11  # the server's port does not answer
    PROXY = 12  # the environment sends Flower's connections through a proxy
    CLOCK = 13  # the clock is outside of Flower's window
    AUTHORITY = 14  # the server's certificate comes from another authority
    SERVER_NAME = 15  # the server's certificate does not have the name
    SERVER_EXPIRED = 16  # the server's certificate has expired
    NO_CERTIFICATE = 17  # the site has no certificate, or not one for its key
    SITE_EXPIRED = 18  # the site's certificate has expired
    NOT_ENROLLED = 19  # the server does not know the site's key
    VERSION = 20  # the versions of Flower do not fit
    DISK = 21  # too little space
    SANDBOX = 22  # bubblewrap is missing or does not work
    DATA = 23  # the site's data are missing or cannot be read
    POLICY = 24  # the site's policy is invalid, or approves nothing
    GPU = 25  # there is a GPU that torch cannot use
    UPLINK = 26  # the connection is too slow for Flower
    NGINX = 30  # nginx is missing, or does not accept its configuration
    SUPERLINK = 31  # the SuperLink does not answer
    MONITOR = 32  # the monitor has stopped
    OFFLINE = 33  # a site is offline
    EMPTY_ROUND = 34  # a site does not answer a signed round that does nothing


@dataclass(frozen=True)
class Finding:
    """The result of a check: a `fault`, or none, and one sentence."""

    fault: Fault
    text: str


def good(text: str) -> Finding:
    """Return the finding of a check that has found no fault."""
    return Finding(Fault.NONE, text)
