"""The settings of a federation, in the file that `corymb provision` reads, and those in each kit that it makes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, StringConstraints, ValidationError, field_validator

from corymb.protocol.settings import Settings, problems

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
S = TypeVar("S", bound=Settings)
KIT = "kit.toml"
LOCAL = ["localhost", "127.0.0.1"]


class FederationSettings(Settings):
    """A federation: its server and its sites."""

    name: Name
    """The name of the federation."""
    server: str = Field(min_length=1)
    """The name or address at which the sites reach the server."""
    other_names: list[str] = Field(default_factory=list)
    """Other names and addresses of the server, for its certificate."""
    port: int = Field(8443, ge=1, le=65535)
    """The port at which the sites reach the server."""
    sites: list[Name] = Field(min_length=1)
    """The names of the sites."""
    days: int = Field(365, ge=1)
    """For how many days certificates are valid."""
    largest_message_mib: int = Field(64, ge=8)
    """The largest body of one request. Flower sends models in pieces of 5 MB, whatever their size."""
    requests_per_second: int = Field(50, ge=1)
    """How many requests per second each site may make."""

    @field_validator("sites")
    @classmethod
    def _has_no_name_twice(cls, sites: list[str]) -> list[str]:
        if twice := sorted({name for name in sites if sites.count(name) > 1}):
            raise ValueError(f"the name {twice[0]!r} is there twice")
        return sites


class ServerKit(Settings):
    """The kit of a server, `kit.toml`."""

    role: Literal["server"] = "server"
    """What the kit is for."""
    federation: Name
    """The name of the federation."""
    server: str
    """The name or address at which the sites reach the server."""
    port: int
    """The port at which nginx listens for the sites."""
    superlink_port: int
    """The port at which the SuperLink listens, on this machine only."""
    pages_port: int = 0
    """The port of the metrics and of the operator's page, on this machine only; 0 for none."""
    json_logs: bool = False
    """Whether Corymb's own logs are lines of JSON."""
    largest_message_mib: int = 64
    """The largest body of one request."""
    requests_per_second: int = 50
    """How many requests per second each site may make."""
    edge: bool = True
    """Whether nginx stands before the SuperLink. Without it, whoever reaches the port controls the federation."""


class SiteKit(Settings):
    """The kit of a site, `kit.toml`."""

    role: Literal["site"] = "site"
    """What the kit is for."""
    federation: Name
    """The name of the federation."""
    name: Name
    """The name of the site."""
    server: str
    """The name or address of the server."""
    port: int
    """The port of the server."""
    local_port: int = 9094
    """The port of the SuperNode, on this machine only."""
    node: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """The site's own settings for apps, Flower's node config. They go before those of a run."""


def read(path: Path, kind: type[S]) -> S:
    """Return the settings in a TOML file. Raises `ValueError` if it cannot be read or is invalid."""
    try:
        return kind(**tomllib.loads(path.read_text()))
    except ValidationError as error:
        raise ValueError(f"{path}: {problems(error, kind)}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def read_kit(folder: Path) -> ServerKit | SiteKit:
    """Return the settings of the kit in `folder`. Raises `ValueError` if it is not a kit."""
    path = folder / KIT
    if not path.exists():
        raise ValueError(f"{folder} is not a kit: it has no {KIT}; `corymb provision` makes kits.")
    is_site = tomllib.loads(path.read_text()).get("role") == "site"
    return read(path, SiteKit) if is_site else read(path, ServerKit)
