"""Signatures: what is signed cannot be altered, repeated, or signed by somebody else."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from corymb import __version__
from corymb.client.gate.identity import Identity
from corymb.protocol.certificates import SITE, issue, new_key, pem, read_certificate, read_key, write_site_key
from corymb.protocol.codec import to_arrays
from corymb.protocol.flower import set_message_id, set_reply_to, set_task_identity, unchecked_reply
from corymb.protocol.signatures import ALGORITHM, FORGED, RECORD, ForgedMessage, digest
from corymb.protocol.signed_grid import Signer
from corymb.server.deployment.federation import FederationSettings
from corymb.server.deployment.provision import Federation
from corymb.server.deployment.status import software_of_sites


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    settings = FederationSettings(name="hearts", server="localhost", sites=["north", "south"])
    federation = Federation(settings, tmp_path / "hearts")
    federation.make_keys_here(federation.create())
    return federation


def identity(federation: Federation, name: str = "north") -> Identity:
    found = Identity.read(federation.site(name))
    assert found is not None
    return found


def request(run: int = 7) -> Message:
    set_task_identity(run_id=run, node_id=1)
    config = ConfigRecord({"nonce": "a1", "server-round": 3})
    message = Message(
        RecordDict({"arrays": to_arrays({"w": torch.ones(3)}), "config": config}), 5, "train", group_id="3"
    )
    set_message_id(message, "m-1")
    return message


def reply(to: Message) -> Message:
    content = RecordDict({"arrays": to_arrays({"w": torch.zeros(3)}), "metrics": MetricRecord({"num-examples": 10})})
    return unchecked_reply(to, content)


def test_a_signed_exchange_is_accepted(federation: Federation) -> None:
    signer, site = Signer(federation.server), identity(federation)
    asked = signer.sign(request())
    site.check_task(asked)
    answer = reply(asked)
    site.sign(answer)
    accepted = signer.check(answer, "north", 7, {"m-1"})
    assert not accepted.has_error()
    assert set(accepted.content) == {"arrays", "metrics"}
    assert software_of_sites(federation.server) == {"north": f"Corymb {__version__}, Flower {version('flwr')}"}


def with_other_numbers(answer: Message) -> None:
    answer.content["arrays"] = to_arrays({"w": torch.ones(3)})


def with_more_examples(answer: Message) -> None:
    answer.content["metrics"] = MetricRecord({"num-examples": 1000})


def to_another_request(answer: Message) -> None:
    set_reply_to(answer, "m-2")


def with_a_new_record(answer: Message) -> None:
    answer.content["more"] = MetricRecord({"a": 1})


def unsigned(answer: Message) -> None:
    del answer.content[RECORD]


def broken(answer: Message) -> None:
    answer.content[RECORD] = ConfigRecord({"claims": "{}"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (with_other_numbers, "it was altered after it was signed"),
        (with_more_examples, "it was altered after it was signed"),
        (with_a_new_record, "it was altered after it was signed"),
        (to_another_request, "it was signed for the request 'm-1', not 'm-2'"),
        (unsigned, "it is not signed"),
        (broken, "its signature is incomplete"),
    ],
)
def test_a_reply_that_was_altered_or_repeated_is_refused(
    change: Callable[[Message], None], problem: str, federation: Federation
) -> None:
    answer = reply(request())
    identity(federation).sign(answer)
    change(answer)
    refused = Signer(federation.server).check(answer, "north", 7, {"m-1", "m-2"})
    assert (refused.error.code, refused.error.reason) == (FORGED, problem)


def test_a_reply_is_refused_under_another_name_after_revocation_and_after_its_time(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer, answer = Signer(federation.server), reply(request())
    identity(federation).sign(answer)
    assert signer.check(answer, "south", 7, {"m-1"}).error.reason == "its signature was made with another key"
    assert signer.check(answer, "../north", 7, {"m-1"}).error.reason == "the site '../north' is not enrolled"
    later = time.time() + 13 * 3600
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        assert signer.check(answer, "north", 7, {"m-1"}).error.reason == "its signature has expired"
    federation.revoke("north")
    assert signer.check(answer, "north", 7, {"m-1"}).error.reason == "the site 'north' is not enrolled"


def test_a_task_of_somebody_else_is_refused(federation: Federation, tmp_path: Path) -> None:
    site = identity(federation)
    with pytest.raises(ForgedMessage, match="it is not signed"):
        site.check_task(request())
    other = Federation(federation.settings, tmp_path / "other")
    other.create()
    with pytest.raises(ForgedMessage, match="the certificate comes from another authority"):
        site.check_task(Signer(other.server).sign(request()))
    key = federation.site("south") / "site.key"  # a site signs a task
    (federation.server / "tasks.key").write_bytes(key.read_bytes())
    (federation.server / "tasks.crt").write_bytes((federation.server / "roster" / "south.crt").read_bytes())
    with pytest.raises(ForgedMessage, match="the certificate is not one for 'tasks'"):
        site.check_task(Signer(federation.server).sign(request()))


def test_an_expired_certificate_is_refused(federation: Federation) -> None:
    authority = federation.folder / "authority"
    key = read_key(authority / "ca.key")
    old = issue("north", SITE, new_key().public_key(), read_certificate(authority / "ca.crt"), key, days=0)
    (federation.server / "roster" / "north.crt").write_bytes(pem(old))
    answer = reply(request())
    identity(federation).sign(answer)
    assert "has expired" in str(Signer(federation.server).check(answer, "north", 7, {"m-1", "m-2"}).error.reason)


def test_a_digest_depends_on_names_types_shapes_and_values() -> None:
    def content(name: str = "w", key: str = "a", value: float = 1.0, shape: tuple[int, ...] = (4,)) -> RecordDict:
        arrays = to_arrays({name: torch.arange(4.0).reshape(shape)})
        return RecordDict({"arrays": arrays, "metrics": MetricRecord({key: value})})

    others = [content(name="v"), content(key="b"), content(value=2.0), content(value=1), content(shape=(2, 2))]
    digests = [digest(each) for each in [content(), *others]]
    assert digest(content()) == digests[0]
    assert len(set(digests)) == len(digests)


def test_a_key_of_a_site_has_the_format_that_flower_reads(tmp_path: Path) -> None:
    key = new_key()
    write_site_key(tmp_path / "key", key)
    assert (tmp_path / "key").read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert read_key(tmp_path / "key").private_numbers() == key.private_numbers()
    with pytest.raises(FileExistsError):
        write_site_key(tmp_path / "key", key)


@pytest.mark.parametrize("claims", ["[]", "no json", '{"expires": "x"}', "{}", "null"])
def test_hostile_claims_are_refused(claims: str, federation: Federation) -> None:
    answer, site = reply(request()), identity(federation)
    answer.content[RECORD] = ConfigRecord({"claims": claims, "signature": site.key.sign(claims.encode(), ALGORITHM)})
    refused = Signer(federation.server).check(answer, "north", 7, {"m-1"})
    assert (refused.error.code, refused.error.reason) == (FORGED, "its signature cannot be read")


def test_a_reply_to_another_request_or_run_is_refused(federation: Federation) -> None:
    answer = reply(request())
    identity(federation).sign(answer)
    signer = Signer(federation.server)
    assert signer.check(answer, "north", 7, {"m-2"}).error.reason == "it refers to another message"
    assert signer.check(answer, "north", 8, {"m-1"}).error.reason == "it was signed for the run 7, not 8"
