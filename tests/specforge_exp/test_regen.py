"""Regeneration: every turn by the target itself, in order, exactly once."""

import json
import shutil
import signal
import time
from dataclasses import replace
from functools import partial as bound
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import composed, write_jsonl
from holding import environment, hold, release

from specforge_exp import paths
from specforge_exp.config import Config
from specforge_exp.config.machine import machine
from specforge_exp.data.chat import prompt_ids
from specforge_exp.errors import InputError
from specforge_exp.stages import regen as stage
from specforge_exp.stages.prep import prep
from specforge_exp.stages.regen import regen
from specforge_exp.target import Target

Record = dict[str, Any]


def say(*texts: str, name: str = "c", system: str | None = None) -> Record:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"id": name, "conversations": messages}


@pytest.fixture
def prompts(cfg: Config) -> list[Record]:
    """Written as prep would; cfg is set to short greedy answers."""
    cfg.regen.temperature = 0.0
    cfg.regen.max_tokens = 12
    cfg.engine.concurrency = 2
    records = [
        say("Describe a kettle.", name="one"),
        say("How can I bake bread?", "old", "And then?", "old", name="two"),
        say("Who are you?", "old answer", name="three", system="You are a helpful assistant."),
        say("Write a story about a fox named Ada.", "x", "Thanks.", name="four"),
        say("word " * 400, name="too-long"),
    ]
    folder = paths.prompts_dir(cfg)
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", records)
    write_jsonl(folder / "eval.jsonl", records[:1])
    return records


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_turn_is_the_targets_own(
    cfg: Config, prompts: list[Record], tiny_target: Target, tiny_tokenizer: Any
) -> None:
    folder = regen(cfg)
    done = read(folder / "train.jsonl")
    assert [r["id"] for r in done] == ["one", "two", "three", "four"]
    failed = read(folder / "failed.jsonl")
    assert [r["id"] for r in failed] == ["too-long"]
    assert "max_length=256" in failed[0]["error"]
    roles = [[m["role"] for m in r["conversations"]] for r in done]
    assert roles[1] == ["user", "assistant", "user", "assistant"]
    assert roles[2] == ["system", "user", "assistant"]
    assert roles[3] == ["user", "assistant", "user", "assistant"]
    for record in done:
        messages = record["conversations"]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = torch.tensor([prompt_ids(tiny_tokenizer, messages[:index], {})])
            out = tiny_target.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
            )
            text = tiny_tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
            assert message["content"] == text
        assert all(reason in ("stop", "length") for reason in record["finish_reasons"])


