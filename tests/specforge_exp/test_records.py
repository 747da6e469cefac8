"""Laws over all readers of JSON lines, and over all writers of what says that it is complete."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from instant_engine import Instant, answer_all, make_store, merged
from test_plan import write

from specforge_exp.artifacts import Fingerprint, writing
from specforge_exp.config import Config
from specforge_exp.data.blocks import cut, encode_block, make_chat
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.errors import InputError, first_line
from specforge_exp.generation.modal_calls import Journal
from specforge_exp.generation.plan import load_plan, make_plan, save_plan
from specforge_exp.generation.store import journal_entries
from specforge_exp.records import (
    cut_tail,
    digest_of,
    metric_lines,
    replacing,
    whole_lines,
    write_json,
)
from specforge_exp.report.table import written
from specforge_exp.training import mirror
from specforge_exp.training.checkpoint import Snapshot, save_checkpoint
from specforge_exp.training.feature_cache import write_shard
from specforge_exp.training.running import logged_seconds
from specforge_exp.training.tracking import best_step, open_tracker

METRICS = [
    b'{"step": 1, "seconds": 2.0, "loss": NaN, "eval/simulated_length": 3.0}\n',
    b'{"step": 2, "seconds": 3.0, "loss": 1.5, "eval/simulated_length": 2.0}\n',
]
CALLS = [
    b'{"call": "fc-1", "part": "a", "chunk": "c", "places": [0]}\n',
    b'{"call": "fc-2", "part": "b", "chunk": "c", "places": [1]}\n',
]
RESULTS = [b'0 {"id": "a", "error": "x"}\n', b'1 {"id": "b", "error": "x"}\n']


def kept_lines(file: Path) -> list[str]:
    """What a training that continues after step 2 leaves in the file."""
    open_tracker(Config(draft=Eagle3Config()), file.parent, 2)
    return file.read_text().splitlines()


def mirrored(file: Path) -> list[int]:
    with file.open() as lines:
        return [line["step"] for line in mirror.whole_lines(lines)]


READERS: dict[str, tuple[list[bytes], Callable[[Path], Any], Any]] = {
    "whole_lines": (METRICS, lambda file: [line["step"] for line in whole_lines(file)], [1, 2]),
    "best_step": (METRICS, lambda file: best_step(file.parent), 1),
    "logged_seconds": (METRICS, lambda file: logged_seconds(file.parent), 5.0),
    "open_tracker": (METRICS, kept_lines, [line.decode().strip() for line in METRICS]),
    "report": (METRICS, lambda file: [line["step"] for line in metric_lines(file)], [1, 2]),
    "mirror": (METRICS, mirrored, [1, 2]),
    "calls": (CALLS, lambda file: Journal(file).calls, {"a": "fc-1", "b": "fc-2"}),
    "results": (RESULTS, lambda file: [place for place, _, _ in journal_entries(file)], [0, 1]),
}
"""Every reader of lines that a running or killed process may have left: its lines, it, its answer.

