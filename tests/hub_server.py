"""A stand-in for the Hugging Face Hub over HTTP: it keeps what it gets, and fails when it is told to.

It knows what the real client asks for: whoami, creating repos, the state of a branch, reading
files, validating cards, and commits with their uploads (also through Git LFS).
"""

import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import yaml
from huggingface_hub import constants

from hf_auxselect.report import card

USER = "ada"


@dataclass
class Repo:
    """The commits of a repo: their ids, each with the files after it."""

    commits: list = field(default_factory=lambda: [("0" * 40, {})])
    private: bool = False

    @property
    def head(self):
        return self.commits[-1][0]

    @property
    def files(self):
        return self.commits[-1][1]

    def commit(self, changes):
        files = {
            path: content for path, content in (self.files | changes).items() if content is not None
        }
        names = b"".join(path.encode() + content for path, content in sorted(files.items()))
        oid = hashlib.sha1(self.head.encode() + names).hexdigest()
        self.commits.append((oid, files))
        return oid


@dataclass
class Fault:
    """How requests whose method and path match are answered, as long as ``times`` lasts."""

    pattern: str
    times: int = 1
    status: int = 500
    headers: dict = field(default_factory=dict)
    body: str = '{"error": "told to fail"}'
    drop: bool = False
    """Close the connection instead of an answer."""
    stall: float = 0.0
    """Seconds to wait before the answer."""
    before: object = None
    """Called first; may change the server's repos."""
    obey: bool = False
    """Do what the request asks before failing."""


class HubServer(ThreadingHTTPServer):
    """Listens on a free port of this machine; use :func:`hub_server`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.forget()

    def forget(self):
        self.repos = {}
        self.requests = []  # (method, path, headers, body)
        self.faults = []
        self.large = {}
        self.lfs = ()  # endings of files that are uploaded through Git LFS

    def repo(self, name, kind="model"):
        return self.repos.setdefault((kind, name), Repo())

    def card(self, name, kind="model"):
        return self.repos[kind, name].files["README.md"].decode()

    def fail(self, pattern, **how):
        self.faults.append(Fault(pattern, **how))

    def asked(self, pattern):
        """How many requests had this method and path."""
        return sum(
            bool(re.search(pattern, f"{method} {path}")) for method, path, _, _ in self.requests
        )

    def handle_error(self, request, client_address):
        """Clients hang up when they are told to time out."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for an answer: the client would wait 40 ms for the second
    server: HubServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.path, _, _ = urllib.parse.unquote(self.path).partition("?")
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        self.server.requests.append((self.command, self.path, dict(self.headers), body))
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{self.command} {self.path}"):
                fault.times -= 1
                if fault.before:
                    fault.before()
                time.sleep(fault.stall)
                if fault.obey:
                    self.answer(body)
                if fault.drop:
                    self.close_connection = True
                    return
                if not fault.stall:
                    self.send(fault.status, fault.body.encode(), fault.headers)
                    return
        self.send(*self.answer(body))

    do_HEAD = do_POST = do_PUT = do_GET

    def send(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self, body):
        path = self.path
        if path == "/api/whoami-v2":
            return 200, {"name": USER, "type": "user", "orgs": [], "auth": {}}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return validated(json.loads(body)["content"])
        if found := re.fullmatch(
            r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/(\w[\w-]*)/(.+))?", path
        ):
            kind, name, what, revision = found.groups()
            repo = self.server.repos.get((kind, name))
            if repo is None:
                return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            if revision not in (None, "main", *(oid for oid, _ in repo.commits)):
                return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
            if what == "preupload":
                return 200, {"files": [self.mode(repo, f) for f in json.loads(body)["files"]]}
            if what == "commit":
                return self.commit(
                    kind, name, repo, [json.loads(line) for line in body.splitlines()]
                )
            siblings = [{"rfilename": file} for file in repo.files]
            return 200, {
                "id": name,
                "sha": repo.head,
                "siblings": siblings,
                "tags": [],
                "private": repo.private,
            }
        if found := re.fullmatch(
            r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path
        ):
            return self.file(found[1] or "model", *found.group(2, 3, 4))
        if found := re.fullmatch(
            r"/(?:datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path
        ):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/large/"):
            self.server.large[path.rpartition("/")[2]] = body
            return 200, {}
        return 404, {"error": f"the stand-in does not know {path}"}

    def create(self, asked):
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.server.url}/{prefix}{name}"
        if (kind, name) in self.server.repos:
            return 409, {"error": "You already created this repo", "url": url}
        repo = self.server.repo(name, kind)
        repo.private = asked.get("private", asked.get("visibility") == "private")
        if kind == "space":
            repo.commit({"README.md": f"---\ntitle: {name}\nsdk: {asked['sdk']}\n---\n".encode()})
        return 200, {"url": url, "id": name}

    def mode(self, repo, file):
        is_large = file["path"].endswith(tuple(self.server.lfs)) if self.server.lfs else False
        answer = {
            "path": file["path"],
            "uploadMode": "lfs" if is_large else "regular",
            "shouldIgnore": False,
        }
        if (content := repo.files.get(file["path"])) is not None and not is_large:
            header = f"blob {len(content)}\0".encode()
            answer["oid"] = hashlib.sha1(header + content).hexdigest()
        elif content is not None:
            answer["oid"] = hashlib.sha256(content).hexdigest()
        return answer

    def commit(self, kind, name, repo, lines):
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", repo.head) != repo.head:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        oid = repo.commit(changes)
        url = f"{self.server.url}/{name}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    def file(self, kind, name, revision, path):
        repo = self.server.repos.get((kind, name))
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        files = dict(repo.commits).get(revision, repo.files)
        if path not in files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        etag = hashlib.sha1(files[path]).hexdigest()
        return 200, files[path], {"X-Repo-Commit": repo.head, "ETag": f'"{etag}"'}


def validated(content):
    """As the Hub checks a card: the block must be a YAML mapping, and a few keys have a type."""
    block = re.match(r"\s*---\n(.*?)\n---[ \t]*(\n|$)", content.replace("\r\n", "\n"), re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": str(error)}], "warnings": []}
    if not isinstance(metadata, dict):
        return 400, {"errors": [{"message": "metadata must be a mapping"}], "warnings": []}
    for key in ("tags", "datasets"):
        if not all(isinstance(item, str) for item in metadata.get(key, [])):
            return 400, {"errors": [{"message": f"{key} must be strings"}], "warnings": []}
    return 200, {"errors": [], "warnings": []}


@contextmanager
def hub_server():
    """A running stand-in."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


TOKEN = "hf_SECRETSECRETSECRET"


def use(monkeypatch, server):
    """Let the client of this process, which is offline in tests, talk to the stand-in."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(card, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    forget_connections()


def forget_connections():
    """Before 1.0, the client settles whether it is offline when it first connects."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()
