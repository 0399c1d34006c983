"""A Hub of one process: the HTTP endpoints that pushing a model and loading it again need, files kept in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`files` by name as the last commit left them, `objects` by SHA-256, `calls` in order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.files, self.objects, self.calls, self.created = {}, {}, [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Endpoints(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, entries: object = None, status: int = 200, raw: bytes | None = None, **headers) -> None:
        data = json.dumps(entries).encode() if raw is None else raw
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.body()
        self.server.calls.append(path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            hidden = asked.get("private") or asked.get("visibility") == "private"  # older clients, newer ones
            self.server.created.append((name, hidden))
            self.answer({"url": f"{self.server.url}/{name}", "name": name})
        elif "/preupload/" in path:
            named = [one["path"] for one in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in named}
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.url}/objects/{one['oid']}"}}} for one in asked
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in body.splitlines():
                self.keep(json.loads(line))
            name = "/".join(path.split("/")[3:5])
            self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({}, 200 if path == "/api/validate-yaml" else 404)

    def keep(self, line: dict) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.server.files[value["path"]] = self.server.objects[value["oid"]]

    def do_PUT(self):
        data = self.body()
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.calls.append(path)
        if "/resolve/" in path:
            data = self.server.files.get(path.split("/resolve/")[1].partition("/")[2])
            if data is None:
                self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                self.answer(raw=data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif "/tree/" in path:
            self.answer([{"type": "file", "path": n, "size": len(d), "oid": ""} for n, d in self.server.files.items()])
        elif path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.server.files]})
        else:
            self.answer({}, 404)

    do_HEAD = do_GET


@contextmanager
def running_hub():
    """A server in a thread, shut down at the end."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
