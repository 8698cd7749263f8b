"""The certificates and kits of a federation. A site's key is made at the site; its certificate is signed here.

A federation is a folder: `authority/` with the key that signs, to be kept offline; `server/`, the kit of the server;
and `sites/NAME/`, the kit of each site. No kit holds anything of another one.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from corymb.protocol.certificates import (
    AUTHORITY,
    SITE,
    TASKS,
    TLS,
    PublicKey,
    days_left,
    fingerprint,
    issue,
    make_authority,
    make_request,
    name_of,
    new_key,
    pem,
    public_key_of,
    read_certificate,
    read_key,
    read_request,
    write_key,
    write_site_key,
)
from corymb.server.deployment.federation import KIT, LOCAL, FederationSettings, ServerKit, SiteKit

AUTHORITY_DAYS = 3650
ROSTER = "roster"  # in the server's kit: the certificate of each enrolled site
REVOKED = "revoked"  # in the server's kit: the fingerprints of revoked keys, one per line


@dataclass(frozen=True)
class Federation:
    """The federation with these `settings`, in `folder`."""

    settings: FederationSettings
    folder: Path

    @property
    def server(self) -> Path:
        """The kit of the server."""
        return self.folder / "server"

    def site(self, name: str) -> Path:
        """Return the kit of a site."""
        return self.folder / "sites" / name

    def create(self) -> list[str]:
        """Make the authority and all kits that do not exist yet. Returns the names of the sites whose kits are new."""
        authority = self.folder / "authority"
        if not (authority / "ca.key").exists():
            authority.mkdir(parents=True, mode=0o700, exist_ok=True)
            key = new_key()
            write_key(authority / "ca.key", key)
            certificate = make_authority(f"{self.settings.name} {AUTHORITY}", key, AUTHORITY_DAYS)
            (authority / "ca.crt").write_bytes(pem(certificate))
        if not self.server.exists():
            self._make_server()
        return [name for name in self.settings.sites if self._make_site(name)]

    def sign(self, request_file: Path, replaces: bool = False) -> Path:
        """Sign a site's request and enrol its key. Returns the path of the certificate, which goes to the site.

        Raises `ValueError` if no site has the name in the request, or if it is enrolled with another key. With
        `replaces`, the site must be enrolled, and its key is replaced.
        """
        request = read_request(request_file)
        name, key = name_of(request), public_key_of(request)
        if name not in self.settings.sites:
            known = ", ".join(self.settings.sites)
            raise ValueError(f"The request is for the site {name!r}, which is not one of {known}; add it first.")
        enrolled = self.server / ROSTER / f"{name}.crt"
        if fingerprint(key) in self._revoked():
            raise ValueError(
                f"The key in the request of {name} is revoked; make a new one with `corymb join --new-key`."
            )
        is_other = enrolled.exists() and self._enrolled_key(name) != fingerprint(key)
        if is_other and not replaces:
            raise ValueError(
                f"The site {name} is enrolled with another key; to replace it, use rotate instead of sign."
            )
        others = [other for other in self.enrolled() if other != name and self._enrolled_key(other) == fingerprint(key)]
        if others:
            raise ValueError(f"The key in the request of {name} is that of {others[0]}; each site needs its own.")
        if is_other:
            self._add_revoked(self._enrolled_key(name))
        if replaces and not enrolled.exists():
            raise ValueError(f"The site {name} is not enrolled yet; use sign instead of rotate.")
        path = self.folder / f"{name}.crt"
        path.write_bytes(self._issued(name, SITE, key))
        enrolled.parent.mkdir(exist_ok=True)
        shutil.copy(path, enrolled)
        return path

    def revoke(self, name: str) -> None:
        """Take a site's key off the roster, for good. Raises `ValueError` if the site is not enrolled."""
        enrolled = self.server / ROSTER / f"{name}.crt"
        if not enrolled.exists():
            raise ValueError(
                f"The site {name!r} is not enrolled; enrolled are: {', '.join(self.enrolled()) or 'none'}."
            )
        self._add_revoked(self._enrolled_key(name))
        enrolled.unlink()

    def renew(self) -> list[str]:
        """Renew all certificates, for the keys that there are. Returns what was renewed.

        The server notices its new certificate by itself; a site gets its own file, `NAME.crt`.
        """
        for name, role in (("server", TLS), ("superlink", TLS), ("tasks", TASKS)):
            self._write_certificate(name, role)
        for name in self.enrolled():
            certificate = self.server / ROSTER / f"{name}.crt"
            data = self._issued(name, SITE, public_key_of(read_certificate(certificate)))
            certificate.write_bytes(data)
            (self.folder / f"{name}.crt").write_bytes(data)
        return ["the server", *self.enrolled()]

    def enrolled(self) -> list[str]:
        """Return the names of the enrolled sites."""
        return sorted(path.stem for path in (self.server / ROSTER).glob("*.crt"))

    def days_left(self) -> dict[str, float]:
        """Return for how many days each certificate is still valid."""
        paths = {"authority": self.folder / "authority" / "ca.crt", "server": self.server / "server.crt"}
        paths |= {name: self.server / ROSTER / f"{name}.crt" for name in self.enrolled()}
        return {name: days_left(read_certificate(path)) for name, path in paths.items()}

    def make_keys_here(self, names: list[str]) -> None:
        """Make the keys of sites here and enrol them, for a trial on one machine."""
        for name in names:
            key = new_key()
            write_site_key(self.site(name) / "site.key", key)
            request = self.site(name) / f"{name}.csr"
            request.write_bytes(make_request(name, key))
            shutil.move(self.sign(request), self.site(name) / "site.crt")

    def _make_server(self) -> None:
        settings = self.settings
        (self.server / ROSTER).mkdir(parents=True)
        self.server.chmod(0o700)
        shutil.copy(self.folder / "authority" / "ca.crt", self.server / "ca.crt")
        for name, role in (("server", TLS), ("superlink", TLS), ("tasks", TASKS)):
            write_key(self.server / f"{name}.key", new_key())
            self._write_certificate(name, role)
        kit = ServerKit(
            federation=settings.name, server=settings.server, port=settings.port, superlink_port=settings.port + 1,
            pages_port=settings.port + 2,
            largest_message_mib=settings.largest_message_mib, requests_per_second=settings.requests_per_second,
        )  # fmt: skip
        (self.server / KIT).write_text(tomli_w.dumps(kit.model_dump()))

    def _make_site(self, name: str) -> bool:
        folder = self.site(name)
        if folder.exists():
            return False
        folder.mkdir(parents=True, mode=0o700)
        shutil.copy(self.folder / "authority" / "ca.crt", folder / "ca.crt")
        settings = self.settings
        kit = SiteKit(federation=settings.name, name=name, server=settings.server, port=settings.port)
        (folder / KIT).write_text(tomli_w.dumps(kit.model_dump()))
        return True

    def _write_certificate(self, name: str, role: str) -> None:
        """Write the certificate of one of the server's keys. `superlink` is for connections on the machine itself."""
        settings = self.settings
        hosts = {"server": [settings.server, *settings.other_names], "superlink": LOCAL}.get(name, [])
        public = read_key(self.server / f"{name}.key").public_key()
        draft = self.server / f"{name}.crt.draft"
        draft.write_bytes(self._issued(f"{settings.name} {name}", role, public, hosts, name == "superlink"))
        draft.replace(self.server / f"{name}.crt")

    def _issued(
        self, name: str, role: str, key: PublicKey, hosts: list[str] | None = None, is_long: bool = False
    ) -> bytes:
        authority = self.folder / "authority"
        try:
            signing_key = read_key(authority / "ca.key")
        except FileNotFoundError:
            raise ValueError(
                f"The authority's key {authority / 'ca.key'} is not there; bring it back to sign."
            ) from None
        days = AUTHORITY_DAYS if is_long else self.settings.days
        certificate = read_certificate(authority / "ca.crt")
        return pem(issue(name, role, key, certificate, signing_key, days, hosts or ()))

    def _enrolled_key(self, name: str) -> str:
        return fingerprint(public_key_of(read_certificate(self.server / ROSTER / f"{name}.crt")))

    def _add_revoked(self, key: str) -> None:
        (self.server / REVOKED).write_text("\n".join([*self._revoked(), key]) + "\n")

    def _revoked(self) -> list[str]:
        path = self.server / REVOKED
        return path.read_text().split() if path.exists() else []
