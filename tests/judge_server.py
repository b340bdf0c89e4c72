"""A chat-completions server on this machine's loopback that behaves as a test says."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass
class Reply:
    """What the server does about one request."""

    content: Any = "Score: 8"  # of the message
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # a body to send instead of a chat completion
    finish: str = "stop"
    delay: float = 0.0  # seconds before the first byte
    trickle: float = 0.0  # seconds between the bytes of the body
    close: bool = False  # the connection, without an answer
    hang: bool = False  # until the test is over


@dataclass
class Request:
    """What the server was sent."""

    path: str
    headers: dict[str, str]
    content: bytes
    time: float  # monotonic, seconds

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.content)

    @property
    def text(self) -> str:
        return self.body["messages"][0]["content"][1]["text"]

    @property
    def image(self) -> Tensor:  # [3, H, W] uint8
        url = self.body["messages"][0]["content"][0]["image_url"]["url"]
        kind, _, data = url.partition(",")
        assert kind == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (image.format, image.mode) == ("PNG", "RGB")
        width, height = image.size
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(height, width, 3).permute(2, 0, 1)


class JudgeServer:
    """A context; answers with answer(request, number), number counting the requests from 0."""

    def __init__(self, answer: Callable[[Request, int], Reply]) -> None:
        self.requests: list[Request] = []
        self.most = 0  # requests that were under way together
        self._answer, self._now = answer, 0
        self._lock, self._over = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._handle(self)

            def log_message(self, *arguments: object) -> None:
                """Nothing: a test's output is its own."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers["Content-Length"]))
        request = Request(handler.path, dict(handler.headers), content, time.monotonic())
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            self._reply(handler, self._answer(request, number))
        except ConnectionError:
            handler.close_connection = True  # the judge has given up on it, as some tests want
        finally:
            with self._lock:
                self._now -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.hang:
            self._over.wait()
        if reply.close or reply.hang:
            handler.close_connection = True
            return
        self._over.wait(reply.delay)
        body = reply.raw
        if body is None:
            message = {"role": "assistant", "content": reply.content}
            choice = {"index": 0, "message": message, "finish_reason": reply.finish}
            body = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if not reply.trickle:
            handler.wfile.write(body)
            return
        for byte in body:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            if self._over.wait(reply.trickle):
                return
