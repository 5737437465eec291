"""An HTTP server that only pretends to be a model server: the faults that a real one shows rarely.

Each POST takes the next of `script`; the last one stays. Bodies are kept in `asked`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def stream(*pieces: str, end: bytes = b"data: [DONE]\n\n") -> Answer:
    """200 with an event for each piece, and no usage."""
    events = ({"choices": [{"delta": {"content": piece}}]} for piece in pieces)
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return 200, {"Content-Type": "text/event-stream"}, body + end


def refuse(status: int, message: str, **headers: str) -> Answer:
    body = json.dumps({"error": {"message": message}}).encode()
    return status, {k.replace("_", "-"): v for k, v in headers.items()}, body


class FaultyServer:
    def __init__(self, script: list[Answer]) -> None:
        self.script = script
        self.asked: list[dict[str, Any]] = []
        self.url = ""

    def next(self) -> Answer:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


@contextmanager
def faulty(
    *script: Answer, models: bytes = b'{"data": [{"id": "faulty"}]}'
) -> Iterator[FaultyServer]:
    """`models` is the answer to every GET."""
    state = FaultyServer(list(script))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {}, models)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            state.asked.append(json.loads(self.rfile.read(length)))
            self.reply(*state.next())

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()  # HTTP/1.0: the end of the connection is the end of the body
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