def test_complete_is_reused_and_a_change_is_named(cfg: Config, prompts: list[Record]) -> None:
    folder = regen(cfg)
    stamp = (folder / "run.json").stat().st_mtime_ns
    regen(cfg)
    assert (folder / "run.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"model\.dtype was None, now bfloat16"):
        regen(replace(cfg, model=replace(cfg.model, dtype="bfloat16")))
    cfg.regen.max_tokens = 13
    with pytest.raises(InputError, match=r"regen\.max_tokens was 12, now 13"):
        regen(cfg)


def without_time(records: list[Record]) -> list[Record]:
    return [{**r, "regenerated": {**r["regenerated"], "time": ""}} for r in records]


def started(folder: Path, *options: str, tokens: int = 120) -> warm.Started:
    """`python regen.py` on sixteen templated prompts, in a process of its own."""
    roots = {f"SPECFORGE_{n.upper()}": str(folder / n) for n in ("datasets", "checkpoints")}
    command = ["regen.py", *options, "experiment=smoke", "model=tiny"]
    command += ["engine.concurrency=1", f"regen.max_tokens={tokens}"]
    return warm.start(command, env={**environment(), **roots}, together=True)


def lines_in(folder: Path) -> int:
    """Answers that are kept."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("shards/*.jsonl*"))


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_interrupted_continues(tmp_path: Path, cfg: Config, number: signal.Signals) -> None:
    """The process is killed in the middle; the same command answers the rest, nothing twice."""
    cfg.data.name, cfg.data.train[0].limit = "smoke", 16
    prep(cfg)
    folder = tmp_path / "datasets" / "smoke--tiny"
    partial = folder.with_suffix(".partial")
    begun = bound(started, tmp_path, tokens=120 if number == signal.SIGTERM else 16)
    hold(partial, 1)  # the second chunk's answers, the four of eval
    first = begun()
    deadline = time.monotonic() + 300
    while lines_in(partial) < 3:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    if number == signal.SIGTERM:
        while not (partial / "progress.json").exists():
            time.sleep(0.01)
        said = begun("status").communicate()[0]
        assert " of 20 done, 0 failed; 1 in flight; " in said and "Traceback" not in said
    else:  # other options meanwhile
        said = begun("seed=1").communicate()[0]
        assert f"another process writes {folder}: process {first.pid} on" in said
    first.send_signal(number)
    printed = first.communicate()[0]
    release(partial)
    assert first.returncode == -number and "Traceback" not in printed
    kept = lines_in(partial)
    if number == signal.SIGTERM:
        assert "stopping; answers under way get 15 s to end" in printed
    else:  # other options afterwards
        said = begun("seed=1").communicate()[0]
        assert "unfinished work of other options: seed was 0, now 1." in said
        assert "regen.force=true" in said and lines_in(partial) == kept
    second = begun()
    printed = second.communicate()[0]
    assert second.returncode == 0, printed
    assert f"{kept} of 20 are answered already" in printed
    assert "input 20 = done 20 + failed 0 + skipped 0" in printed
    done = read(folder / "train.jsonl")
    assert {path.name for path in folder.iterdir()} == {
        "train.jsonl", "eval.jsonl", "failed.jsonl", "run.json"
    }  # fmt: skip
    if number == signal.SIGKILL:
        whole = begun("regen.force=true")
        assert whole.wait() == 0
        assert without_time(read(folder / "train.jsonl")) == without_time(done)


def test_status(cfg: Config, tmp_path: Path) -> None:
    """Of a run that has not begun, of one that was killed long ago, of one that is complete."""
    folder = tmp_path / "data--model"
    assert stage.status(folder).startswith("nothing yet; start it with: python regen.py")
    partial = tmp_path / "data--model.partial"
    partial.mkdir()
    assert stage.status(folder).startswith("at its beginning or its end; the same command")
    said = {
        "time": "2026-01-01T00:00:00+00:00", "total": 9, "done": 3, "failed": 1, "in_flight": 2,
        "conversations_per_second": 1.5, "tokens_per_second": 200.0, "seconds_left": 60,
        "usd": 1.234,
    }  # fmt: skip
    (partial / "progress.json").write_text(json.dumps(said))
    found = stage.status(folder)
    assert found.startswith("3 of 9 done, 1 failed; 1.5 conversations/s, 200.0 tokens/s; no sign")
    assert found.endswith("; $1.23") and "in flight" not in found
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (partial / "progress.json").write_text(json.dumps(said | {"usd": 0.0}))
    assert stage.status(folder) == found.removesuffix("; $1.23")  # being made again
    (partial / "progress.json").unlink()
    assert stage.status(folder) == f"complete: {folder}"


def test_sampling_is_repeatable(cfg: Config, prompts: list[Record]) -> None:
    cfg.regen.temperature = 1.0
    first = read(regen(cfg) / "train.jsonl")
    cfg.regen.force, cfg.engine.concurrency = True, 1
    assert without_time(read(regen(cfg) / "train.jsonl")) == without_time(first)


def test_samples_and_the_rest(
    cfg: Config, prompts: list[Record], caplog: pytest.LogCaptureFixture
) -> None:
    """Two answers to each of the first three; the other conversations are skipped, and said."""
    cfg.regen.num_samples, cfg.regen.samples_per_prompt, cfg.regen.temperature = 3, 2, 1.0
    caplog.set_level("INFO")
    done = read(regen(cfg) / "train.jsonl")
    assert [r["id"] for r in done] == ["one#0", "one#1", "two#0", "two#1", "three#0", "three#1"]
    answers = [r["conversations"][-1]["content"] for r in done]
    assert answers[0] != answers[1]
    assert "input 12 = done 8 + failed 0 + skipped 4" in caplog.text


def test_data_with_an_error_of_their_own(
    cfg: Config, prompts: list[Record], caplog: pytest.LogCaptureFixture
) -> None:
    """A column of that name is no failure, and does not hide the reason of one."""
    caplog.set_level("INFO")
    train = [{**record, "error": "none", "reason": "x"} for record in (prompts[0], prompts[-1])]
    write_jsonl(paths.prompts_dir(cfg) / "train.jsonl", train)
    folder = regen(cfg)
    assert "input 3 = done 2 + failed 1 + skipped 0" in caplog.text
    [done], [failed] = read(folder / "train.jsonl"), read(folder / "failed.jsonl")
    assert "error" not in done and "the prompt alone has" in failed["error"]
    assert done["reason"] == "x"


def test_a_dry_run_touches_nothing(
    cfg: Config, prompts: list[Record], caplog: pytest.LogCaptureFixture
) -> None:
    cfg.regen.dry_run = True
    caplog.set_level("INFO")
    folder = regen(cfg)
    assert not folder.exists() and not folder.with_suffix(".partial").exists()
    assert "5 of 5 conversations in 1 chunks" in caplog.text
    assert "temperature 0, top_p 1, top_k 0, repetition_penalty 1, at most 12 tokens" in caplog.text


def test_what_answers_would_be_lost_for_is_told_first(
    cfg: Config, prompts: list[Record], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No engine serves a draft of the target; no server ends its answers."""
    folder = shutil.copytree(cfg.model.path, tmp_path / "base")
    for name, change in {
        "generation_config.json": {"eos_token_id": 0},
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
        "config.json": {"architectures": ["Cohere2ForCausalLM"]},
    }.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **change}))
    cfg.model.path, cfg.regen.dry_run = str(folder), True
    regen(cfg)
    assert "have no draft=eagle3 for targets of Cohere2" in caplog.text
    assert "at which a server of this model does not stop" in caplog.text


