"""Provisioning: certificates, kits that hold nothing of others, and the life of a key."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from corymb.protocol.certificates import days_left, fingerprint, public_key_of, read_certificate
from corymb.server.deployment.federation import FederationSettings, ServerKit, SiteKit, read, read_kit
from corymb.server.deployment.join import adopt_certificate, write_request
from corymb.server.deployment.provision import Federation
from corymb.server.deployment.site_list import with_site
from corymb.server.deployment.units import write_units

FILE = """\
# A comment that stays.
name = "hearts"
server = "fl.example"
sites = [
    "north",
    "south",  # by the sea
]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hearts.toml"
    path.write_text(FILE)
    return path


def made(file: Path) -> Federation:
    federation = Federation(read(file, FederationSettings), file.with_suffix(""))
    federation.create()
    return federation


def site_kit(federation: Federation, name: str = "north") -> SiteKit:
    kit = read_kit(federation.site(name))
    assert isinstance(kit, SiteKit)
    return kit


def enrol(federation: Federation, name: str = "north", replaces: bool = False) -> str:
    """Go through the request of a site, and return what changes at it."""
    folder, kit = federation.site(name), site_kit(federation, name)
    certificate = federation.sign(write_request(folder, kit, is_new_key=replaces), replaces)
    shutil.copy(certificate, folder / f"{name}.crt")
    return adopt_certificate(folder, kit)


def test_no_kit_holds_anything_of_others(file: Path) -> None:
    federation = made(file)
    assert sorted(path.name for path in federation.site("north").iterdir()) == ["ca.crt", "kit.toml"]
    enrol(federation)
    secrets = {path: path.read_bytes() for path in federation.folder.rglob("*.key")}
    assert {path.parent.name for path in secrets} == {"authority", "server", "north"}
    assert len(set(secrets.values())) == len(secrets)
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)
    assert not any("north" in path.read_text() for path in federation.site("south").iterdir())


def test_openssl_accepts_the_certificates(file: Path) -> None:
    federation = made(file)
    enrol(federation)
    authority = str(federation.folder / "authority" / "ca.crt")
    for path in (federation.server / "server.crt", federation.site("north") / "site.crt"):
        subprocess.run(["openssl", "verify", "-CAfile", authority, str(path)], check=True, capture_output=True)
    text = subprocess.run(
        ["openssl", "x509", "-in", str(federation.server / "server.crt"), "-noout", "-ext", "subjectAltName"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "DNS:fl.example" in text
    ssl.create_default_context(cafile=authority)


def test_making_again_changes_nothing_and_a_new_site_gets_a_kit(file: Path) -> None:
    federation = made(file)
    before = {path: path.read_bytes() for path in federation.folder.rglob("*") if path.is_file()}
    assert federation.create() == []
    assert {path: path.read_bytes() for path in federation.folder.rglob("*") if path.is_file()} == before
    with_site(file, "west")
    assert read(file, FederationSettings).sites == ["west", "north", "south"]
    assert "# A comment that stays." in file.read_text()
    assert Federation(read(file, FederationSettings), federation.folder).create() == ["west"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("north", "is there already"), ("../x", "string should match pattern"), ("North", "string should match")],
)
def test_a_name_in_use_or_an_invalid_name_is_refused(name: str, problem: str, file: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        with_site(file, name)
    assert file.read_text() == FILE


def test_a_key_lives_from_its_request_to_its_revocation(file: Path) -> None:
    federation = made(file)
    assert enrol(federation) == "a new certificate"
    first = fingerprint(public_key_of(read_certificate(federation.site("north") / "site.crt")))

    request = write_request(federation.site("north"), site_kit(federation), is_new_key=True)
    with pytest.raises(ValueError, match="The site north is enrolled with another key; to replace it, use rotate"):
        federation.sign(request)
    assert enrol(federation, replaces=True) == "a new key"
    second = fingerprint(public_key_of(read_certificate(federation.site("north") / "site.crt")))
    assert first != second

    federation.renew()
    shutil.copy(federation.folder / "north.crt", federation.site("north") / "north.crt")
    assert adopt_certificate(federation.site("north"), site_kit(federation)) == "a new certificate"
    assert fingerprint(public_key_of(read_certificate(federation.site("north") / "site.crt"))) == second

    federation.revoke("north")
    assert federation.enrolled() == []
    with pytest.raises(ValueError, match="The key in the request of north is revoked"):
        federation.sign(write_request(federation.site("north"), site_kit(federation)))
    with pytest.raises(ValueError, match="The site 'north' is not enrolled"):
        federation.revoke("north")


def test_wrong_requests_and_certificates_are_refused(file: Path, tmp_path: Path) -> None:
    federation = made(file)
    stranger = SiteKit(federation="hearts", name="west", server="x", port=1)
    with pytest.raises(ValueError, match="The request is for the site 'west', which is not one of north, south"):
        federation.sign(write_request(federation.site("north"), stranger))
    path = tmp_path / "x.csr"
    path.write_text("no request")
    with pytest.raises(ValueError, match="is not a request for a certificate"):
        federation.sign(path)
    with pytest.raises(ValueError, match="The site south is not enrolled yet; use sign"):
        federation.sign(write_request(federation.site("south"), site_kit(federation, "south")), replaces=True)

    other = Federation(federation.settings, tmp_path / "other")
    other.create()
    kit = site_kit(federation)
    shutil.copy(other.sign(write_request(federation.site("north"), kit)), federation.site("north") / "north.crt")
    with pytest.raises(ValueError, match="is not used: the certificate comes from another authority"):
        adopt_certificate(federation.site("north"), kit)


def test_the_authority_is_needed_to_sign_and_its_absence_is_said(file: Path) -> None:
    federation = made(file)
    shutil.move(federation.folder / "authority" / "ca.key", file.parent / "offline.key")
    with pytest.raises(ValueError, match=r"The authority's key .* is"):
        enrol(federation)


def test_certificates_say_how_long_they_are_valid(file: Path) -> None:
    file.write_text(FILE + "days = 20\n")
    federation = made(file)
    enrol(federation)
    left = federation.days_left()
    assert left["authority"] > 3000
    assert left["server"] == pytest.approx(20, abs=0.1)
    assert left["north"] == pytest.approx(days_left(read_certificate(federation.site("north") / "site.crt")))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "name is required; server is required; sites is required"),
        (FILE.replace("north", "south"), "the name 'south' is there twice"),
        (FILE + "ports = 1\n", "ports is not a known key"),
        ("name = \n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_explained(text: str, problem: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=problem):
        read(file, FederationSettings)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_units(file: Path) -> None:
    federation = made(file)
    server = read_kit(federation.server)
    assert isinstance(server, ServerKit)
    for unit in (write_units(federation.server, server), write_units(federation.site("north"), site_kit(federation))):
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
        said = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
        assert (done.returncode, said) == (0, []), done.stderr
