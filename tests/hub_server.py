"""A Hugging Face hub on this machine: the requests by which its client finds and fetches a file.

    with Hub({"someone/tiny": {"model.pth": content}}) as hub:
        rwkv("pull", "hf:someone/tiny/model.pth", env=environment(HF_ENDPOINT=hub.endpoint))
        assert hub.log == ["HEAD model.pth", "GET model.pth 0-"]

As the real one it answers for a file with its hash and size and leads to a store on another host
(`localhost` here, the hub itself is 127.0.0.1), which knows ranges. `faults` go wrong one request
after the other, by the name of a method of `_Handler`; then all is well.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HTML = b"<!DOCTYPE html><html><body>please log in</body></html>"


class Hub:
    """files: by repository and name. Those of repository "" lie at /NAME, as on any server."""

    def __init__(self, files: Mapping[str, Mapping[str, bytes]]) -> None:
        self.files = files
        self.faults: list[str] = []
        self.log: list[str] = []
        self.claimed_sha256: str | None = None  # what is said of every file instead of the truth
        self.barrier: threading.Event | None = None  # transfers wait for it half way
        self.handler = _Handler

    def __enter__(self) -> Hub:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def store(self) -> str:
        return f"http://localhost:{self._server.server_port}"

    def sha256(self, content: bytes) -> str:
        return self.claimed_sha256 or hashlib.sha256(content).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.server.hub
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        parts = path.split("/")
        if path.startswith("api/models/"):
            hub.log.append("LIST")
            self.list(hub.files.get("/".join(parts[2:4])))
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), "/".join(parts[4:]))
        elif path.startswith("store/"):
            repository = "/".join(parts[1:3])
            self.send(hub.files[repository]["/".join(parts[3:])], parts[-1])
        elif path in hub.files.get("", {}):
            self.send(hub.files[""][path], path)
        else:
            self.refuse("EntryNotFound")

    def list(self, files: Mapping[str, bytes] | None) -> None:
        if files is None:
            self.refuse("RepoNotFound")
            return
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in files.items()
        ]
        self.reply(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def resolve(self, repository: str, name: str) -> None:
        hub = self.server.hub
        if self.command == "HEAD":
            hub.log.append(f"HEAD {name}")
        if repository not in hub.files:
            self.refuse("RepoNotFound")
        elif name not in hub.files[repository]:
            self.refuse("EntryNotFound")
        else:
            content = hub.files[repository][name]
            location = urllib.parse.quote(f"/store/{repository}/{name}") + "?signature=x"
            headers = {
                "Location": f"{hub.store}{location}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hub.sha256(content)}"',
                "ETag": '"of the answer"',
            }
            self.reply(302, b"", headers)

    def send(self, content: bytes, name: str) -> None:
        hub = self.server.hub
        span = self.headers.get("Range")
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        if self.headers.get("If-Range", etag) != etag:
            span = None
        start = int(span.removeprefix("bytes=").removesuffix("-")) if span else 0
        hub.log.append(f"{self.command} {name}" + (f" {start}-" if self.command == "GET" else ""))
        if self.command == "GET" and hub.faults:
            getattr(self, hub.faults.pop(0))(content, start)
        else:
            self.send_from(content, start, etag)

    def send_from(self, content: bytes, start: int, etag: str = '"x"') -> None:
        headers = {"ETag": etag, "Content-Type": "application/octet-stream"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, content[start:], headers)

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        if self.server.hub.barrier and half:
            self.wfile.flush()
            self.server.hub.barrier.wait(20)
        self.wfile.write(body[half:])

    def refuse(self, code: str) -> None:
        self.reply(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    # ---- Faults ----

    def breaks_off(self, content: bytes, start: int) -> None:
        """Half of what is left, then the connection ends."""
        rest = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2])
        self.close_connection = True

    def ends_early(self, content: bytes, start: int) -> None:
        """Half of what is left, as if that were all."""
        self.reply(200, content[start : start + (len(content) - start) // 2], {})

    def says_nothing(self, content: bytes, start: int) -> None:
        self.close_connection = True

    def is_overloaded(self, content: bytes, start: int) -> None:
        self.reply(503, b"", {})

    def sends_html(self, content: bytes, start: int) -> None:
        self.reply(200, HTML, {"Content-Type": "text/html; charset=utf-8"})

    def compresses(self, content: bytes, start: int) -> None:
        self.reply(200, content, {"Content-Encoding": "gzip"})

    def ignores_the_range(self, content: bytes, start: int) -> None:
        self.reply(200, content, {})

    def sends_another_range(self, content: bytes, start: int) -> None:
        self.reply(
            206, content[1:], {"Content-Range": f"bytes 1-{len(content) - 1}/{len(content)}"}
        )

    def sends_too_much(self, content: bytes, start: int) -> None:
        self.reply(200, content + b"more", {})

    def log_message(self, *arguments: object) -> None:
        pass
