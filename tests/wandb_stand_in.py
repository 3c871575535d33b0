"""A stand-in for W&B's server on loopback: answers what its client asks, and records what comes."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class SentRun:
    """What the server knows of one run."""

    opened: int = 0  # how often a client began to write to it
    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    exit_codes: list[int] = field(default_factory=list)


class StandIn:
    """The server's state; ``runs`` by their id."""

    def __init__(self) -> None:
        self.runs: dict[str, SentRun] = {}
        self.views: list[dict[str, Any]] = []
        self.refuses: list[str] = []  # ids of runs whose rows it does not take
        self.everything: list[str] = []
        self.url = ""

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = query.split("(")[0].split("{")[0].split()[-1]
        if operation == "RunResumeStatus":
            return {"model": self._model(variables["name"])}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
        if operation == "CreateRunFiles":
            files = [
                {"name": name, "uploadUrl": f"{self.url}/upload/{name}"}
                for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if operation == "ProjectInternalId":
            return {"project": {"id": "1", "internalId": "1"}}
        if operation == "GetProjects":
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            project = {"__typename": "Project", "id": "1", "name": "bdhf", "entityName": "me"}
            about = {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
            return {"models": {"pageInfo": page, "edges": [{"node": {**project, **about}}]}}
        if operation == "upsertView":
            self.views.append(variables)
            place = {"id": "1", "name": variables["projectName"], "entityName": "me"}
            view = {**variables, "id": "1", "updatedAt": "2026-01-01T00:00:00", "project": place}
            return {"upsertView": {"view": view, "inserted": True}}
        if operation == "GetDefaultEntity":
            return {"viewer": {"id": "1", "entity": "me", "defaultEntity": {"name": "me"}}}
        if operation == "Run":
            return {"project": {"run": self._whole(variables["name"])}}
        if operation == "RunHistoryKeys":
            rows = self.runs[variables["name"]].history
            last = rows[-1]["_step"] if rows else -1
            return {"project": {"run": {"historyKeys": {"lastStep": last}}}}
        if operation == "Viewer":
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}"}}
        return {}

    def _model(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        bucket = None
        if run is not None:
            tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
            bucket = {
                "id": name,
                "name": name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": name,
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": tail,
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"id": "1", "name": "bdhf", "entity": {"id": "1", "name": "me"}, "bucket": bucket}

    def _whole(self, name: str) -> dict[str, Any]:
        run, nothing = self.runs[name], json.dumps({})
        return {
            **dict.fromkeys(("sweepName", "commit", "description", "notes", "group", "jobType")),
            "id": name,
            "name": name,
            "displayName": name,
            "projectId": "1",
            "tags": [],
            "state": "finished",
            "config": json.dumps(run.config),
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "historyLineCount": len(run.history),
            "systemMetrics": nothing,
            "summaryMetrics": nothing,
            "user": {"name": "me", "username": "me"},
        }

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        run = self.runs.setdefault(name, SentRun())
        if variables.get("groupName"):
            run.opened += 1
            run.about = variables
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        entity = {"id": "1", "name": variables["entity"] or "me"}
        project = {"id": "1", "name": variables["project"], "entity": entity}
        return {
            "id": name,
            "name": name,
            "displayName": name,
            "description": None,
            "config": None,
            "sweepName": None,
            "historyLineCount": len(run.history),
            "project": project,
        }

    def stream(self, name: str, content: dict[str, Any]) -> None:
        run = self.runs[name]
        if content.get("complete"):
            run.exit_codes.append(content["exitcode"])
        for file, part in content.get("files", {}).items():
            lines = [json.loads(line) for line in part["content"]]
            if file == "wandb-history.jsonl":
                run.history[part["offset"] :] = lines
            elif file == "wandb-summary.json":
                run.summary |= lines[-1]
        run.complete |= bool(content.get("complete"))


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def _read(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            state.everything.append(body.decode(errors="replace"))
            return body

        def _answer(self, value: Any, code: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            self._read()
            self._answer({})

        def do_POST(self) -> None:
            body = self._read()
            if self.path == "/graphql":
                asked = json.loads(body)
                self._answer({"data": state.graphql(asked["query"], asked.get("variables") or {})})
                return
            if self.path.endswith("/file_stream"):
                name = self.path.split("/")[-2]
                if name in state.refuses:
                    self._answer({"error": "refused"}, 403)
                    return
                state.stream(name, json.loads(body))
            self._answer({"exitcode": None, "limits": {}})

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None: ...  # clients that go away

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
