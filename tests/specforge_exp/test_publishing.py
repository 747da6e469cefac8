"""export.push against a hub on loopback: what is created, and which files a commit holds."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from specforge_exp import paths
from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.serving import publishing
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.train import train


class Hub(BaseHTTPRequestHandler):
    """The requests of an upload; `created` and `files` keep what came."""

    created: list[dict[str, Any]]
    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer writer":
            return self.send(401, {"error": "who are you?"})
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.send(200, {"url": f"http://{self.headers['Host']}/me/draft"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self.send(200, {"files": [{**file, **plain} for file in files]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/me/draft/commit/{'b' * 40}"
            return self.send(200, {"commitUrl": url, "commitOid": "b" * 40, "success": True})
        return self.send(200, {"errors": [], "warnings": []})  # validate-yaml

    def do_GET(self) -> None:
        self.send(404, {"error": "not here"})

    def send(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.created, Hub.files = [], {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PUSH = """
import logging, sys
from pathlib import Path
from specforge_exp.config.stages import ExportConfig
from specforge_exp.errors import InputError
from specforge_exp.serving.publishing import publish

logging.basicConfig(level=logging.INFO, format="%(message)s")
folder = Path(sys.argv[1])
options = ExportConfig(push="me/draft", private=sys.argv[2] == "private")
try:
    publish(options, [folder / "config.json", folder / "model.safetensors"], "# a card")
except InputError as error:
    sys.exit(f"error: {error}")
"""


def push(hub: str, folder: Path, kind: str = "private", token: str = "writer") -> Any:
    """In a process of its own: the hub's client reads its address when it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HOME": str(folder / "home")}
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(folder), kind], env=environment, cwd=REPOSITORY,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_draft_and_card_are_one_commit(hub: str, files: Path) -> None:
    done = push(hub, files)
    assert done.returncode == 0, done.stderr
    whose = {"name": "draft", "organization": "me"}
    assert Hub.created == [{**whose, "visibility": "private"}]
    assert Hub.files == {
        "config.json": b"{}", "model.safetensors": b"weights", "README.md": b"# a card",
    }  # fmt: skip
    assert f"README.md: {hub}/me/draft/commit/" in done.stderr
    assert push(hub, files, "public").returncode == 0
    assert Hub.created[-1] == {**whose, "visibility": "public"}


def test_a_hub_that_refuses_is_one_line(hub: str, files: Path) -> None:
    refused = push(hub, files, token="reader")
    assert refused.returncode == 1 and not Hub.files
    assert refused.stderr.splitlines()[-1].startswith("error: export.push=me/draft: ")
    assert "HF_TOKEN" in refused.stderr and "Traceback" not in refused.stderr


def test_the_card_says_how_it_was_made_and_what_it_earns(
    cfg: Config, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg.max_steps, cfg.bench.max_tokens, cfg.bench.bootstrap = 2, 4, 10
    train(cfg)
    cfg.export.push, cfg.export.dry_run = "me/my-draft", True
    export(cfg)
    card = capsys.readouterr().out
    assert "Not measured." in card and "# my-draft" in card
    average = bench(cfg)
    capsys.readouterr()
    export(cfg)
    card = capsys.readouterr().out
    for said in (
        f"Mean {average:.3f}.", "temperature 0.0", "max_tokens 4", f"| seed | {cfg.seed} |",
        "| step | 2 |", "--speculative-algorithm EAGLE3", "--speculative-draft-model-path my-draft",
        "- speculative-decoding",
    ):  # fmt: skip
        assert said in card, card
    assert str(paths.run_dir(cfg)) not in card
    cfg.export.dry_run = False  # HF_HUB_OFFLINE is set: said, and the export stays
    with pytest.raises(InputError, match=r"offline: .*; the export itself is complete"):
        export(cfg)


def test_another_export_is_not_shown_with_old_figures(tmp_path: Path) -> None:
    figures = {"prompts": 1, "accepted_length": 2.0}
    for name, digest in (("bench.json", "old"), ("bench-zlab.json", "new")):
        content = {
            "inputs": {"the draft": digest}, "settings": {}, "average": 2.0,
            "datasets": {name: figures},
        }  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    said = publishing.measured(tmp_path, {"inputs": {"the checkpoint": "new"}})
    assert "bench-zlab.json | 1 | 2.00 | -" in said and "| bench.json" not in said