def test_nothing_answered_is_an_error(cfg: Config, prompts: list[Record]) -> None:
    cfg.max_length = 5
    cfg.draft.ttt_length = 1
    with pytest.raises(InputError, match=r"answered none .*failed\.jsonl"):
        regen(cfg)


def test_a_hundred_thousand_tokens(cfg: Config, prompts: list[Record]) -> None:
    """Beyond the target's own context, whatever max_length says: failed, with both numbers."""
    cfg.max_length = 10**6
    long = say("word " * 100_000, name="endless")
    write_jsonl(paths.prompts_dir(cfg) / "train.jsonl", [*prompts[:2], long])
    folder = regen(cfg)
    [failed] = read(folder / "failed.jsonl")
    assert failed["id"] == "endless" and "context of 2048 tokens" in failed["error"]
    assert [r["id"] for r in read(folder / "train.jsonl")] == ["one", "two"]


def test_a_target_too_shallow_for_the_draft(
    cfg: Config, prompts: list[Record], tmp_path: Path
) -> None:
    """By its config.json alone, before a word is said: train would refuse it after all of them."""
    config = json.loads((Path(cfg.model.path) / "config.json").read_text())
    config |= {"num_hidden_layers": 6, "layer_types": config["layer_types"][:6]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg.model.path = str(tmp_path)
    with pytest.raises(InputError, match=r"has 6 layers; .* at least 7.*model\.aux_layers"):
        regen(cfg)
    cfg.model.aux_layers = [0, 2, 6]
    with pytest.raises(InputError, match=r"layers 0\.\.5"):
        stage.check_engine(cfg)
    job = composed("model=tiny", f"model.path={tmp_path}")
    with pytest.raises(InputError, match="has 6 layers"):  # of -m, before a container is rented
        machine("regen", job)
    assert machine("prep", job)["memory"]
    cfg.model.aux_layers = [0, 2, 5]
    stage.check_engine(cfg)


def test_missing_prompts_name_the_command(cfg: Config) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl does not exist.*python prep\.py"):
        regen(cfg)


FULL = """
import os, runpy, shutil, subprocess, sys
from pathlib import Path
from warm_containers import unshare

here, there, words = Path({here!r}), Path({there!r}), {words!r}
try:
    unshare()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(there)], check=True)
except (OSError, subprocess.CalledProcessError):
    sys.exit(77)

def regen():
    if pid := os.fork():
        print("ended with", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        return
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    sys.exit(0)

shutil.copytree(here / "datasets", there / "datasets")
with (there / "filler").open("wb", buffering=0) as filler:
    try:
        filler.write(bytes(2**20))
        filler.write(bytes(2**20))
    except OSError:
        pass
    filler.truncate(filler.tell() - 2**15)
regen()
(there / "filler").unlink()
regen()
print(len((there / "datasets/smoke--tiny/train.jsonl").read_text().splitlines()), "lines")
"""
"""A file system of its own, for two regenerations: the first finds it full."""


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_nothing(tmp_path: Path, cfg: Config) -> None:
    """A file system without room: one line with the remedy; with room the same command ends."""
    cfg.data.name, cfg.data.train[0].limit = "smoke", 16
    prep(cfg)
    there = tmp_path / "there"
    there.mkdir()
    words = ["regen.py", "experiment=smoke", "model=tiny", "engine.concurrency=2"]
    words += [f"paths.datasets={there}/datasets", f"paths.checkpoints={tmp_path}/checkpoints"]
    script = FULL.format(here=str(tmp_path), there=str(there), words=words)
    done = warm.run(["-c", script], kind="stages")
    if done.returncode == 77:
        pytest.skip("no namespaces: a file system of this test's own cannot be mounted")
    printed = done.stdout + done.stderr
    assert "the disk is full while writing" in printed and "Traceback" not in printed
    assert [line for line in done.stdout.splitlines() if line.startswith("ended")] == [
        "ended with 1", "ended with 0",
    ]  # fmt: skip
    assert "are answered already" in printed
    assert done.stdout.endswith("16 lines\n")
