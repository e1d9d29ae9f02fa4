"""A certificate authority of one plane's own, and what it signs."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFETIME = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Certificates:
    """PEM files: the authority's certificate, one serving certificate with its key, the service accounts' key."""

    authority: Path
    serving: Path
    serving_key: Path
    service_accounts: Path


def make_certificates(folder: Path, addresses: list[str], names: list[str]) -> Certificates:
    """Write a new authority's files into `folder`; the serving certificate is good for `addresses` and `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, serving_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = _name("plane")
    authority = (
        _builder(authority_name, authority_name, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    alternatives = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    serving = (
        _builder(_name("server"), authority_name, serving_key)
        .add_extension(x509.SubjectAlternativeName([*alternatives, *map(x509.DNSName, names)]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return Certificates(
        authority=_write(folder / "ca.crt", authority.public_bytes(serialization.Encoding.PEM)),
        serving=_write(folder / "serving.crt", serving.public_bytes(serialization.Encoding.PEM)),
        serving_key=_write(folder / "serving.key", _pem(serving_key)),
        service_accounts=_write(folder / "service-accounts.key", _pem(ec.generate_private_key(ec.SECP256R1()))),
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + LIFETIME)
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encryption = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, encryption)


def _write(path: Path, content: bytes) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path
