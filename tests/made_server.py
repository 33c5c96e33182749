"""A web server for one folder, on this machine alone, that can be as bad as servers get."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("drop", "truncate", "shorten", "delay", "500", "503", "flip")


class Server(ThreadingHTTPServer):
    """`share` of the requests go wrong in one of the ways `faults`; `seen` counts what was answered."""

    daemon_threads = True

    def __init__(self, folder: Path, share=0.0, faults=FAULTS, seed=0, delay=1.0, ranges=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.share, self.faults, self.delay, self.ranges = folder, share, faults, delay, ranges
        self.random, self.guard, self.seen, self.asked = random.Random(seed), threading.Lock(), Counter(), []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"

    def fault(self, path: str) -> str:
        with self.guard:
            kind = self.random.choice(self.faults) if self.random.random() < self.share else "fine"
            self.seen[kind] += 1
            self.asked.append(path)
            return kind

    def handle_error(self, request, client_address):
        """Connections that break are what this is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Say nothing."""

    def do_GET(self):
        fault = self.server.fault(self.path)
        path = self.server.folder / self.path.removeprefix("/set/").partition("?")[0]
        if fault == "drop":
            self.close_connection = True
            return
        if fault.isdecimal():
            self.answer(int(fault), b"out of order")
            return
        if not path.is_file():
            self.answer(404, b"")
            return
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not self.server.ranges or not wanted:
            self.answer(200, content)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        part = bytearray(content[first : last + 1])
        if fault == "delay":
            time.sleep(self.server.delay)
        if fault == "flip":
            part[len(part) // 2] ^= 0x10
        if fault == "shorten":
            part = part[: len(part) // 2]
        self.answer(206, bytes(part), f"bytes {first}-{last}/{len(content)}", fault == "truncate")

    def answer(self, status, content, about=None, is_cut=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if about:
            self.send_header("Content-Range", about)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if is_cut else content)
        self.close_connection = self.close_connection or is_cut


@contextmanager
def serving(folder: Path, **words):
    server = Server(folder, **words)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
