"""An API server's place over TLS: what a test answers to requests that bring a service account's token."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

Reply = tuple[int, dict[str, Any] | None]  # None: no JSON, as of a kind that the API server does not know
Handle = Callable[[str, str, dict[str, Any]], Reply]  # of method, path and what was sent


def refusal(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """As the API server says no."""
    return status, {"kind": "Status", "metadata": {}, "status": "Failure", "message": message, "code": status}


@contextlib.contextmanager
def kubernetes_api(account: Path, handle: Handle) -> Iterator[Mapping[str, str]]:
    """Answer with `handle`, one request at a time, during the block; yields the environment of a pod.

    `account` becomes the folder of its service account; without its token the answer is 401.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
            with lock:
                status, content = handle(self.command, self.path, sent)
            if self.headers["Authorization"] != "Bearer a-token":
                status, content = refusal(401, "Unauthorized")
            body = b"404 page not found\n" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Nothing: what is said on stderr is the program's."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Of a client that leaves at its deadline."""

    account.mkdir()
    public, private = certificate(account, "ca")
    (account / "token").write_text("a-token\n")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(public, private)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.server_port)}
        finally:
            server.shutdown()


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    today = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths
