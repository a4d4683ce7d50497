"""A Hub in memory for model repositories: what huggingface_hub asks for to create, commit, list and download.

Start it with `serve()`; clients find it by `HF_ENDPOINT`, which they read when they are imported.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_loopback"
WEIGHTS = (".safetensors", ".bin", ".pt", ".png")  # go the LFS way whatever their size


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()


class MiniHub:
    """State and routes of one Hub."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.app = Starlette(
            routes=[
                Route("/api/whoami-v2", self.whoami),
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate, methods=["POST"]),
                Route("/api/models/{owner}/{name}", self.info),
                Route("/api/models/{owner}/{name}/{op}/{revision}", self.operate, methods=["GET", "POST"]),
                Route("/{owner}/{name}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
                Route("/lfs/{oid}", self.lfs_put, methods=["PUT"]),
                Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve, methods=["GET", "HEAD"]),
            ]
        )

    async def body(self, request: Request) -> bytes:
        if request.headers.get("authorization") != f"Bearer {TOKEN}" and not request.url.path.startswith("/lfs/"):
            raise HTTPException(401, "invalid token")
        body = await request.body()
        self.requests.append(f"{request.method} {request.url.path}")
        self.bodies.append(body)
        return body

    async def whoami(self, request: Request) -> Response:
        return JSONResponse({"type": "user", "name": "tester", "fullname": "Tester", "orgs": [], "auth": {}})

    async def validate(self, request: Request) -> Response:
        await self.body(request)
        return JSONResponse({"errors": [], "warnings": []})

    async def create(self, request: Request) -> Response:
        body = json.loads(await self.body(request))
        name = f"{body.get('organization') or 'tester'}/{body['name']}"
        private = body.get("private") or body.get("visibility") == "private"
        created = name not in self.repos
        self.repos.setdefault(name, Repo(bool(private)))
        return JSONResponse({"url": f"{request.base_url}{name}", "name": name}, 200 if created else 409)

    def repo(self, request: Request) -> Repo | None:
        return self.repos.get(f"{request.path_params['owner']}/{request.path_params['name']}")

    async def info(self, request: Request) -> Response:
        repo = self.repo(request)
        if repo is None:
            return missing("RepoNotFound")
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        name = "/".join(request.path_params[part] for part in ("owner", "name"))
        return JSONResponse(
            {"_id": "0", "id": name, "modelId": name, "sha": repo.sha, "private": repo.private, "siblings": siblings}
        )

    async def operate(self, request: Request) -> Response:
        repo, body = self.repo(request), await self.body(request)
        if repo is None:
            return missing("RepoNotFound")
        match request.path_params["op"]:
            case "revision":
                return await self.info(request)
            case "tree":
                return JSONResponse([entry(path, data) for path, data in sorted(repo.files.items())])
            case "paths-info":
                return JSONResponse([entry(p, repo.files[p]) for p in json.loads(body)["paths"] if p in repo.files])
            case "preupload":
                files = json.loads(body)["files"]
                modes = {f["path"]: "lfs" if f["path"].endswith(WEIGHTS) else "regular" for f in files}
                return JSONResponse(
                    {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
                )
            case "commit":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        repo.commits.append(value["summary"])
                    elif line["key"] == "file":
                        repo.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        repo.files[value["path"]] = self.blobs[value["oid"]]
                return JSONResponse(
                    {"success": True, "commitOid": repo.sha, "commitUrl": f"{request.base_url}{request.url.path[12:]}"}
                )
        return missing("EntryNotFound")

    async def lfs_batch(self, request: Request) -> Response:
        objects = json.loads(await self.body(request))["objects"]
        upload = {o["oid"]: {"upload": {"href": f"{request.base_url}lfs/{o['oid']}"}} for o in objects}
        return JSONResponse({"transfer": "basic", "objects": [{**o, "actions": upload[o["oid"]]} for o in objects]})

    async def lfs_put(self, request: Request) -> Response:
        body = await self.body(request)
        self.blobs[request.path_params["oid"]] = body
        return Response(status_code=200 if hashlib.sha256(body).hexdigest() == request.path_params["oid"] else 400)

    async def resolve(self, request: Request) -> Response:
        repo = self.repo(request)
        data = repo.files.get(request.path_params["path"]) if repo else None
        if data is None:
            return missing("EntryNotFound")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"X-Repo-Commit": repo.sha, "ETag": etag, "Content-Length": str(len(data))}
        return Response(b"" if request.method == "HEAD" else data, headers=headers)


def missing(code: str) -> Response:
    return JSONResponse({"error": code}, 404, {"X-Error-Code": code})


def entry(path: str, data: bytes) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


@contextmanager
def serve() -> Iterator[tuple[MiniHub, str]]:
    """Run a Hub on a free port of the loopback interface; yields it and its address."""
    hub = MiniHub()
    server = uvicorn.Server(uvicorn.Config(hub.app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield hub, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
