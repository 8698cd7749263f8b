"""Signatures of messages: a site signs what leaves it, and the server signs what it asks.

TLS protects a message on its way to the SuperLink. A signature protects it beyond: nobody else can make, alter or
repeat a reply, not even who controls the SuperLink. The key of a site is the one with which its SuperNode logs in.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from corymb.protocol.records import NONCE, of_kind

FORGED = 1001  # the error code of a reply that is not what it says; Flower's codes are small numbers
RECORD = "signature"  # the name of the record with the signature
LIFETIME_SECONDS = 12 * 3600.0  # that of a Flower message
ALGORITHM = ec.ECDSA(hashes.SHA384())


class ForgedMessage(ValueError):
    """A message is not signed, or not as it should be. The text begins in lower case."""


def signed(
    content: RecordDict, key: ec.EllipticCurvePrivateKey, claims: Mapping[str, Any], extra: Mapping[str, bytes] = {}
) -> ConfigRecord:
    """Return the signature of `content` and `claims`, to be added to the content as the record `RECORD`.

    It expires after 12 hours. `extra` goes into the record unsigned.
    """
    complete = {**claims, "digest": digest(content), "expires": int(time.time() + LIFETIME_SECONDS)}
    text = json.dumps(complete, sort_keys=True)
    return ConfigRecord({"claims": text, "signature": key.sign(text.encode(), ALGORITHM), **extra})


def check(content: RecordDict, key: ec.EllipticCurvePublicKey, claims: Mapping[str, Any]) -> dict[str, Any]:
    """Check that `content` is signed with `key`, with these `claims`, and return all that was signed.

    Raises `ForgedMessage`.
    """
    record = record_in(content)
    text, signature = record.get("claims"), record.get("signature")
    if not isinstance(text, str) or not isinstance(signature, bytes):
        raise ForgedMessage("its signature is incomplete")
    try:
        key.verify(signature, text.encode(), ALGORITHM)
    except InvalidSignature:
        raise ForgedMessage("its signature was made with another key") from None
    try:
        said: dict[str, Any] = json.loads(text)
        expires = float(said["expires"])
    except (ValueError, TypeError, KeyError):
        raise ForgedMessage("its signature cannot be read") from None
    for name, value in claims.items():
        if said.get(name) != value:
            raise ForgedMessage(f"it was signed for the {name} {said.get(name)!r}, not {value!r}")
    if expires < time.time():
        raise ForgedMessage("its signature has expired")
    if said.get("digest") != digest(content):
        raise ForgedMessage("it was altered after it was signed")
    return said


def record_in(content: RecordDict) -> ConfigRecord:
    """Return the record with the signature. Raises `ForgedMessage` if there is none."""
    record = dict(content.items()).get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise ForgedMessage("it is not signed")
    return record


def claims_of(request: Message) -> dict[str, Any]:
    """Return what identifies a request: the run, the round, the kind of task and, if there is one, the nonce."""
    nonces = [record[NONCE] for record in of_kind(request.content, ConfigRecord) if NONCE in record]
    metadata = request.metadata
    return {
        "run": metadata.run_id,
        "round": metadata.group_id,
        "task": metadata.message_type,
        "nonce": nonces[0] if nonces else "",
    }


def digest(content: RecordDict) -> str:
    """Return the SHA-256 of all names, types, shapes and values in `content`, without the record of the signature."""
    total = hashlib.sha256()
    for name, record in sorted(content.items()):
        if name == RECORD:
            continue
        _add(total, type(record).__name__, name)
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                _add(total, key, array.dtype, array.stype, json.dumps(list(array.shape)))
                total.update(hashlib.sha256(array.data).digest())
        else:
            _add(total, *(f"{key} {value!r}" for key, value in sorted(record.items())))
    return total.hexdigest()


def _add(total: Any, *texts: str) -> None:
    for text in texts:
        data = text.encode()
        total.update(len(data).to_bytes(8, "little") + data)
    total.update(b"\0" * 8)
