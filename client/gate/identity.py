"""Who a site is: the key with which it signs what leaves, and the authority of the federation whose tasks it runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cryptography import x509
from flwr.app import Message

from corymb import __version__
from corymb.protocol.certificates import TASKS, Key, check_issued, name_of, public_key_of, read_certificate, read_key
from corymb.protocol.signatures import RECORD, ForgedMessage, check, claims_of, record_in, signed


@dataclass(frozen=True)
class Identity:
    """A site's name and key, and the certificate of its federation's authority."""

    name: str
    key: Key
    authority: x509.Certificate

    @classmethod
    def read(cls, kit: Path) -> Identity | None:
        """Return the identity in a site's kit; None if the folder is not a kit with a certificate."""
        files = [kit / name for name in ("site.crt", "site.key", "ca.crt")]
        if not all(path.exists() for path in files):
            return None
        return cls(name_of(read_certificate(files[0])), read_key(files[1]), read_certificate(files[2]))

    def check_task(self, message: Message) -> None:
        """Check that the federation's server has signed a task. Raises `ForgedMessage` if it has not."""
        pem = record_in(message.content).get("certificate")
        try:
            certificate = x509.load_pem_x509_certificate(pem if isinstance(pem, bytes) else b"")
        except ValueError:
            raise ForgedMessage("its signature has no certificate") from None
        try:
            check_issued(certificate, self.authority, TASKS)
        except ValueError as error:
            raise ForgedMessage(str(error)) from None
        check(message.content, public_key_of(certificate), claims_of(message))

    def sign(self, reply: Message) -> None:
        """Add a signature to `reply`, in place."""
        metadata = reply.metadata
        claims = {"site": self.name, "run": metadata.run_id, "request": metadata.reply_to_message_id}
        claims["software"] = f"Corymb {__version__}, Flower {version('flwr')}"
        reply.content[RECORD] = signed(reply.content, self.key, claims)
