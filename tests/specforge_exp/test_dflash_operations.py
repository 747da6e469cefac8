"""What went wrong elsewhere around a DFlash draft: in its runs, options, servers and files.

The table of R1 to R36 is in test_dflash_regressions.py.
"""

import ast
import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import REPOSITORY
from test_conf import composed
from test_dflash_pipeline import DRAFT
from test_prefetch import FILES, SHA, Hub, prefetch
from test_resources import settings
from test_server_engine import alive, free_port, gone
from test_train import metrics
from torch import nn
from torch.distributed.fsdp import FSDPModule

from specforge_exp import paths
from specforge_exp.config import STAGES, Config, TrainerConfig
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.errors import InputError
from specforge_exp.records import write_record
from specforge_exp.serving.server import Server
from specforge_exp.stages import train as stage
from specforge_exp.stages.train import train
from specforge_exp.training.checkpoint import forget_old, step_folders
from specforge_exp.training.ranks import launch


@pytest.fixture
def run(cfg: Config, tokens: Path) -> Config:
    """Twelve conversations, six a window."""
    cfg.draft = DRAFT
    cfg.trainer = TrainerConfig(batch_size=6, log_every=1, eval_every=99, save_every=99)
    cfg.max_steps, cfg.epochs = 2, 3
    return cfg


def test_both_drafts_log_the_same_keys(run: Config) -> None:
    """R20: those of training and of evaluation, too; a value that is not there is an error."""
    steps = {"block_size": 4, "draft_vocab_size": 512}
    eagle3 = Eagle3Config(name="eagle3", draft_vocab_size=512, ttt_length=3)
    keys = []
    for draft in (replace(DRAFT, **steps), eagle3):
        cfg = replace(run, draft=draft, run_name=draft.name, max_steps=1)
        train(cfg)
        step, evaluation = metrics(cfg)
        keys.append(set(step) | set(evaluation))
        measured = {f"eval/{key}" for key in step} & set(evaluation)
        assert measured == set(evaluation) - {"step"} and step["loss"] > 0
        with pytest.raises(InputError, match="objectives=alpha/3 is not valid"):
            replace(cfg, objectives=["alpha/3"])
        with pytest.raises(KeyError):
            stage.objectives(cfg, {"evaluation": {}})
    assert keys[0] == keys[1]


COLLECTIVES = (
    "all_reduce", "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single",
    "reduce_scatter_tensor",
)  # fmt: skip


def counted(cfg: Config) -> dict[str, Any]:
    """In each of two processes: collectives, losses and weights held, by sharding and layout."""
    calls: Counter[str] = Counter()
    held: list[int] = []

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return wrapped

    def watched(cfg: Config, draft: nn.Module, *rest: Any) -> dict[str, float]:
        found: dict[str, float] = fitted(cfg, draft, *rest)
        for unit in draft.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
        local = [getattr(weight, "to_local", lambda w=weight: w)() for weight in draft.parameters()]
        held.append(sum(weight.numel() for weight in local))
        return found

    fitted, stage.fit = stage.fit, watched  # type: ignore[attr-defined]
    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, counting(name, getattr(dist, name)))
    found = {}
    for shard in (False, True):
        for size, accumulate in ((6, 1), (2, 3)):
            options = replace(cfg.trainer, shard=shard, batch_size=size, accumulate=accumulate)
            one = replace(cfg, run_name=f"{shard}-{accumulate}", trainer=options)
            calls.clear()
            train(one)
            losses = [line["loss"] for line in metrics(one) if "loss" in line]
            found[one.run_name] = dict(calls), losses, held[-1]
    return found


@pytest.mark.slow
def test_accumulating_adds_no_collective(run: Config) -> None:
    """R23, R24: two processes send as much for windows of three forwards as of one, with a replica
    or a share of the draft each; a share is half of the weights."""
    run.trainer.gpus, run.max_steps = 2, 1
    found = launch(counted, run)
    for shard in (False, True):
        (calls, losses, held), (again, others, _) = (found[f"{shard}-{n}"] for n in (1, 3))
        assert calls == again
        assert losses == pytest.approx(others, rel=2e-5)
        assert losses == pytest.approx(found["False-1"][1], rel=2e-5)
        scattered = sum(number for name, number in calls.items() if "reduce_scatter" in name)
        units = run.draft.num_layers + 1  # every layer, and the rest
        assert scattered == (units * run.max_steps if shard else 0)
        assert held == pytest.approx(found["False-1"][2] / (2 if shard else 1), rel=0.05)
    assert found["False-1"][0]["all_reduce"] > 0


