"""The certificates of a federation: its authority signs the server's certificate and those of the sites' keys."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY, TLS, TASKS, SITE = "authority", "server", "tasks", "site"  # the roles, as organisational units
Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
WARN_DAYS = 30  # before a certificate expires
LEEWAY = timedelta(minutes=10)  # for clocks that are behind


def new_key() -> Key:
    """Return a new P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def write_key(path: Path, key: Key) -> None:
    """Write `key`, readable for this user only. Raises `FileExistsError` if the file exists."""
    _write_secret(path, key, PrivateFormat.PKCS8)


def write_site_key(path: Path, key: Key) -> None:
    """Write `key` in the format of OpenSSH, which Flower's SuperNode reads. Raises `FileExistsError` if it exists."""
    _write_secret(path, key, PrivateFormat.OpenSSH)


def read_key(path: Path) -> Key:
    """Return the key in `path`. Raises `ValueError` if it is not one."""
    data = path.read_bytes()
    try:
        load = load_ssh_private_key if b"OPENSSH" in data[:64] else load_pem_private_key
        key = load(data, password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a private key: {error}") from None
    if not isinstance(key, Key) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(f"{path} is not a P-384 key; make one with `corymb join`.")
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate in `path`. Raises `ValueError` if it is not one."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is not a certificate in PEM.") from None


def pem(certificate: x509.Certificate) -> bytes:
    """Return `certificate` as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def name_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """Return the common name in a certificate or in a request for one."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def public_key_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """Return the public key. Raises `ValueError` unless it is a P-384 key."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("The key is not a P-384 key; make one with `corymb join`.")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key, in hexadecimal."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """Return for how many days `certificate` is still valid; negative if it has expired."""
    return (certificate.not_valid_after_utc - (now or datetime.now(UTC))) / timedelta(days=1)


def make_authority(name: str, key: Key, days: int) -> x509.Certificate:
    """Return the certificate of a federation's authority, signed with its own `key`."""
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    builder = _builder(_subject(name, AUTHORITY), key.public_key(), days).issuer_name(_subject(name, AUTHORITY))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.add_extension(usage, critical=True).sign(key, hashes.SHA384())


def issue(
    name: str, role: str, public: ec.EllipticCurvePublicKey, authority: x509.Certificate, key: Key, days: int,
    hosts: Iterable[str] = (),
) -> x509.Certificate:  # fmt: skip
    """Return a certificate for the key `public`, signed by the authority's `key`. `hosts` are names and addresses."""
    builder = _builder(_subject(name, role), public, days).issuer_name(authority.subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    if names := [_host(host) for host in hosts]:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(key, hashes.SHA384())


def make_request(name: str, key: Key) -> bytes:
    """Return a request for a certificate in PEM, signed with `key`, which proves that the site has the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name, SITE))
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)


def read_request(path: Path) -> x509.CertificateSigningRequest:
    """Return the request in `path`. Raises `ValueError` if it is none, or is not signed with its own key."""
    try:
        request = x509.load_pem_x509_csr(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the .csr file of a site.") from None
    except ValueError:
        raise ValueError(f"{path} is not a request for a certificate; `corymb join` at the site writes one.") from None
    if not request.is_signature_valid:
        raise ValueError(f"{path} is not signed with its own key; it was altered.")
    return request


def check_issued(certificate: x509.Certificate, authority: x509.Certificate, role: str) -> None:
    """Check that `authority` has issued `certificate` for `role`, and that it is valid today. Raises `ValueError`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ValueError("the certificate comes from another authority") from None
    roles = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    if [str(each.value) for each in roles] != [role]:
        raise ValueError(f"the certificate is not one for {role!r}")
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        raise ValueError(f"the certificate has expired on {certificate.not_valid_after_utc:%Y-%m-%d}")


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - LEEWAY).not_valid_after(now + timedelta(days=days))


def _subject(name: str, role: str) -> x509.Name:
    unit = x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)
    return x509.Name([unit, x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _write_secret(path: Path, key: Key, form: PrivateFormat) -> None:
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
