"""What of the Hugging Face hub a cache needs, on loopback: one data set, its files behind a redirect, and commits."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "org/charts"


@contextmanager
def serving_hub(root: Path, *, refuses_commits: bool = False) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub whose data set `org/charts` holds the files of `root`, and the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            tree, files = f"/api/datasets/{NAME}/tree/{COMMIT}", f"/datasets/{NAME}/resolve/{COMMIT}/"
            if path in (f"/api/datasets/{NAME}", *(f"/api/datasets/{NAME}/revision/{one}" for one in ("main", COMMIT))):
                if not root.is_dir():
                    self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
                    return
                self.answer(200, json.dumps({"id": NAME, "sha": COMMIT}).encode())
            elif path.startswith("/api/datasets/") and NAME not in path:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif path.startswith(tree):
                folder = root / path.removeprefix(tree).strip("/")
                found = [one for one in sorted(folder.rglob("*")) if one.is_file()]
                self.answer(200, json.dumps([self.entry(one) for one in found]).encode())
            elif path.startswith(files):
                name = path.removeprefix(files)
                if (root / name).is_file():
                    self.answer(302, b"", {"Location": f"/cdn/{name}"})
                else:
                    self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif path.startswith("/cdn/"):
                self.answer_span((root / path.removeprefix("/cdn/")).read_bytes())
            else:
                self.answer(404, b"")

        def do_POST(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(path)
            if path == "/api/repos/create":
                made = json.loads(body)
                root.mkdir()
                asked.append(
                    f"{made['organization']}/{made['name']} private={made.get('private', made.get('visibility'))}"
                )
                self.answer(200, json.dumps({"url": f"https://huggingface.co/datasets/{NAME}"}).encode())
            elif path.endswith("/preupload/main"):
                named = [one["path"] for one in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in named]
                self.answer(200, json.dumps({"files": modes}).encode())
            elif path == f"/api/datasets/{NAME}/commit/main":
                if refuses_commits:
                    self.answer(403, b"{}", {"X-Error-Message": "this token may not write"})
                    return
                lines = [json.loads(line) for line in body.splitlines()]
                for value in (line["value"] for line in lines if line["key"] == "file"):
                    (root / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                    (root / value["path"]).write_bytes(base64.b64decode(value["content"]))
                asked.append(f"commit: {lines[0]['value']['summary']}")
                told = {"commitUrl": f"https://huggingface.co/datasets/{NAME}/commit/{COMMIT}", "commitOid": COMMIT}
                self.answer(200, json.dumps({"success": True, **told}).encode())
            elif path == "/api/validate-yaml":
                self.answer(200, json.dumps({"errors": [], "warnings": []}).encode())
            else:
                self.answer(404, b"")

        def entry(self, file: Path) -> dict[str, Any]:
            return {"type": "file", "path": file.relative_to(root).as_posix(), "size": file.stat().st_size, "oid": "0"}

        def answer_span(self, data: bytes) -> None:
            if (span := self.headers.get("Range")) is None:
                self.answer(200, data)
            else:
                low, high = map(int, span.removeprefix("bytes=").split("-"))
                self.answer(206, data[low : high + 1], {"Content-Range": f"bytes {low}-{high}/{len(data)}"})

        def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
