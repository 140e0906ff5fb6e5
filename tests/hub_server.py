"""A stand-in for the hub's HTTP API on 127.0.0.1, as far as downloads and pushes need it: `python hub_server.py FOLDER`
serves FOLDER/{models,datasets}/OWNER/NAME/..., prints its port, and then a line for each request.

A push is taken from whoever sends the token TOKEN: large files by git-lfs, the others in the commit, as the hub takes
them from clients without Xet. FOLDER/visibility.json tells how repositories were made. The owner `full` has no room."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_token_of_the_tests_alone"
LARGE = (".safetensors", "tokenizer.json")  # kept by git-lfs


class Hub(BaseHTTPRequestHandler):
    """Every repository has the one commit COMMIT, whatever the revision asked for."""

    root: Path

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        asked, path = self._body(), urlparse(self.path).path
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create" or "/preupload/" in path or "/commit/" in path or path.endswith("/batch"):
            self._pushed(path.strip("/").split("/"), asked)
        else:
            self._answer(asked)

    def do_PUT(self) -> None:
        (self.root / "lfs").mkdir(exist_ok=True)
        (self.root / "lfs" / Path(self.path).name).write_bytes(self._body())
        self._json({})

    def log_message(self, *_: object) -> None:
        print(self.command, self.path, flush=True)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _pushed(self, parts: list[str], asked: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid credentials"}, 401)
        elif parts[-1] == "create":
            self._create(json.loads(asked))
        elif parts[-1] == "batch":
            self._json({"transfer": "basic", "objects": list(map(self._lfs_object, json.loads(asked)["objects"]))})
        elif parts[-2] == "preupload":
            modes = [(file["path"], file["path"].endswith(LARGE)) for file in json.loads(asked)["files"]]
            files = [{"path": p, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False} for p, lfs in modes]
            self._json({"files": files})
        else:
            self._commit(self.root / "models" / parts[2] / parts[3], asked)

    def _create(self, wanted: dict[str, str]) -> None:
        folder = self.root / "models" / wanted["organization"] / wanted["name"]
        if wanted["organization"] == "full":
            self._json({"error": "Private repository storage limit reached"}, 403)
        elif folder.is_dir():
            self._json({"error": "You already created this model repo"}, 409)
        else:
            folder.mkdir(parents=True)
            record = self.root / "visibility.json"
            known = json.loads(record.read_text()) if record.exists() else {}
            visibility = wanted.get("visibility", "public")
            record.write_text(json.dumps({**known, f"{folder.parent.name}/{folder.name}": visibility}))
            self._json({"url": f"http://{self.headers['Host']}/{wanted['organization']}/{wanted['name']}"})

    def _lfs_object(self, wanted: dict[str, object]) -> dict[str, object]:
        if (self.root / "lfs" / str(wanted["oid"])).is_file():
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{wanted['oid']}"}}}

    def _commit(self, folder: Path, asked: bytes) -> None:
        for line in map(json.loads, asked.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                continue
            lfs = line["key"] == "lfsFile"
            content = (self.root / "lfs" / value["oid"]).read_bytes() if lfs else base64.b64decode(value["content"])
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(content)
        address = f"http://{self.headers['Host']}/{folder.parent.name}/{folder.name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})

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
