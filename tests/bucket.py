"""A real S3 server on this machine (moto's, a process of its own), and what stands between it and a client: a proxy
that drops connections, is slow, answers 503, loses answers, and changes bytes."""

import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SECRET, KEY_ID = "the-very-secret-key", "AKIAIOSFODNN7EXAMPLE"
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
Fault = Callable[[str, str, int], str]
"""Of the n-th request, by method and path: `drop`, `silent`, `busy`, `lost`, `flip`, `short`, or nothing."""


@contextmanager
def server(log: Path) -> Iterator[str]:
    """The server's URL, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "wb") as out:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def make_bucket(url: str, name: str) -> None:
    signed = f"AWS4-HMAC-SHA256 Credential={KEY_ID}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    request = urllib.request.Request(f"{url}/{name}", method="PUT", headers={"Authorization": signed})
    urllib.request.urlopen(request, timeout=60).close()


class Proxy:
    """Stands before a server at `url`; `fault` says what becomes of each request, and `requests` lists them."""

    def __init__(self, target: str) -> None:
        self.fault: Fault = lambda method, path, n: ""
        self.silence = 2.0
        self.requests: list[tuple[str, str]] = []
        self.sent = 0
        """Bytes of answers to GET."""
        self.target = target
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                proxy._answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, *args: object) -> None:
                pass

            def handle(self) -> None:
                with suppress(OSError):  # clients give up, as they should
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, asked: BaseHTTPRequestHandler) -> None:
        body = asked.rfile.read(int(asked.headers.get("Content-Length") or 0))
        with self._lock:
            self.requests.append((asked.command, asked.path))
            fault = self.fault(asked.command, asked.path, len(self.requests) - 1)
        if fault == "silent":
            time.sleep(self.silence)
        if fault == "busy":
            return self._send(asked, 503, [("Content-Type", "application/xml")], SLOW_DOWN)
        if fault == "silent":
            asked.close_connection = True
            return
        connection = http.client.HTTPConnection(self.target.removeprefix("http://"), timeout=60)
        connection.request(asked.command, asked.path, body, dict(asked.headers.items()))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lost":
            asked.close_connection = True
            return
        hop = ("transfer-encoding", "connection", "server", "date")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in hop]
        if fault == "flip" and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if fault == "short" and content:
            content = content[: len(content) // 2]
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(content))))
        self.sent += len(content) if asked.command == "GET" else 0
        self._send(asked, answer.status, headers, content, fault == "drop")

    def _send(
        self, asked: BaseHTTPRequestHandler, status: int, headers: list, content: bytes, drop: bool = False
    ) -> None:
        asked.send_response(status)
        for name, value in headers:
            asked.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            asked.send_header("Content-Length", str(len(content)))
        asked.end_headers()
        if asked.command != "HEAD":
            asked.wfile.write(content[: len(content) // 2] if drop else content)
        asked.wfile.flush()
        if drop:
            asked.close_connection = True
            asked.connection.shutdown(socket.SHUT_RDWR)
