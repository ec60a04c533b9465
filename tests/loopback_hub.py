"""A Hugging Face Hub on 127.0.0.1, kept in memory, for the genuine huggingface_hub client to talk to over HTTP.

It answers the requests that creating, pushing, reading and loading repositories make: git commits, LFS uploads and downloads
(with a redirect and byte ranges, as from the Hub's store), branches, tags, private repositories. Faults can be ordered:
`cut_downloads` and `cut_uploads` close the connection in the middle of a body. Not imitated: Xet, pull requests, gating.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_tester": "tester", "hf_timm": "timm"}
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".msgpack", ".tar")
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


@dataclass
class Entry:
    """A file of a commit: its bytes, and whether they lie in the LFS store."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repository:
    """Commits by id, each a whole tree, and the branches and tags that name them."""

    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # of a Space

    def commit(self, branch: str, tree: dict[str, Entry], message: str) -> str:
        state = [branch, message, self.refs.get(branch), sorted((path, entry.oid) for path, entry in tree.items())]
        oid = hashlib.sha1(repr((len(self.commits), state)).encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[branch] = tree, message, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class LoopbackHub:
    """The server; a context manager.

    Attributes:
        lfs: whether binary files go to the LFS store; False lets every file be an ordinary git blob.
        cut_downloads: end of a path -> how many of its downloads are cut in the middle.
        cut_uploads: sha256 of the objects whose uploads are cut in the middle.
        requests: (method, path) of everything that was asked.
        authorizations: the header of that name in each of them; None where there was none.
        uploaded: sha256 of every object whose upload was completed, in order.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.authorizations: list[str | None] = []
        self.uploaded: list[str] = []
        self.lfs = True
        self.cut_downloads: dict[str, int] = {}
        self.cut_uploads: set[str] = set()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token: str | None = "hf_tester") -> dict[str, str]:
        """Environment variables that send a client process here, with a cache of its own."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return variables | ({"HF_TOKEN": token} if token else {})

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Path -> bytes of a repository."""
        repository = self.repositories[kind, name]
        return {path: entry.data for path, entry in repository.commits[repository.resolve(revision)].items()}

    # ---------------------------------------------------------------------------------------------------- repositories

    def plant(self, name: str, files: dict[str, bytes], private: bool = False, kind: str = "model") -> str:
        """A repository of these files, put there past the client, which would refuse some of their names; its commit."""
        repository = self.repositories[kind, name] = Repository(kind, name, private)
        tree = {path: Entry(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        return repository.commit("main", tree, "planted")

    def repository(self, kind: str, name: str, user: str | None, write: bool = False) -> Repository:
        repository = self.repositories.get((kind, name))
        if user is None and (write or repository is None or repository.private):
            raise Refusal(401, "RepoNotFound" if not write else "", "Invalid username or password.")
        if repository is None or (repository.private and user != name.split("/")[0]):
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if write and user != name.split("/")[0]:
            raise Refusal(403, "", "you have no write access to this repository")
        return repository

    def tree(self, repository: Repository, revision: str) -> tuple[str, dict[str, Entry]]:
        oid = repository.resolve(unquote(revision))
        if oid is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def create(self, body: dict, user: str | None) -> dict:
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        name = f"{body.get('organization') or user}/{body['name']}"
        if body.get("type") == "space" and body.get("sdk") not in ("gradio", "static", "docker"):
            raise Refusal(400, "", f"a Space needs an sdk, not {body.get('sdk')}")
        key = (body.get("type") or "model", name)
        url = f"{self.endpoint}/{PREFIXES[key[0]]}{name}"
        if name.split("/")[0] != user:
            raise Refusal(403, "", f"you cannot create repositories of {name.split('/')[0]}")
        if key in self.repositories:
            raise Refusal(409, "", "You already created this model repo")
        private = body.get("private") or body.get("visibility") == "private"
        self.repositories[key] = Repository(*key, private=bool(private))
        self.repositories[key].commit("main", {".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)}, "initial")
        return {"url": url, "name": name, "id": name}

    def commit(self, repository: Repository, branch: str, lines: list[dict]) -> dict:
        _, tree = self.tree(repository, branch)
        tree, summary = dict(tree), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.store:
                    raise Refusal(400, "", f"LFS object {value['oid']} of {value['path']} was never uploaded")
                tree[value["path"]] = Entry(self.store[value["oid"]], True)
            elif line["key"] == "deletedFile":
                tree.pop(value["path"])
            else:
                raise Refusal(400, "", f"unknown operation {line['key']}")
        oid = repository.commit(unquote(branch), tree, summary)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repository.name}/commit/{oid}"}


class Handler(BaseHTTPRequestHandler):
    """Requests to answers; the routes are at the end of the class."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")  # else the client may send its next request into the closing connection
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        self.hub.authorizations.append(self.headers.get("Authorization"))
        for methods, pattern, respond in self.routes:
            found = re.fullmatch(pattern, path)
            if self.command in methods and found:
                try:
                    respond(self, **found.groupdict())
                except Refusal as refusal:
                    if self.command not in ("GET", "HEAD"):
                        self.close_connection = True  # the body may be unread
                    text = json.dumps({"error": str(refusal)}).encode()
                    self.answer(refusal.status, text, X_Error_Code=refusal.code, X_Error_Message=str(refusal))
                return
        self.close_connection = True
        self.answer(404, json.dumps({"error": f"no route {self.command} {path}"}).encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    # ---------------------------------------------------------------------------------------------------------- routes

    def who(self) -> None:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        token = {"displayName": "test", "role": "write"}
        self.answer_json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        body = json.loads(self.body())
        try:
            self.answer_json(self.hub.create(body, self.user))
        except Refusal as refusal:
            name = f"{body.get('organization') or self.user}/{body['name']}"
            url = f"{self.hub.endpoint}/{PREFIXES[body.get('type') or 'model']}{name}"
            self.answer(refusal.status, json.dumps({"error": str(refusal), "url": url, "id": name}).encode())

    def branch(self, kind: str, name: str, branch: str) -> None:
        repository = self.hub.repository(kind, name, self.user, write=True)
        start = json.loads(self.body() or b"{}").get("startingPoint") or "main"
        if unquote(branch) in repository.refs:
            raise Refusal(409, "", "Reference already exists")
        repository.refs[unquote(branch)] = self.hub.tree(repository, start)[0]
        self.answer_json({})

    def tag(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.repository(kind, name, self.user, write=True)
        repository.refs[json.loads(self.body())["tag"]] = self.hub.tree(repository, revision)[0]
        self.answer_json({})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.repository(kind, name, self.user, write=True)
        _, tree = self.hub.tree(repository, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if self.hub.lfs and file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": tree[file["path"]].etag if file["path"] in tree else None,
            }
            for file in json.loads(self.body())["files"]
        ]
        self.answer_json({"files": files})

    def lfs_batch(self, prefix: str | None, name: str) -> None:
        kind = {None: "model", "datasets/": "dataset", "spaces/": "space"}[prefix]
        self.hub.repository(kind, name, self.user, write=True)
        objects = []
        for item in json.loads(self.body())["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.store:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/store/{item['oid']}", "header": {}}}
            objects.append(answer)
        self.answer_json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if oid in self.hub.cut_uploads:
            self.rfile.read(1024)
            self.close_connection = True
            return  # no answer: the client sees the connection die
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "", "the uploaded bytes have another hash")
        self.hub.store[oid] = data
        self.hub.uploaded.append(oid)
        self.answer(200)

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.repository(kind, name, self.user, write=True)
        self.answer_json(self.hub.commit(repository, revision, [json.loads(line) for line in self.body().splitlines()]))

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        repository = self.hub.repository(kind, name, self.user)
        oid, tree = self.hub.tree(repository, revision or "main")
        siblings = [{"rfilename": path, "size": len(tree[path].data)} for path in sorted(tree)]
        answer = {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}
        self.answer_json(answer | {"likes": 0, "downloads": 0, "disabled": False, "gated": False})

    def list_tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        oid, tree = self.hub.tree(self.hub.repository(kind, name, self.user), revision)
        start = f"{unquote(folder).strip('/')}/" if folder else ""
        entries = {path: entry for path, entry in sorted(tree.items()) if path.startswith(start)}
        if start and not entries:
            raise Refusal(404, "EntryNotFound", f"{start} does not exist on {oid}")
        rows = []
        for path, entry in entries.items():
            rows.append({"type": "file", "path": path, "oid": entry.oid, "size": len(entry.data)})
            if entry.lfs:
                rows[-1]["lfs"] = {"oid": entry.sha256, "size": len(entry.data), "pointerSize": 134}
        self.answer_json(rows)

    def refs(self, kind: str, name: str) -> None:
        repository = self.hub.repository(kind, name, self.user)
        rows = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid} for ref, oid in repository.refs.items()]
        self.answer_json({"branches": rows, "tags": [], "converts": []})

    def variables(self, name: str) -> None:
        variables = self.hub.repository("space", name, self.user, write=True).variables
        if self.command != "GET":
            body = json.loads(self.body())
            variables.pop(body["key"], None)
            if self.command == "POST":
                variables[body["key"]] = body["value"]
        self.answer_json({key: {"value": value} for key, value in variables.items()})

    def resolve(self, prefix: str | None, name: str, revision: str, path: str) -> None:
        kind = {None: "model", "datasets/": "dataset", "spaces/": "space"}[prefix]
        oid, tree = self.hub.tree(self.hub.repository(kind, name, self.user), revision)
        entry = tree.get(unquote(path))
        if entry is None:
            text = f"{path} does not exist on {oid}"
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message=text, X_Repo_Commit=oid)
        elif entry.lfs:
            sizes = {"X_Linked_Size": str(len(entry.data)), "X_Linked_ETag": f'"{entry.sha256}"'}
            self.hub.store.setdefault(entry.sha256, entry.data)
            # Another host name, as the Hub's store has: a client must neither follow with HEAD nor send its token there.
            place = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/store/{entry.sha256}?name={path}"
            self.answer(302, b"", Location=place, X_Repo_Commit=oid, **sizes)
        else:
            self.send_part(entry.data, path, X_Repo_Commit=oid, ETag=f'"{entry.etag}"')

    def download(self, oid: str) -> None:
        if oid not in self.hub.store:
            raise Refusal(404, "EntryNotFound", f"no object {oid}")
        self.send_part(self.hub.store[oid], unquote(urlsplit(self.path).query.removeprefix("name=")), ETag=f'"{oid}"')

    def send_part(self, data: bytes, path: str, **headers: str) -> None:
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
        start, end = int(start), min(int(end or len(data)) + 1, len(data))
        partial = "Range" in self.headers and (start, end) != (0, len(data))
        if partial:
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        with self.hub.lock:
            ordered = next((name for name, left in self.hub.cut_downloads.items() if left and path.endswith(name)), None)
            if ordered is not None and self.command == "GET":
                self.hub.cut_downloads[ordered] -= 1
        part = data[start:end]
        if ordered is None or self.command != "GET":
            self.answer(206 if partial else 200, part, **headers)
            return
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(part)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(part[: len(part) // 2])
        self.close_connection = True

    KIND = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
    FILES = r"/(?P<prefix>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)"
    routes: list[tuple[str, str, Callable]] = [
        ("GET", r"/api/whoami-v2", who),
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", lambda self: (self.body(), self.answer_json({"errors": [], "warnings": []}))),
        ("POST", KIND + r"/branch/(?P<branch>[^/]+)", branch),
        ("POST", KIND + r"/tag/(?P<revision>[^/]+)", tag),
        ("POST", KIND + r"/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", KIND + r"/commit/(?P<revision>[^/]+)", commit),
        ("POST", FILES + r"\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/store/(?P<oid>[0-9a-f]{64})", upload),
        ("GET HEAD", r"/store/(?P<oid>[0-9a-f]{64})", download),
        ("GET", KIND, info),
        ("GET", KIND + r"/revision/(?P<revision>[^/]+)", info),
        ("GET", KIND + r"/refs", refs),
        ("GET POST DELETE", r"/api/spaces/(?P<name>[^/]+/[^/]+)/variables", variables),
        ("GET", KIND + r"/tree/(?P<revision>[^/]+)(?P<folder>/.+)?", list_tree),
        ("GET HEAD", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ]