def read_names() -> set[str]:
    """Attributes that code reads (checks of the configuration by itself do not count), and what
    its own functions and the configuration files look up by name."""
    found: set[str] = set()
    for path in [
        *REPOSITORY.glob("specforge_exp/**/*.py"),
        *REPOSITORY.glob("hydra_plugins/**/*.py"),
    ]:
        tree = ast.parse(path.read_text())
        if path.parent.name == "config":
            functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
            tree.body = [n for n in functions if n.name != "__post_init__"]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and path.name == "choices.py":
                found |= set(str(node.value).split())
    for path in REPOSITORY.glob("conf/**/*.yaml"):
        found |= set(re.findall(r"[.{]([a-z_0-9]+)[},]", path.read_text()))
    return found


def options_of(node: type) -> dict[str, str]:
    """All fields of a configuration and of those it holds: with the group, and alone."""
    found: dict[str, str] = {}
    for field in fields(node):
        if is_dataclass(field.type):
            found |= options_of(field.type)
        else:
            found[f"{node.__name__}.{field.name}"] = field.name
    return found


def test_every_option_is_read() -> None:
    """R25: a field that only its own checks look at would be accepted and do nothing."""
    read = read_names()
    unread = [option for option, name in options_of(Config).items() if name not in read]
    # By ${loss.lrs.${lr_point}}.
    assert unread == ["LearningRates.mid"]


def lines(cfg: Config) -> list[tuple[int, float, float]]:
    return [(one["step"], one["loss"], one["lr"]) for one in metrics(cfg) if "loss" in one]


def test_a_resumed_run_keeps_its_schedule(run: Config, caplog: pytest.LogCaptureFixture) -> None:
    """R27: from the newest checkpoint on, with the losses and rates of a run that was not stopped;
    another length of the schedule is refused."""
    run.max_steps, run.trainer = 4, replace(run.trainer, save_every=1, keep_last=9)
    train(run)
    whole, folder = lines(run), paths.run_dir(run)
    (folder / "run.json").unlink()
    for step in (3, 4):
        (folder / f"step-00000{step}").rename(folder / f"lost-{step}")
    caplog.set_level(logging.INFO)
    train(run)
    assert "continuing after step 2" in caplog.text
    assert lines(run) == whole and len({rate for _, _, rate in whole}) > 1
    (folder / "run.json").unlink()
    with pytest.raises(InputError, match="max_steps was 4, now 6"):
        train(replace(run, max_steps=6))


def test_what_a_container_writes_is_kept() -> None:
    """R28: the roots of all artifacts, as a job on Modal gets them, lie on Volumes."""
    for name in STAGES:
        said = settings(name, "experiment=dflash_qwen3_8b")
        for root in ("SPECFORGE_DATASETS", "SPECFORGE_CHECKPOINTS"):
            assert any(Path(said.env[root]).is_relative_to(mount) for mount in said.volumes)
    assert composed("experiment=dflash_qwen3_8b").run_name != composed().run_name


def test_the_oldest_checkpoints_go_first(tmp_path: Path) -> None:
    """R31: by their steps, whatever digits they have; never the best one."""
    steps = (7, 800_000, 999_999, 1_000_000, 1_000_001)
    for step in steps:
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-000003.partial").mkdir()
    assert [int(folder.name[5:]) for folder in step_folders(tmp_path)] == list(steps)
    forget_old(tmp_path, 2, spared=7)
    left = [int(folder.name[5:]) for folder in step_folders(tmp_path)]
    assert left == [7, 1_000_000, 1_000_001]


def test_one_number_says_when_it_is_evaluated(run: Config) -> None:
    """R33: trainer.eval_every alone; the last step always is, and something must be held out."""
    for every, expected in ((1, [1, 2]), (99, [2])):
        cfg = replace(run, run_name=f"every{every}")
        cfg.trainer = replace(run.trainer, eval_every=every)
        train(cfg)
        assert [line["step"] for line in metrics(cfg) if "eval/loss" in line] == expected
    index = paths.tokens_dir(run) / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "eval": []}))
    record = index.parent / "run.json"  # else the index is not what was written
    content = json.loads(record.read_text())
    write_record(record, {name: content[name] for name in ("inputs", "settings")})
    with pytest.raises(InputError, match="no held-out conversation to evaluate on"):
        train(replace(run, run_name="none"))


