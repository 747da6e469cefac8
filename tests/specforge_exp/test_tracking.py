"""metrics.jsonl is the truth; a tracker is a copy that may fail, hang or be killed."""

import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from wandb_server import WandbServer, serve

from specforge_exp.config import Config, InputError
from specforge_exp.training import tracking
from specforge_exp.training.mirror import has_wandb_key
from specforge_exp.training.tracking import Tracker, open_tracker

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
PROJECT = "specforge-eagle3-opd"
ALL = [1, 2, 3, 4]


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no home, and a store of trackio's own."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B server and a key for it."""
    server = WandbServer()
    http = serve(server)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    http.shutdown()
    http.server_close()


def write(tracker: Tracker, steps: list[int]) -> None:
    """Lines as training logs them; every second step is evaluated."""
    for step in steps:
        tracker.log({"step": step, "epoch": 0, "loss": 1 / step})
        if step % 2 == 0:
            tracker.log({"step": step, "eval/loss": 1 / step})


def steps_in(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [found["step"] for line in lines if "loss" in (found := json.loads(line))]


def until(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """Wait for a condition and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def told(folder: Path) -> dict[str, Any]:
    """tracker.json, once it is there."""
    file = folder / "tracker.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def child_of(pid: int) -> int:
    """The tracker's own process: the first child of the mirror."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int(until(lambda: children.read_text().split())[0])


def trackio_rows(tmp_path: Path) -> list[tuple[str, str, int, list[str]]]:
    """(name, id, step, names of the metrics) of all that trackio stored."""
    file = tmp_path / "trackio" / f"{PROJECT}.db"
    if not file.exists():
        return []
    query = "select run_name, run_id, step, metrics from metrics order by id"
    with closing(sqlite3.connect(file)) as store:
        try:
            return [(n, i, s, sorted(json.loads(m))) for n, i, s, m in store.execute(query)]
        except sqlite3.OperationalError:  # no table yet
            return []


def test_lines_after_the_checkpoint_are_dropped(cfg: Config, tmp_path: Path) -> None:
    write(open_tracker(cfg, tmp_path, 0), [1, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write(open_tracker(cfg, tmp_path, 2), [3])
    assert steps_in(tmp_path) == [1, 3]
    open_tracker(cfg, tmp_path, 0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="the disk is full"):
        Tracker(tmp_path / "metrics.jsonl").log({"step": 1})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named(
    name: str, cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    cfg.tracker.name = name
    with pytest.raises(InputError, match=re.escape(f"specforge-exp[{name}]")):
        open_tracker(cfg, tmp_path, 0)


def test_key_is_looked_for_where_wandb_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_wandb_key()
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    netrc.chmod(0o600)
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_wandb_key()


def test_wandb_online_resumes_its_run(
    server: WandbServer, cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also from an older checkpoint: what the server has is not sent again."""
    cfg.tracker.name, cfg.tracker.group, cfg.tracker.prefix = "wandb", "my-sweep", "seeds-"
    for start, steps in ((0, [1, 2, 3]), (2, [3, 4])):
        tracker = open_tracker(cfg, tmp_path, start)
        write(tracker, steps)
        tracker.close()
    assert steps_in(tmp_path) == ALL
    (run_id,) = server.runs
    assert (tmp_path / "wandb_id").read_text() == run_id
    assert [line["_step"] for line in server.history[run_id]] == ALL
    assert [line.get("eval/loss") for line in server.history[run_id]] == [None, 0.5, None, 0.25]
    made = server.runs[run_id]
    assert (made["project"], made["groupName"]) == (PROJECT, "my-sweep")
    assert made["displayName"] == "seeds-test"
    assert json.loads(made["config"])["lr"] == {"value": 1e-3}
    assert told(tmp_path)["url"].endswith(f"/runs/{run_id}")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any("offline" not in str(p) and p.suffix == ".wandb" for p in files)
    assert not [p for p in files if KEY.encode() in p.read_bytes()]
    assert KEY not in "".join(server.bodies) + "".join(capfd.readouterr())


def test_a_team_and_a_name_of_its_own(server: WandbServer, cfg: Config, tmp_path: Path) -> None:
    cfg.tracker.name, cfg.tracker.entity, cfg.tracker.run_name = "wandb", "a-team", "mine"
    tracker = open_tracker(cfg, tmp_path, 0)
    write(tracker, [1])
    tracker.close()
    [made] = server.runs.values()
    assert (made["entity"], made["displayName"]) == ("a-team", "mine")


def test_wandb_offline_and_the_command_that_uploads_it(
    cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.tracker.name, cfg.tracker.group = "wandb", "g"
    for start, steps in ((0, [1, 2, 3]), (2, [3, 4])):
        tracker = open_tracker(cfg, tmp_path, start)
        write(tracker, steps)
        tracker.close()
    command = told(tmp_path)["sync"]
    assert f"upload later with: {command}\n" in capfd.readouterr().err
    assert len(re.findall("offline-run-", command)) == 2
    server = WandbServer()
    http = serve(server)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    sync = [str(Path(sys.executable).parent / "wandb"), *shlex.split(command)[1:]]
    done = subprocess.run(sync, capture_output=True, text=True, timeout=300, check=False)
    http.shutdown()
    http.server_close()
    assert done.returncode == 0, done.stdout + done.stderr
    (run_id,) = server.runs
    assert run_id == (tmp_path / "wandb_id").read_text()
    assert [line["_step"] for line in server.history[run_id]] == ALL


def test_a_run_that_starts_over_with_other_options_is_another_one(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say with a lower rate, after a loss that was no number before the first checkpoint."""
    requests: list[dict[str, Any]] = []

    def known_after(start: int) -> bool:
        (tmp_path / "wandb_id").write_text("before")
        open_tracker(cfg, tmp_path, start)
        return (tmp_path / "wandb_id").exists()

    class Mirror:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.stdin = self

        def write(self, line: bytes) -> None:
            requests.append(json.loads(line))

        def flush(self) -> None: ...

    monkeypatch.setattr(tracking.subprocess, "Popen", Mirror)
    cfg.tracker.name = "wandb"
    assert known_after(0)
    record = {"made_of": requests[0]["made_of"]}
    (tmp_path / "tracker.json").write_text(json.dumps(record))
    assert known_after(0)
    cfg.lr /= 2
    assert known_after(2) and not known_after(0)


@pytest.mark.timing
@pytest.mark.slow
def test_a_server_that_never_answers(
    cfg: Config,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The training does not notice, and the run goes on offline."""
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "ONLINE_SECONDS", 2.0)
    cfg.tracker.name = "wandb"
    begun = time.monotonic()
    tracker = open_tracker(cfg, tmp_path, 0)
    write(tracker, ALL)
    assert time.monotonic() - begun < 5
    tracker.close()
    silent.close()
    said = capfd.readouterr().err
    assert "W&B does not take the run" in said and "it goes on offline" in said
    assert (tracker.mirror, told(tmp_path)["stopped"]) == (None, None)
    (data,) = (tmp_path / "wandb").glob("offline-run-*")
    assert str(data) in told(tmp_path)["sync"]
    assert list(data.glob("*.wandb"))


def test_a_killed_service_does_not_end_the_run(
    cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.tracker.name = "wandb"
    tracker = open_tracker(cfg, tmp_path, 0)
    assert tracker.mirror is not None
    until(lambda: told(tmp_path).get("id"))
    os.kill(child_of(tracker.mirror.pid), signal.SIGKILL)
    step = 0
    while tracker.mirror is not None:  # W&B notices when it is given something
        step += 1
        write(tracker, [step])
        time.sleep(0.05)
    write(tracker, [step + 1])
    tracker.close()
    assert steps_in(tmp_path) == list(range(1, step + 2))
    assert caplog.text.count("the tracker stopped") == 1
    assert "upload what it has with: wandb sync" in caplog.text


@pytest.mark.timing
def test_a_service_that_hangs_does_not_hold_the_run(
    cfg: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 2.0)
    cfg.tracker.name = "wandb"
    tracker = open_tracker(cfg, tmp_path, 0)
    assert tracker.mirror is not None
    until(lambda: told(tmp_path).get("id"))
    service = child_of(tracker.mirror.pid)
    os.kill(service, signal.SIGSTOP)
    begun = time.monotonic()
    write(tracker, ALL)
    tracker.close()
    os.kill(service, signal.SIGKILL)
    assert time.monotonic() - begun < 10
    assert "did not take everything in 2 s" in caplog.text
    assert steps_in(tmp_path) == ALL


FULL = """
mkdir {folder}/full && mount -t tmpfs -o size=64k tmpfs {folder}/full || exit 77
head -c 1M /dev/zero > {folder}/full/filler 2> /dev/null
ln -s {folder}/full {folder}/wandb
export TRACKIO_DIR={folder}/full/trackio
{python} - <<'END'
import logging
from pathlib import Path
from specforge_exp.training import tracking
from specforge_exp.config import Config
from specforge_exp.drafts.eagle3.config import Eagle3Config
logging.basicConfig()
tracking.CLOSE_SECONDS = 20.0
cfg = Config(run_name="test", draft=Eagle3Config())
cfg.tracker.name = "{name}"
tracker = tracking.open_tracker(cfg, Path("{folder}"), 0)
for step in range(1, 2001):
    tracker.log(dict(step=step, loss=1.0))
tracker.close()
END
"""


@pytest.mark.parametrize("name", ["wandb", pytest.param("trackio", marks=pytest.mark.slow)])
def test_a_full_disk_for_its_files_costs_the_training_nothing(name: str, tmp_path: Path) -> None:
    script = FULL.format(folder=tmp_path, python=sys.executable, name=name)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=ROOT, text=True, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no namespaces: a file system of this test's own cannot be mounted")
    assert done.returncode == 0, done.stderr
    assert steps_in(tmp_path) == list(range(1, 2001))
    assert "No space left on device" in done.stderr or "full" in done.stderr, done.stderr


@pytest.mark.slow
def test_trackio_resumes_its_run_and_doubles_no_step(
    cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg.tracker.name, cfg.tracker.group, cfg.tracker.prefix = "trackio", "my-sweep", "seeds-"

    def run(folder: str, start: int, steps: list[int]) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        tracker = open_tracker(cfg, tmp_path / folder, start)
        write(tracker, steps)
        tracker.close()
        return (tmp_path / folder / "trackio_id").read_text()

    first = run("a", 0, [1, 2, 3])
    assert run("a", 2, [3, 4]) == first
    rows = trackio_rows(tmp_path)
    assert {row[:2] for row in rows} == {("seeds-test", first)}
    losses = [step for _, _, step, names in rows if "loss" in names]
    evaluations = [step for _, _, step, names in rows if "eval/loss" in names]
    assert (losses, evaluations) == (ALL, [2, 4])
    assert f'trackio show --project "{PROJECT}"' in capfd.readouterr().err
    with closing(sqlite3.connect(tmp_path / "trackio" / f"{PROJECT}.db")) as store:
        ((config,),) = store.execute("select config from configs")
    assert (json.loads(config)["_Group"], json.loads(config)["lr"]) == ("my-sweep", 1e-3)

    second = run("b", 0, [1])  # of the same name in another folder
    assert second != first
    assert run("a", 4, [5]) not in (first, second)  # trackio finds a name's newest run only
    newest = [row[2] for row in trackio_rows(tmp_path) if row[1] not in (first, second)]
    assert sorted(set(newest)) == [1, 2, 3, 4, 5]  # so what it lacks comes from metrics.jsonl
    cfg.trainer.resume = False
    before = (tmp_path / "a" / "trackio_id").read_text()
    assert run("a", 0, [1]) != before  # other numbers under the same steps


@pytest.mark.slow
def test_the_copy_is_whole_after_a_training_was_killed(tmp_path: Path) -> None:
    """Nobody closes the tracker, and what it prints goes nowhere."""
    code = (
        "import os, sys; from pathlib import Path; from specforge_exp.config import Config\n"
        "from specforge_exp.training.tracking import open_tracker\n"
        "from specforge_exp.drafts.eagle3.config import Eagle3Config\n"
        "cfg = Config(run_name='test', draft=Eagle3Config()); cfg.tracker.name = 'trackio'\n"
        "tracker = open_tracker(cfg, Path(sys.argv[1]), 0)\n"
        "for step in range(1, 101): tracker.log(dict(step=step, loss=1.0))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE
    ) as training:
        assert training.wait() == -signal.SIGKILL
        assert training.stderr is not None
        training.stderr.close()
    until(lambda: len(trackio_rows(tmp_path)) == 100)
    assert [row[2] for row in trackio_rows(tmp_path)] == list(range(1, 101))
