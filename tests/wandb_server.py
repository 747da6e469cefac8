"""As much of W&B's server as its real client needs to make, resume and finish a run."""

import gzip
import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}


@dataclass
class WandbServer:
    """What it was told, by run id."""

    url: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What runs were made with: displayName, groupName, config, ..."""
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bodies: list[str] = field(default_factory=list)
    """Everything that was sent."""
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, path: str, said: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        if path.endswith("/file_stream"):
            lines = said.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history.setdefault(path.split("/")[-2], []).extend(map(json.loads, lines))
            return {}
        query, given = said.get("query", ""), said.get("variables") or {}
        if "UpsertBucket" in query:
            self.runs.setdefault(given["name"], given)
            return {"upsertBucket": {"bucket": self.bucket(given), "inserted": True}}
        if "RunResumeStatus" in query:
            known = given["name"] in self.runs
            return {"model": {"bucket": self.bucket(given)} if known else None}
        if "CreateRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/put/{n}"} for n in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": USER, "serverInfo": {"features": [], "cliVersionInfo": {}}}

    def bucket(self, given: dict[str, Any]) -> dict[str, Any]:
        """A run as the client reads it."""
        lines = self.history.get(given["name"], [])
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "me"}}
        return {
            "id": "r", "name": given["name"], "displayName": given.get("displayName") or "run",
            "config": "{}", "sweepName": None, "project": project, "summaryMetrics": "{}",
            "historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]),
            "eventsTail": "[]", "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip


def serve(server: WandbServer) -> ThreadingHTTPServer:
    """Start to answer; the caller shuts it down."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            with server.lock:
                server.bodies.append(body.decode(errors="replace"))
                try:
                    said = json.loads(body)
                except ValueError:
                    said = {}
                found = server.answer(self.path, said)
            answer = json.dumps({"data": found} if "query" in said else found).encode()
            with suppress(OSError):  # a client that was killed
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        do_PUT = do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the client leaves its connections as they are

    http = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    return http
