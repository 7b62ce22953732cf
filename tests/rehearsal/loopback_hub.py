"""A hub of models and data sets on 127.0.0.1: the calls of huggingface_hub and datasets, answered from folders of files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TIME = "2024-03-08T00:00:00.000Z"


class Hub(BaseHTTPRequestHandler):
    """Serves ``root/{models,datasets}/<owner>/<name>``; every revision has the same files."""

    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *args: object) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        match [unquote(part) for part in url.path.strip("/").split("/")]:
            case ["api", "whoami-v2"]:
                self._json({"type": "user", "name": "rehearsal", "auth": {"type": "access_token", "accessToken": {"role": "read"}}})
            case ["api", kind, owner, name, "tree", _, *inside]:
                self._tree(self.root / kind / owner / name, "/".join(inside), "recursive" in url.query.lower())
            case ["api", kind, owner, name, *_]:
                self._about(self.root / kind / owner / name, f"{owner}/{name}")
            case ["datasets", owner, name, "resolve", _, *inside]:
                self._file(self.root / "datasets" / owner / name, "/".join(inside))
            case [owner, name, "resolve", _, *inside]:
                self._file(self.root / "models" / owner / name, "/".join(inside))
            case _:
                self._missing("RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        match [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]:
            case ["api", kind, owner, name, "paths-info", _]:
                asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
                repository = self.root / kind / owner / name
                self._json([_entry(repository, repository / path) for path in asked if path and (repository / path).exists()])
            case _:
                self._missing("RepoNotFound")

    def _about(self, repository: Path, name: str) -> None:
        if not repository.is_dir():
            return self._missing("RepoNotFound")
        files = [{"rfilename": entry["path"], "size": entry["size"]} for entry in _entries(repository, repository, True)]
        said = {"_id": "0" * 24, "id": name, "modelId": name, "sha": COMMIT, "lastModified": TIME, "createdAt": TIME, "siblings": files}
        said |= {"private": False, "gated": False, "disabled": False, "downloads": 1, "likes": 1, "tags": []}
        self._json(said)

    def _tree(self, repository: Path, inside: str, recursive: bool) -> None:
        folder = repository / inside
        if not folder.is_dir():
            return self._missing("EntryNotFound")
        self._json(list(_entries(repository, folder, recursive, folders=True)))

    def _file(self, repository: Path, inside: str) -> None:
        if not repository.is_dir():
            return self._missing("RepoNotFound")
        path = repository / inside
        if not path.is_file():
            return self._missing("EntryNotFound")
        content, tag = path.read_bytes(), f'"{_digest(path)}"'
        asked = self.headers.get("Range")
        if not asked or self.command == "HEAD":
            return self._send(content, ETag=tag, **{"Accept-Ranges": "bytes"})
        first, _, last = asked.removeprefix("bytes=").partition("-")
        piece = content[int(first) : int(last) + 1 if last else None]
        where = f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}"
        self._send(piece, 206, ETag=tag, **{"Content-Range": where})

    def _missing(self, code: str) -> None:
        self._send(json.dumps({"error": code}).encode(), 404, **{"X-Error-Code": code})

    def _json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entries(repository: Path, folder: Path, recursive: bool, *, folders: bool = False) -> Iterator[dict[str, object]]:
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if folders or path.is_file():
            yield _entry(repository, path)


def _entry(repository: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(repository).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    return {"type": "file", "oid": _digest(path), "size": path.stat().st_size, "path": name}


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve a folder while the context is open; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Hub,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
