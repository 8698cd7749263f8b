"""Signed exchanges on Flower's grid: requests are signed by the server, and replies are checked against the roster."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.certificates import SITE, check_issued, pem, public_key_of, read_certificate, read_key
from corymb.protocol.flower import with_content, with_error
from corymb.protocol.signatures import FORGED, RECORD, ForgedMessage, check, claims_of, signed

SOFTWARE = "software"  # the folder in `var` of a kit with a file for each site: its versions of Corymb and Flower
CERTIFICATE = "certificate"  # in the record of a request's signature: that of the server's key, as PEM


class Signer:
    """The server's identity and its roster, in the folder `kit`: who may answer, and with which key."""

    def __init__(self, kit: Path) -> None:
        self._key = read_key(kit / "tasks.key")
        self._certificate = pem(read_certificate(kit / "tasks.crt"))
        self._authority, self._roster = read_certificate(kit / "ca.crt"), kit / "roster"
        self._software, self._noted = kit / "var" / SOFTWARE, dict[str, str]()
        nothing = RecordDict()
        self._last: tuple[RecordDict, dict[str, Any], RecordDict] = nothing, {}, nothing  # messages share contents

    def sign(self, message: Message) -> Message:
        """Return `message` with a signature."""
        if RECORD in dict(message.content.items()):
            return message
        claims = claims_of(message)
        content, said, signed_content = self._last
        if content is not message.content or said != claims:
            record = signed(message.content, self._key, claims, {CERTIFICATE: self._certificate})
            signed_content = RecordDict({**message.content, RECORD: record})
            self._last = message.content, claims, signed_content
        return with_content(message, signed_content)

    def check(self, reply: Message, name: str, run_id: int, asked: Collection[str]) -> Message:
        """Return `reply` of the site `name` without its signature; an error reply if the signature is wrong.

        The signature names the run and the message that the reply answers, which must be one of the ids `asked`. An
        error reply has no signature.
        """
        if reply.has_error():
            return reply
        metadata = reply.metadata
        claims = {"site": name, "run": run_id, "request": metadata.reply_to_message_id}
        try:
            if metadata.reply_to_message_id not in asked:
                raise ForgedMessage("it refers to another message")
            said = check(reply.content, self._key_of(name), claims)
        except ForgedMessage as problem:
            return with_error(reply, Error(FORGED, str(problem)))
        self._note_software(name, str(said.get("software", "")))
        return with_content(reply, RecordDict({n: r for n, r in reply.content.items() if n != RECORD}))

    def _note_software(self, name: str, software: str) -> None:
        """Write down, for `corymb status` and the pages, what a site runs."""
        if self._noted.get(name) == software:
            return
        with suppress(OSError):  # such as a full disk; the reply counts all the same
            self._software.mkdir(parents=True, exist_ok=True)
            (self._software / name).write_text(software[:100])
            self._noted[name] = software

    def _key_of(self, name: str) -> ec.EllipticCurvePublicKey:
        """Return the key of a site. The roster is read each time: it may change during a run."""
        path = self._roster / f"{name}.crt"
        if not name or path.parent != self._roster or not path.exists():
            raise ForgedMessage(f"the site {name!r} is not enrolled")
        certificate: x509.Certificate = read_certificate(path)
        try:
            check_issued(certificate, self._authority, SITE)
        except ValueError as error:
            raise ForgedMessage(str(error)) from None
        return public_key_of(certificate)


def with_signatures(grid: Grid, signer: Signer) -> None:
    """Make `grid` sign what it pushes, and check what it pulls."""
    push, pull = grid.push_messages, grid.pull_messages
    names: dict[int, str] = {}

    def name_of(node_id: int) -> str:
        if node_id not in names:
            names.update({node.node_id: node.name for node in grid.get_nodes()})
        return names.get(node_id, "")

    def push_signed(messages: Iterable[Message]) -> Iterable[str]:
        return push([signer.sign(message) for message in messages])

    def pull_checked(message_ids: Iterable[str]) -> Iterable[Message]:
        ids, run_id = set(message_ids), grid.run.run_id
        return [signer.check(reply, name_of(reply.metadata.src_node_id), run_id, ids) for reply in pull(ids)]

    for name, method in {"sign": signer.sign, "push_messages": push_signed, "pull_messages": pull_checked}.items():
        setattr(grid, name, method)
