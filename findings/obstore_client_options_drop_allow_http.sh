#!/usr/bin/env bash
# AWS_ALLOW_HTTP=true in the environment lets obstore reach a store that speaks plain HTTP, as the test servers of S3 do.
# A time-out given beside it, `client_options={"timeout": ...}`, says nothing of HTTP, so most would expect the two to
# hold together. In obstore 0.12.1 any client option replaces what the environment has said: the same read then ends in
# "builder error", which names neither. With `allow_http` among the options it works again. Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check obstore==0.12.1 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version


class OneObject(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        for name, value in (("Content-Length", "3"), ("ETag", '"1"'), ("Last-Modified", "Sat, 28 Nov 2026 10:00:00 GMT")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"yes")

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), OneObject)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(AWS_ALLOW_HTTP="true", AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1")

import obstore
from obstore.store import S3Store


def read(**options):
    store = S3Store("bucket", endpoint=f"http://127.0.0.1:{server.server_port}", retry_config={"max_retries": 0}, **options)
    try:
        return bytes(obstore.get(store, "name").bytes()).decode()
    except Exception as error:
        return "builder error" if "builder error" in str(error) else f"{type(error).__name__}: {error}"


timeout = {"timeout": "5s"}
found = [read(), read(client_options=timeout), read(client_options={**timeout, "allow_http": True})]
print(f"obstore {version('obstore')}, AWS_ALLOW_HTTP=true in the environment:")
for name, value in zip(("no client options", "a time-out", "a time-out and allow_http"), found):
    print(f"  {name:26} {value}")
raise SystemExit(0 if found == ["yes", "builder error", "yes"] else 1)
PY
