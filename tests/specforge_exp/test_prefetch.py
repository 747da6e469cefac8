"""prefetch against a hub on loopback that knows one open and one gated model."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import REPOSITORY

SHA = "a" * 40
FILES = {
    name: (REPOSITORY / "assets" / "tiny_target" / name).read_bytes()
    for name in ("config.json", "tokenizer.json", "model.safetensors")
} | {"pytorch_model.bin": b"not wanted", "original/params.json": b"{}"}


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The three requests that a download makes; `served` counts the files sent."""

    served: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if "gated" in self.path and self.headers.get("Authorization") != "Bearer accepted":
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "missing" in self.path:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "revision" in parts:
            name = "/".join(parts[2:4])
            return self.send(200, json.dumps({"id": name, "sha": SHA, "siblings": []}).encode())
        if "tree" in parts:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                for name, data in FILES.items()
            ]
            return self.send(200, json.dumps(entries).encode())
        name = "/".join(parts[4:])
        if self.command == "GET":
            self.served.append(name)
        headers = {"ETag": f'"{digest(FILES[name])}"', "X-Repo-Commit": SHA}
        self.send(200, FILES[name], headers)

    do_HEAD = do_GET

    def send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.served = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def prefetch(folder: Path, model: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    here = {"HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1", **environment}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "prefetch.py"), "model=local", f"model.path={model}"],
        cwd=folder, env={**clean, **here}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_downloads_once_and_only_what_is_read(hub: str, tmp_path: Path) -> None:
    done = prefetch(tmp_path, "some/model", HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "hf" / "hub" / "models--some--model" / "snapshots" / SHA
    assert f"complete: 3 files, 0.00 GB in {folder}" in done.stdout
    assert (tmp_path / "hf" / "prefetched" / "models--some--model").exists()
    wanted = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted
    for name in wanted:
        assert (folder / name).read_bytes() == FILES[name]
    Hub.served.clear()
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").resolve().unlink()
    assert prefetch(tmp_path, "some/model", HF_ENDPOINT=hub).returncode == 0
    assert "model.safetensors" not in Hub.served
    offline = prefetch(tmp_path, "some/model", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


@pytest.mark.slow
def test_a_gated_model_names_its_page_and_the_secret(hub: str, tmp_path: Path) -> None:
    done = prefetch(tmp_path, "some/gated", HF_ENDPOINT=hub)
    assert done.returncode == 1
    assert f"some/gated is gated: accept its licence at {hub}/some/gated" in done.stderr
    assert "modal secret create huggingface-secret HF_TOKEN=" in done.stderr
    assert prefetch(tmp_path, "some/gated", HF_ENDPOINT=hub, HF_TOKEN="accepted").returncode == 0


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "environment", "said"),
    [
        ("some/missing", {}, "there is no "),
        slow("a/b/c", {}, "neither a folder nor a hub id"),
        slow("some/model", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
        slow("some/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_what_keeps_it_from_coming_is_one_line(
    hub: str, tmp_path: Path, model: str, environment: dict[str, str], said: str
) -> None:
    done = prefetch(tmp_path, model, **{"HF_ENDPOINT": hub, **environment})
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_folder_needs_no_download(tmp_path: Path) -> None:
    done = prefetch(tmp_path, str(REPOSITORY / "assets" / "tiny_target"))
    assert done.returncode == 0 and "nothing to do" in done.stdout
