"""Serves containers' logs to the API server, so that `kubectl logs` and Helm's --logs work."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

FindLog = Callable[[str, str, str], Path | None]  # (namespace, pod, container)


def serve_logs(find: FindLog, certificate: Path, key: Path) -> int:
    """Answer `/containerLogs/NAMESPACE/POD/CONTAINER` on a free loopback port, for ever; returns the port.

    `tailLines` counts; `follow` sends what is there and ends.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            parts = url.path.strip("/").split("/")
            log = find(parts[1], parts[2], parts[3]) if parts[0] == "containerLogs" and len(parts) == 4 else None
            lines = log.read_bytes().splitlines(keepends=True) if log else []
            last = parse_qs(url.query).get("tailLines")
            body = b"".join(lines[-int(last[0]) :] if last else lines)
            self.send_response(200 if log else 404)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])
