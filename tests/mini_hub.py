"""A Hub in memory for model repositories: what huggingface_hub asks for to create, commit, list and download.

Start it with `serve()`; clients find it by `HF_ENDPOINT`, which they read when they are imported. It can be told to
fail: `hub.faults["/commit/"] = [500, "hang up", "lose the reply"]` answers the next requests to such a path so.
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
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    def sha(self, branch: str) -> str:
        state = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.branches[branch].items())
        return hashlib.sha1(repr((branch, self.commits, state)).encode()).hexdigest()

    def branch(self, revision: str) -> str | None:
        """The branch of a name or of a commit."""
        return next((name for name in self.branches if revision in (name, self.sha(name))), None)


class MiniHub:
    """State and routes of one Hub."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[str] = []
        self.sent: list[bytes] = []  # all that ever came in, but the token
        model = "/api/models/{owner}/{name}"
        self.routes = Starlette(
            routes=[
                Route("/api/whoami-v2", self.whoami),
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/repos/delete", self.delete, methods=["DELETE"]),
                Route("/api/validate-yaml", self.validate, methods=["POST"]),
                Route(model, self.info),
                Route(model + "/branch/{revision}", self.create_branch, methods=["POST"]),
                Route(model + "/{op}/{revision}", self.operate, methods=["GET", "POST"]),
                Route("/{owner}/{name}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
                Route("/lfs/{oid}", self.lfs_put, methods=["PUT"]),
                Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve, methods=["GET", "HEAD"]),
            ]
        )

    async def app(self, scope, receive, send) -> None:
        """The routes, or a fault."""
        fault = None
        if scope["type"] == "http":
            for part, faults in self.faults.items():
                if part in scope["path"] and faults:
                    fault = faults.pop(0)
                    break
        if fault is None:
            return await self.routes(scope, receive, send)
        if isinstance(fault, int):
            return await JSONResponse({"error": "told to fail"}, fault)(scope, receive, send)
        if fault == "lose the reply":

            async def nowhere(message) -> None:
                pass

            await self.routes(scope, receive, nowhere)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})

    async def body(self, request: Request) -> bytes:
        body = await request.body()
        headers = [f"{k}: {v}" for k, v in request.headers.items() if k != "authorization"]
        self.requests.append(f"{request.method} {request.url.path}")
        self.sent.append("\n".join([str(request.url), *headers]).encode() + b"\n" + body)
        if not self.authorized(request) and not request.url.path.startswith("/lfs/"):
            raise HTTPException(401, "invalid token")
        return body

    def authorized(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {TOKEN}"

    async def whoami(self, request: Request) -> Response:
        await self.body(request)
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

    async def delete(self, request: Request) -> Response:
        body = json.loads(await self.body(request))
        self.repos.pop(f"{body.get('organization') or 'tester'}/{body['name']}")
        return JSONResponse({})

    def repo(self, request: Request) -> Repo | None:
        repo = self.repos.get(f"{request.path_params['owner']}/{request.path_params['name']}")
        return None if repo is None or (repo.private and not self.authorized(request)) else repo

    async def create_branch(self, request: Request) -> Response:
        await self.body(request)
        repo, name = self.repo(request), request.path_params["revision"]
        if repo is None:
            return missing("RepoNotFound")
        created = name not in repo.branches
        repo.branches.setdefault(name, dict(repo.files))
        return JSONResponse({}, 200 if created else 409)

    async def info(self, request: Request) -> Response:
        await request.body()
        self.requests.append(f"{request.method} {request.url.path}")
        repo = self.repo(request)
        branch = repo and repo.branch(request.path_params.get("revision", "main"))
        if branch is None:
            return missing("RepoNotFound" if repo is None else "RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(repo.branches[branch])]
        name = "/".join(request.path_params[part] for part in ("owner", "name"))
        facts = {"_id": "0", "id": name, "modelId": name, "sha": repo.sha(branch), "private": repo.private}
        return JSONResponse(facts | {"siblings": siblings})

    async def operate(self, request: Request) -> Response:
        repo, body = self.repo(request), await self.body(request)
        branch = repo and repo.branch(request.path_params["revision"])
        if branch is None:
            return missing("RepoNotFound" if repo is None else "RevisionNotFound")
        files = repo.branches[branch]
        match request.path_params["op"]:
            case "revision":
                return await self.info(request)
            case "tree":
                return JSONResponse([entry(path, data) for path, data in sorted(files.items())])
            case "paths-info":
                return JSONResponse([entry(p, files[p]) for p in json.loads(body)["paths"] if p in files])
            case "preupload":
                return JSONResponse({"files": [upload_mode(f["path"], files) for f in json.loads(body)["files"]]})
            case "commit":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        repo.commits.append(value["summary"])
                    elif line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                        self.sent.append(files[value["path"]])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.blobs[value["oid"]]
                address = f"{request.base_url}{request.url.path[12:]}"
                return JSONResponse({"success": True, "commitOid": repo.sha(branch), "commitUrl": address})
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
        branch = repo and repo.branch(request.path_params["revision"])
        data = repo.branches[branch].get(request.path_params["path"]) if branch else None
        if data is None:
            return missing("EntryNotFound" if repo else "RepoNotFound")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"X-Repo-Commit": repo.sha(branch), "ETag": etag, "Content-Length": str(len(data))}
        return Response(b"" if request.method == "HEAD" else data, headers=headers)


def missing(code: str) -> Response:
    return JSONResponse({"error": code}, 404, {"X-Error-Code": code})


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}


def upload_mode(path: str, files: dict[str, bytes]) -> dict:
    """How a file is to be sent, and what it is now: a client sends nothing that is there already."""
    mode = "lfs" if path.endswith(WEIGHTS) else "regular"
    known = files.get(path)
    oid = None if known is None else hashlib.sha256(known).hexdigest() if mode == "lfs" else git_oid(known)
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


@contextmanager
def serve() -> Iterator[tuple[MiniHub, str]]:
    """Run a Hub on a free port of the loopback interface; yields it and its address."""
    hub = MiniHub()
    server = uvicorn.Server(uvicorn.Config(hub.app, host="127.0.0.1", port=0, log_level="critical", interface="asgi3"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield hub, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
