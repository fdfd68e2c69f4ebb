"""A stand-in for the Hugging Face hub: what its libraries ask for of the data sets in a folder."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    """Answers about the data sets `root/OWNER/NAME/`, whose files are the repository's."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, *args) -> None:
        self.root = root
        super().__init__(*args)

    def log_message(self, *args) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Send what is asked for, or 404 with the hub's reason."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        match = re.match(r"/(api/)?datasets/([^/]+/[^/]+)(?:/([^/]+)/([^/]+)(?:/(.*))?)?$", path)
        api, name, what, _, inner = match.groups("") if match else [""] * 5
        folder = self.root / name
        if not (match and folder.is_dir()):
            self.send_json({"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif not api and (folder / inner).is_file():
            self.send_file(folder / inner)
        elif not api:
            self.send_json({"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        elif what == "tree":
            self.send_json(list(entries(folder, inner)))
        elif what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                wanted = json.loads(body)["paths"]
            self.send_json([entry for entry in entries(folder, "") if entry["path"] in wanted])
        else:
            siblings = [{"rfilename": e["path"]} for e in entries(folder, "") if e["size"]]
            self.send_json({"id": name, "sha": REVISION, "private": False, "siblings": siblings})

    do_HEAD = do_POST = do_GET

    def send_json(self, value: object, error: dict[str, str] | None = None) -> None:
        """Send a value, or what is not found."""
        status = HTTPStatus.NOT_FOUND if error else HTTPStatus.OK
        headers = {"Content-Type": "application/json", **(error or {})}
        self.send(json.dumps(value).encode(), status, headers)

    def send_file(self, file: Path) -> None:
        """Send a file, or the part of it that is asked for."""
        content, etag = file.read_bytes(), git_hash(file)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(part[1]), int(part[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.send(content[start : end + 1], HTTPStatus.PARTIAL_CONTENT, headers)
        else:
            self.send(content, HTTPStatus.OK, headers)

    def send(self, content: bytes, status: HTTPStatus, headers: dict[str, str]) -> None:
        """Send a whole answer, of HEAD without its content."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entries(folder: Path, under: str) -> Iterator[dict[str, str | int]]:
    """The hub's description of each file and folder below a folder."""
    for path in sorted((folder / under).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            yield {"type": "directory", "path": name, "oid": REVISION, "size": 0}
        else:
            size = path.stat().st_size
            yield {"type": "file", "path": name, "oid": git_hash(path), "size": size}


def git_hash(file: Path) -> str:
    """The name that git gives to the content of a file."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve_hub(root: Path) -> Iterator[str]:
    """Serve the data sets of a folder, and yield the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, root)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