DEAF = """
import os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
signal.signal(signal.SIGTERM, signal.SIG_IGN)
escaped = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(os.getpid(), escaped.pid, flush=True)
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_a_server_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    """R34: with what it has started, when SIGTERM does not end it."""
    port = free_port()
    server = Server([sys.executable, "-c", DEAF, str(port)], port, tmp_path / "log", {})

    async def scene() -> list[int]:
        await server.start(300)
        pids = [int(word) for word in (tmp_path / "log").read_text().split()[:2]]
        assert len(alive(pids)) == 2
        await server.stop()
        return pids

    assert gone(asyncio.run(scene()))


class Stumbling(Hub):
    """Busy at first, and cuts the first connection that brings weights."""

    asked: Counter[tuple[str, str]]

    def send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        path = self.path.split("?")[0]
        self.asked[self.command, path] += 1
        first = self.asked[self.command, path] == 1
        if first and "revision" in path:
            return super().send(503, b"", headers)
        if first and self.command == "GET" and path.endswith(".safetensors"):
            self.close_connection = True
            headers = {"Content-Length": str(len(data)), **(headers or {})}
            return super().send(code, data[: len(data) // 2], headers)
        super().send(code, data, headers)


def test_a_hub_that_stumbles_is_asked_again(tmp_path: Path) -> None:
    """R34: no error for what passes, and every byte is there."""
    Stumbling.served, Stumbling.asked = [], Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stumbling)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = prefetch(tmp_path, "some/model", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "503" in done.stdout and "again in 1 s" in done.stdout
    folder = tmp_path / "hf" / "hub" / "models--some--model" / "snapshots" / SHA
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert Stumbling.served.count("model.safetensors") == 2


ALONE = """
import sys
from importlib.machinery import PathFinder
OPTIONAL = set("sglang vllm modal wandb trackio datasets optuna hydra flash_attn".split())
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in OPTIONAL else find(name, *rest)
)
import specforge_exp.drafts.dflash.model, specforge_exp.stages.bench, specforge_exp.stages.export
import specforge_exp.stages.prep, specforge_exp.stages.preprocess, specforge_exp.stages.regen
from specforge_exp.stages.train import train
print(sorted(OPTIONAL & set(sys.modules)))
"""


@pytest.mark.slow
def test_nothing_optional_is_imported() -> None:
    """R35: the stages load where no engine, tracker, launcher or sweeper is installed."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr


SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[A-Z0-9]{16}\b|\ba[ks]-[A-Za-z0-9]{20,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY|(?i:wandb|api_?key)[^\n]{0,40}"
    r"\b[0-9a-f]{40}\b"
)
"""Tokens of Hugging Face, OpenAI, AWS, Modal, GitHub and W&B, and private keys."""


def below(folder: Path, apart: set[str]) -> Iterator[Path]:
    """Its files, without hidden folders (a .venv has ten thousands) and those that are apart."""
    for path in folder.iterdir():
        if path.name == ".ci" or not (path.name.startswith(".") or path.name in apart):
            yield from below(path, apart) if path.is_dir() else [path]


def test_no_file_holds_a_secret() -> None:
    """R36: neither the code nor the documents."""
    for kind in ("hf_" + "a" * 34, "sk-" + "b" * 24, "AKIA" + "C" * 16, "ak-" + "d" * 22,
                 "ghp_" + "e" * 36, "WANDB_API_KEY=" + "f" * 40):  # fmt: skip
        assert SECRETS.search(f"x {kind} y")
    apart = {"artifacts", "wandb", "outputs", "multirun", "__pycache__"}
    searched = 0
    for path in below(REPOSITORY, apart):
        if not path.is_file() or path.stat().st_size > 10_000_000:
            continue
        searched += 1
        found = SECRETS.search(path.read_bytes().decode(errors="replace"))
        assert found is None, f"{path} holds {found[0][:8] if found else ''}..."
    assert searched > 300
