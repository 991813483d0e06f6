"""A proxy in front of an S3 server that spoils some of the calls, the same ones for one seed."""

import http.client
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self
from urllib.parse import urlsplit

Fault = Literal["busy", "refuse", "full", "drop", "cut", "forget", "hang"]
"""busy: 503 with a code of S3's. refuse: 403. full: 507. drop: the connection closes without an
answer. cut: it closes in the middle of the answer. forget: the server does what it is asked, but
its answer is lost. hang: no answer, the connection stays open."""

Rule = Callable[[str, str], Fault | None]
"""Method and path of a call -> what becomes of it."""

_ANSWERS: dict[str, tuple[int, str]] = {
    "busy": (503, "SlowDown"),
    "refuse": (403, "AccessDenied"),
    "full": (507, "XMinioStorageFull"),
}
_OF_EACH_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})


class FaultyProxy:
    """A context manager: in it calls to `url` reach the server at `target`, or meet a fault.

    rule: may be set at any time. met: how many calls have met which fault; calls: all of them.
    sent: the length of each answer of the server's that has been passed on, 0 where it has no body.
    """

    def __init__(self, target: str, rule: Rule | None = None) -> None:
        self.rule = rule
        self.met: Counter[str] = Counter()
        self.calls = 0
        self.sent: list[int] = []
        self.closing = threading.Event()
        self._target = urlsplit(target).netloc
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fault(self, method: str, path: str) -> Fault | None:
        """Count a call and decide on it."""
        with self._lock:
            self.calls += 1
            found = None if self.rule is None else self.rule(method, path)
            if found is not None:
                self.met[found] += 1
            return found

    def forward(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the server's answer."""
        connection = http.client.HTTPConnection(self._target, timeout=60)
        try:
            connection.putrequest(
                handler.command, handler.path, skip_host=True, skip_accept_encoding=True
            )
            # As they are, the host too: the signature covers them.
            for name, value in handler.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


def share(seed: int, **faults: int) -> Rule:
    """Of each hundred calls, so many with each fault, at places that the seed decides."""
    rng = random.Random(seed)
    plan: list[Fault | None] = []

    def rule(method: str, path: str) -> Fault | None:
        if not plan:
            for fault, count in faults.items():
                plan.extend([fault] * count)  # type: ignore[list-item]
            plan.extend([None] * (100 - len(plan)))
            rng.shuffle(plan)
        return plan.pop()

    return rule


def after(count: int, fault: Fault, method: str, part: str, times: int | None = None) -> Rule:
    """That fault for calls of `method` whose path holds `part`, but for the first `count` of them;
    for so many `times`, or for ever."""
    seen = 0

    def rule(called: str, path: str) -> Fault | None:
        nonlocal seen
        if called != method or part not in path:
            return None
        seen += 1
        over = times is not None and seen > count + times
        return fault if seen > count and not over else None

    return rule


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: object) -> None:
        """Clients that give up are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.fault(self.command, self.path)
        if fault in ("hang", "drop"):
            if fault == "hang":
                proxy.closing.wait()
            self._close()
            return
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            told = f"<Error><Code>{code}</Code><Message>says {code}</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], told)
            return
        status, headers, data = proxy.forward(self, body)
        if fault == "forget":
            self._close()
        elif fault == "cut":
            self._answer(status, headers, data, cut=True)
            self._close()
        else:
            # Before it is sent: who has it counts on it.
            proxy.sent.append(len(data))
            self._answer(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in _OF_EACH_HOP:
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)

    def _close(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass
