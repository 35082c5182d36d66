"""A server of Weights & Biases on loopback, for the few requests that their client needs. It has one run: history and summary."""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "moods", "entity": {"id": "e", "name": "me"}}


@dataclass
class WandbServer:
    url: str = ""
    names: set[str] = field(default_factory=set)
    """Ids of the runs that were begun."""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def data_for(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = {"id": "r", "name": variables.get("name"), "displayName": "", "config": "{}", "project": PROJECT}
        if operation == "UpsertBucket":
            self.names.add(variables["name"])
            return {"upsertBucket": {"bucket": {**run, "historyLineCount": len(self.history)}, "inserted": True}}
        if operation == "RunResumeStatus" and variables["name"] in self.names:
            counts = {"historyLineCount": len(self.history), "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]"}
            tail = json.dumps([json.dumps(row) for row in self.history[-1:]])
            known = {
                "summaryMetrics": json.dumps(self.summary),
                "historyTail": tail,
                "notes": "",
                "tags": [],
                "wandbConfig": '{"t": 1}',  # without it a run has not begun
            }
            return {"model": {**PROJECT, "bucket": {**run, **counts, **known}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def keep(self, files: dict[str, Any]) -> None:
        """What arrives on the stream of files."""
        for name, part in files.items():
            if name == "wandb-history.jsonl":
                self.history[part["offset"] :] = map(json.loads, part["content"])
            elif name == "wandb-summary.json":
                self.summary = json.loads(part["content"][-1])


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            asked = json.loads(body) if body.startswith(b"{") else {}
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                answer = {"data": state.data_for(asked["operationName"], asked["variables"])}
            elif self.path.endswith("/file_stream"):
                state.keep(asked.get("files") or {})
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_POST  # noqa: N815 - http.server's name

        def log_message(self, format: str, *arguments: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Nothing: the client leaves its connections open until it ends."""

    with Server(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield state
        server.shutdown()
        thread.join()