Conversations are no such lines: their files are renamed when they are whole. A bad line there is
refused by name (test_preprocess), set aside (test_sources) or failed with its reason (test_plan).
"""


@pytest.mark.parametrize("name", READERS)
def test_a_cut_last_line_is_not_there_yet(tmp_path: Path, name: str) -> None:
    lines, reader, expected = READERS[name]
    file = tmp_path / "metrics.jsonl"
    for length in (0, 1, 14, len(lines[0]) - 2):  # all but the last: the object is not closed
        file.write_bytes(b"".join(lines) + lines[0][:length])
        assert reader(file) == expected, f"cut after {length} bytes"


@pytest.mark.parametrize("name", [name for name in READERS if name != "mirror"])
def test_a_cut_line_before_the_last_is_named(tmp_path: Path, name: str) -> None:
    lines, reader, _ = READERS[name]
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(lines[0][:14] + b"\n" + lines[1])
    with pytest.raises(InputError, match=r"metrics\.jsonl:1: "):
        reader(file)


PARTS = [name for name in READERS if name not in ("mirror", "whole_lines")]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "line", ["{}", '{"step": "x"}', '{"step": 1, "part": "a", "id": "a"}', "[]", "3"]
)
def test_a_whole_line_of_something_else_is_named(tmp_path: Path, name: str, line: str) -> None:
    """As the lines that it stands between: file, line and what helps."""
    lines, reader, _ = READERS[name]
    file = tmp_path / "metrics.jsonl"
    place = b"1 " if name == "results" else b""
    file.write_bytes(lines[0] + place + line.encode() + b"\n" + lines[1])
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: .*remove (that line|the file)"):
        reader(file)


def test_a_digest_is_of_names_contents_and_what_belongs_to_them() -> None:
    """Also of where one array ends and the next begins."""
    whole = np.arange(4)
    others = [
        digest_of({"a": whole[:2], "b": whole[2:]}),
        digest_of({"a": whole[:1], "b": whole[1:]}),
        digest_of({"a": whole[:2], "c": whole[2:]}),
        digest_of({"a": whole[2:], "b": whole[:2]}),
        digest_of({"a": whole[:2], "b": whole[2:]}, b"more"),
    ]
    assert len(set(others)) == 5
    assert digest_of({"b": np.arange(8)[4:8:2] // 2, "a": whole[:2]}) == others[0]


SECOND = re.compile(rb"T\d\d:\d\d:\d\d")
"""When a result was written, in it."""


def test_a_damaged_manifest_is_made_again_and_a_damaged_shard_named(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", "a", "b", "c")
    store = make_store(tmp_path / "out", source)
    answer_all(store, Instant())
    done, manifest = vars(store.counts), tmp_path / "out" / "manifest.jsonl"
    whole = manifest.read_bytes()
    for line in (b"{}\n", b"[]\n", b'{"shard": "x", "more": 1}\n', b"x\n"):
        manifest.write_bytes(line + whole)
        again = make_store(tmp_path / "out", source)
        assert vars(again.counts) == done and sorted(manifest.read_bytes()) == sorted(whole)
    shard = next((tmp_path / "out" / "shards").glob("*.jsonl"))
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"answer", b"unswer"))  # a result, but not what was written
    with pytest.raises(InputError, match=rf"{shard.name}: it was changed.*remove the file: only"):
        merged(make_store(tmp_path / "out", source))
    shard.unlink()
    again = make_store(tmp_path / "out", source)
    answer_all(again, Instant())
    anew = [SECOND.sub(b"", text) for text in (shard.read_bytes(), content)]
    assert anew[0] == anew[1] and len(merged(again)[0]) == 3
    shard.write_bytes(b"{}\n" + content)
    manifest.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: .*remove the file: only its"):
        make_store(tmp_path / "out", source)


def test_what_follows_a_cut_line_is_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    assert cut_tail(file) == []
    file.write_bytes(b"one\ntwo\nthr")
    assert cut_tail(file) == [b"one", b"two"]
    assert file.read_bytes() == b"one\ntwo\n"


def save_a_checkpoint(folder: Path, cfg: Config) -> None:
    tensors = {"weight": torch.zeros(2)}
    (folder / "metrics.jsonl").touch()
    save_checkpoint(folder, Snapshot(1, tensors, tensors, {}), Fingerprint({}, {}))


def test_a_checkpoint_that_a_kill_cut_short_goes(tmp_path: Path, cfg: Config) -> None:
    """Also one of a step that is not saved again: a signal had asked for it."""
    (tmp_path / "step-000037.partial").mkdir()
    save_a_checkpoint(tmp_path, cfg)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "step-000001"}


def make_an_artifact(folder: Path, cfg: Config) -> None:
    for _ in range(2):  # also over an older one
        with writing(folder / "thing", Fingerprint({}, {}), cfg, "prep") as partial:
            (partial / "below").mkdir()
            (partial / "below" / "content").write_text("x")


def write_a_plan(folder: Path, cfg: Config) -> None:
    source = write(folder / "train.jsonl", "a", "b")
    save_plan(make_plan(source, "", 1, None), folder / "plan")
    plan = load_plan(folder / "plan", source, "")
    assert plan is not None and len(plan) == 2


def answer_some(folder: Path, cfg: Config) -> None:
    answer_all(make_store(folder / "out", write(folder / "train.jsonl", "a", "b")), Instant())


def encode_some(folder: Path, cfg: Config) -> None:
    cfg.model = TINY
    file = folder / "train.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    good = {"id": "0", "conversations": messages}
    bad = {"id": "1", "conversations": messages[:1]}
    file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    encode_block(cut(file)[0], make_chat(cfg), cfg, folder)
    assert (folder / "train-000000.rejected.jsonl").exists()


def write_a_table(folder: Path, cfg: Config) -> None:
    with written(folder / "report.md") as file:
        file.write("x")


WRITERS: dict[str, Callable[[Path, Config], None]] = {
    "run.json": lambda folder, cfg: write_json(folder / "run.json", {"a": 1}),
    "artifact": make_an_artifact,
    "checkpoint": save_a_checkpoint,
    "plan": write_a_plan,
    "shards of answers": answer_some,
    "blocks": encode_some,
    "shards of states": lambda folder, cfg: write_shard(folder / "0", {"aux": torch.zeros(1)}, ""),
    "metrics": lambda folder, cfg: open_tracker(cfg, folder, 0) and None,
    "tracker.json": lambda folder, cfg: mirror.tell(folder, stopped=None),
    "report": write_a_table,
}


@pytest.mark.parametrize("name", WRITERS)
def test_content_is_on_the_disk_before_its_name(
    tmp_path: Path, name: str, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is renamed into place was synced with all that is in it, by content."""
    synced: dict[str, bytes] = {}
    renamed: list[str] = []
    fsync = os.fsync

    def spy_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced[path] = b"" if os.path.isdir(path) else Path(path).read_bytes()
        fsync(descriptor)

    def spying(rename: Callable[..., None]) -> Callable[..., None]:
        def spy(source: Any, target: Any) -> None:
            path = Path(source)
            if not str(target).endswith(".old"):  # moved aside, to be removed
                renamed.append(Path(target).name)
                files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
                for file in files:
                    assert synced.get(str(file)) == file.read_bytes(), f"{file} is not synced"
            rename(source, target)

        return spy

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spying(os.replace))
    monkeypatch.setattr(os, "rename", spying(os.rename))
    WRITERS[name](tmp_path, cfg)
    assert renamed
    assert not list(tmp_path.rglob("*.partial"))


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "record"
    file.write_text("old")

    def fail() -> None:
        with replacing(file) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["record"] and file.read_text() == "old"


def test_an_error_in_one_line() -> None:
    assert first_line(ValueError("  one\ntwo")) == "one"
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"
