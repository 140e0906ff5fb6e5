"""A stand-in for the hub's HTTP API on 127.0.0.1, as far as downloads need it: `python hub_server.py FOLDER` serves
FOLDER/{models,datasets}/OWNER/NAME/..., prints its port, and then a line for each request."""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Every repository has the one commit COMMIT, whatever the revision asked for."""

    root: Path

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(asked)

    def log_message(self, *_: object) -> None:
        print(self.command, self.path, flush=True)

    def _answer(self, asked: bytes = b"") -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if parts[:1] == ["api"]:
            self._api(parts[1:], asked)
        elif "resolve" in parts:
            kind, owner, name, _, _, *path = parts if parts[0] == "datasets" else ["models", *parts]
            self._file(self.root / kind / owner / name / "/".join(path))
        else:
            self._json({}, 200 if parts == [""] else 404)

    def _api(self, parts: list[str], asked: bytes) -> None:
        kind, owner, name, *rest = [*parts, "", "", ""][: max(3, len(parts))]
        folder = self.root / kind / owner / name
        if not folder.is_dir():
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        rows = [_row(path, folder) for path in files]
        if rest[:1] == ["tree"]:
            self._json(rows if "recursive=true" in self.path else _listed(folder, "/".join(rest[2:])))
        elif rest[:1] == ["paths-info"]:
            wanted = asked.decode()
            self._json([row for row in rows if str(row["path"]) in wanted])
        elif rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": row["path"]} for row in rows]
            self._json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self._json({"error": "not served"}, 404)

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self._send(content, "application/octet-stream")

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self._send(json.dumps(content).encode(), "application/json")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _listed(folder: Path, inner: str) -> list[dict[str, object]]:
    """What lies in one folder of a repository."""
    return [
        {"type": "directory", "path": str(path.relative_to(folder)), "size": 0, "oid": "0" * 40}
        if path.is_dir()
        else _row(path, folder)
        for path in sorted((folder / inner).iterdir())
    ]


def _row(path: Path, folder: Path) -> dict[str, object]:
    content = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": str(path.relative_to(folder)), "size": len(content), "oid": oid}


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_address[1], flush=True)
    server.serve_forever()
