"""A small server of the hub's end points that a model is fetched from and pushed to."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Holds the files of each repository, by `repository/file`; `asked` are those that were fetched."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.asked: set[str] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/(me/\w+)(/tree/.*)?(/revision/.*)?", path):
            names = [n.removeprefix(f"{found[1]}/") for n in self.server.files if n.startswith(f"{found[1]}/")]
            sizes = {name: self._size(f"{found[1]}/{name}") for name in names}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()]
            files = [{"rfilename": name, "size": size, "blobId": "0"} for name, size in sizes.items()]
            info = {"_id": "1", "id": found[1], "sha": SHA, "siblings": files, "private": False}
            self._json(tree if found[2] else info, status=200 if names else 404)
        elif (
            found := re.fullmatch(r"/(me/\w+)/resolve/\w+/(.*)", path)
        ) and f"{found[1]}/{found[2]}" in self.server.files:
            self._file(f"{found[1]}/{found[2]}")
        else:
            self._json({"error": "not found"}, status=404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self._body()
        if path == "/api/repos/create":
            self._json({"url": f"{self.server.endpoint}/me/model", "name": "me/model", "id": "me/model"})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[f"me/model/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.endpoint}/me/model/commit/{SHA}"
            self._json({"commitUrl": url, "commitOid": SHA, "success": True})
        else:
            self._json({}, status=200)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _size(self, name: str) -> int:
        return self.server.sizes.get(name, len(self.server.files[name]))

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        self.send_response(200)
        etag = hashlib.sha1(data).hexdigest()
        for key, value in {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.server.asked.add(name)
            self.wfile.write(data)

    def _json(self, value: object, *, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
