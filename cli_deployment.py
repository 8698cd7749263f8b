"""The commands that provision a federation, and start its server and its sites."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

console = Console(soft_wrap=True, markup=False, highlight=False)
Folder = Annotated[Path, typer.Argument(metavar="KIT", help="The folder of a kit that `corymb provision` has made.")]
WAITING = 3  # exit code of `join` while the site has no certificate


class Action(StrEnum):
    """What `corymb provision` does."""

    MAKE = "make"
    ADD = "add"
    SIGN = "sign"
    ROTATE = "rotate"
    REVOKE = "revoke"
    RENEW = "renew"


def provision(
    file: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="The file that describes the federation.")],
    action: Annotated[Action, typer.Argument(help="What to do; see above.")] = Action.MAKE,
    what: Annotated[str, typer.Argument(metavar="[SITE or REQUEST]", help="The site, or its request.")] = "",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The folder of the federation (default: that of the file, with its name)."),
    ] = None,
    keys_here: Annotated[
        bool, typer.Option("--keys-here", help="Make the sites' keys here too, for a trial on one machine.")
    ] = False,
) -> None:
    """Make the certificates and the kits of a federation: one for the server, and one for each site.

    \b
    corymb provision hearts.toml                   make what is missing
    corymb provision hearts.toml add west          add a site
    corymb provision hearts.toml sign north.csr    sign a site's request
    corymb provision hearts.toml rotate north.csr  the same, for a new key
    corymb provision hearts.toml revoke north      shut a site's key out
    corymb provision hearts.toml renew             renew all certificates

    hearts.toml needs name, server and sites:

    \b
    name = "hearts"
    server = "fl.example.org"
    sites = ["north", "south", "east"]
    """
    from corymb.client.gate.policy import template
    from corymb.protocol.certificates import WARN_DAYS
    from corymb.server.deployment.federation import FederationSettings, read
    from corymb.server.deployment.provision import Federation
    from corymb.server.deployment.site_list import with_site

    if (action in (Action.MAKE, Action.RENEW)) == bool(what):
        raise ValueError(
            f"provision {action} takes {'no' if what else 'a'} site or request; see corymb provision --help."
        )
    if action is Action.ADD:
        with_site(file, what)
    federation = Federation(read(file, FederationSettings), out or file.parent / file.stem)
    new = federation.create()
    for name in new:
        (federation.site(name) / "policy.toml").write_text(template(signed_tasks=True))
    if keys_here:
        federation.make_keys_here(new)
    if action in (Action.SIGN, Action.ROTATE):
        path = federation.sign(Path(what), replaces=action is Action.ROTATE)
        console.print(f"Wrote {path}. Send it to the site, which puts it into its kit.")
    elif action is Action.REVOKE:
        federation.revoke(what)
        console.print(f"The key of {what} is revoked. The running server takes it out within seconds.")
    elif action is Action.RENEW:
        console.print(
            f"Renewed: {', '.join(federation.renew())}. Send each site its NAME.crt from {federation.folder}."
        )
    if new:
        console.print(f"Wrote the kits of the server and of {', '.join(new)} into {federation.folder}.")
        console.print(f"Give each site its folder in {federation.folder / 'sites'}, and keep authority/ offline.")
    for name, days in federation.days_left().items():
        if days < WARN_DAYS:
            console.print(f"warning: the certificate of {name} is valid for {days:.0f} more days; renew it.")


def serve(folder: Folder) -> None:
    """Run the server of a federation in the foreground, until Ctrl-C or SIGTERM.

    \b
    corymb serve hearts/server

    It starts nginx, Flower's SuperLink and SuperExec, and keeps them
    running. The kit gets a unit for systemd.
    """
    from corymb.server.deployment.federation import ServerKit, read_kit
    from corymb.server.deployment.processes import server_processes
    from corymb.server.deployment.status import SITES, active_runs
    from corymb.server.deployment.supervision import Supervisor
    from corymb.server.deployment.units import write_units

    folder = folder.resolve()
    kit = read_kit(folder)
    if not isinstance(kit, ServerKit):
        raise ValueError(f"{folder} is the kit of the site {kit.name}; start it with `corymb join {folder}`.")
    processes = server_processes(folder, kit)
    console.print(f"The server of {kit.federation} listens on port {kit.port}. Logs: {folder / 'var' / 'log'}.")
    console.print(f"To start it with the machine: sudo systemctl enable --now {write_units(folder, kit)}")
    try:
        Supervisor(processes, folder / "var" / "log", console.print).run()
    finally:
        for run_id in active_runs(folder):
            console.print(
                f"Run {run_id} was under way. Flower ends it within five minutes. Start this server again, and the run "
                "anew with `corymb run APP --set resume=true`: it goes on after its last round.",
                soft_wrap=True,
            )
        (folder / "var" / SITES).unlink(missing_ok=True)  # nobody looks any longer


def join(
    folder: Folder,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make a new key and a request for its certificate, and do not start.")
    ] = False,
) -> None:
    """Run a site of a federation in the foreground, until Ctrl-C or SIGTERM.

    \b
    corymb join north

    The first time, it makes the site's key, which never leaves the site,
    and writes the request NAME.csr for the server's operator. Put the
    NAME.crt that comes back into the kit, and start again. It then starts
    Flower's SuperNode and SuperExec behind the site's gate, and keeps them
    running. Edit policy.toml in the kit to say what may run. Exit code 3:
    the site has no certificate yet.
    """
    from corymb.client.gate.policy import SitePolicy, template
    from corymb.client.gate.program import write_site
    from corymb.server.deployment import join as site
    from corymb.server.deployment.federation import SiteKit, read_kit
    from corymb.server.deployment.units import write_units

    folder = folder.resolve()
    kit = read_kit(folder)
    if not isinstance(kit, SiteKit):
        raise ValueError(f"{folder} is the kit of the server; start it with `corymb serve {folder}`.")
    gate = write_site(folder, template(signed_tasks=True)).parent
    site.adopt_certificate(folder, kit)
    if new_key or not (folder / site.CERTIFICATE).exists():
        request = site.write_request(folder, kit, new_key)
        console.print(f"Send {request} to the operator of {kit.federation}, and put the {kit.name}.crt that comes back")
        console.print(f"into {folder}." if new_key else f"into {folder}. Then start again.")
        raise typer.Exit(0 if new_key else WAITING)
    console.print(
        f"The site {kit.name} joins {kit.federation} at {kit.server}:{kit.port}. Logs: {folder / 'var' / 'log'}."
    )
    console.print(f"To start it with the machine: sudo systemctl enable --now {write_units(folder, kit)}")
    data = [str(path) for path in SitePolicy.read(folder / "policy.toml").data[:1]]
    node = {"name": kit.name, **dict(zip(["data"], data, strict=False)), **kit.node}
    site.join(folder, kit, gate, node, console.print)
