"""A server of model files on loopback that can do everything that goes wrong on the web, once or always."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class File:
    """A file and how the server behaves when it is asked for it."""

    content: bytes
    etag: str = '"one"'
    has_ranges: bool = True
    says_length: bool = True
    # For each of the next answers: bytes after which the connection ends; -1 for all of them.
    breaks_after: list[int] = field(default_factory=list)
    # For each of the next requests: a status to answer instead.
    statuses: list[int] = field(default_factory=list)
    redirect: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    # Added to the beginning of every part that is asked for.
    wrong_start: int = 0
    # Waited for after the first block.
    pause: threading.Event | None = None


@dataclass
class Shop:
    """Files by their path, and every request that came."""

    address: str
    files: dict[str, File] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    # Bytes of content that were sent.
    sent: int = 0

    def put(self, path: str, content: bytes, **behaviour: Any) -> File:
        self.files[path] = File(content, **behaviour)
        return self.files[path]

    def put_hub(self, repository: str, name: str, content: bytes, commit: str = "1" * 40, **behaviour: Any) -> File:
        """A file as the Hugging Face Hub has it, under its branch and its commit."""
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            **behaviour.pop("headers", {}),
        }
        file = self.put(f"/{repository}/resolve/main/{name}", content, headers=headers, **behaviour)
        self.files[f"/{repository}/resolve/{commit}/{name}"] = file
        return file

    def put_repository(self, name: str, files: Mapping[str, bytes], commit: str) -> None:
        """A whole repository at a commit as the Hub lists it: weights with their checksum, other files without."""
        tree: list[dict[str, Any]] = []
        for path, content in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            headers = {"X-Repo-Commit": commit}
            if path.endswith((".safetensors", ".bin", ".gguf")):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
                headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256}"'}
            tree.append(entry)
            self.put(f"/{name}/resolve/{commit}/{path}", content, headers=headers)
        address = f"/api/models/{name}/tree/{commit}?recursive=true&expand=false"
        self.put(address, json.dumps(tree).encode(), headers={"Content-Type": "application/json"})

    def put_branch(self, name: str, files: Mapping[str, bytes], commit: str, branch: str = "main") -> None:
        """A repository at a commit to which a branch points."""
        self.put_repository(name, files, commit)
        for path, file in [item for item in self.files.items() if commit in item[0]]:
            self.files[path.replace(commit, branch)] = file

    def ranges(self) -> list[str]:
        """What was asked for, without the first look."""
        return [headers.get("range", "") for _, headers in self.seen if headers.get("range") != "bytes=0-0"]


class _Handler(http.server.BaseHTTPRequestHandler):
    shop: Shop
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.shop.seen.append((self.path, headers))
        file = self.shop.files.get(self.path)
        if file is None:
            self._say(404)
        elif file.statuses:
            self._say(file.statuses.pop(0), {"Retry-After": "0"})
        elif file.redirect:
            self._say(302, {"Location": file.redirect, **file.headers})
        else:
            self._send(file, headers)

    def _say(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, file: File, headers: dict[str, str]) -> None:
        start, end = 0, len(file.content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        is_same = headers.get("if-range", file.etag) == file.etag
        is_part = bool(asked) and file.has_ranges and is_same
        if asked and is_part:
            start = int(asked[1]) + file.wrong_start
            end = min(end, int(asked[2]) + 1) if asked[2] else end
            if start >= len(file.content):
                self._say(416, {"Content-Range": f"bytes */{len(file.content)}"})
                return
        self.send_response(206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(file.content)}")
        for name, value in {"ETag": file.etag, **file.headers}.items():
            if value:
                self.send_header(name, value)
        if file.says_length:
            self.send_header("Content-Length", str(end - start))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self._write(file, file.content[start:end])

    def _write(self, file: File, body: bytes) -> None:
        limit = file.breaks_after.pop(0) if file.breaks_after and len(body) > 1 else -1
        is_cut = 0 <= limit < len(body)
        body = body[:limit] if is_cut else body
        for start in range(0, len(body), 65536):
            try:
                self.wfile.write(body[start : start + 65536])
            except OSError:
                return
            self.shop.sent += len(body[start : start + 65536])
            if file.pause is not None:
                self.wfile.flush()
                file.pause.wait(30)
        if is_cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that leaves is no news."""


@contextmanager
def weight_server(name: str = "127.0.0.1") -> Iterator[Shop]:
    """A shop that is open while the block runs; `name` is what it is called in its address."""
    shop = Shop("")
    handler = type("Handler", (_Handler,), {"shop": shop})
    with _Server(("127.0.0.1", 0), handler) as server:
        shop.address = f"http://{name}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield shop
        finally:
            server.shutdown()
            thread.join()
