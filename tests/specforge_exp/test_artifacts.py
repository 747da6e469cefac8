"""Write-once artifacts: nothing half-written is ever taken for whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from damage import DAMAGES, damaged
from hypothesis import given
from hypothesis import strategies as st

from specforge_exp import artifacts, paths
from specforge_exp.artifacts import (
    Fingerprint,
    another,
    changed_target,
    check,
    differing,
    model_digest,
    reusable,
    writing,
)
from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.inputs import require

ONE = Fingerprint({"the input": "abc"}, {"lr": 1, "names": ["a"]})
TWO = Fingerprint({"the input": "xyz"}, {"lr": 2, "names": ["a"]})


def make(folder: Path, cfg: Config, fingerprint: Fingerprint = ONE, text: str = "done") -> None:
    with writing(folder, fingerprint, cfg, "prep") as partial:
        (partial / "content").write_text(text)


def test_complete_is_reused_and_says_what_made_it(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    assert not reusable(folder / "run.json", ONE, False, "prep")
    make(folder, cfg)
    assert reusable(folder / "run.json", ONE, False, "prep")
    record = json.loads((folder / "run.json").read_text())
    assert set(record) >= {
        "command",
        "config",
        "git",
        "code",
        "packages",
        "machine",
        "inputs",
        "settings",
        "seconds",
    }
    assert {"python", "torch", "transformers"} <= set(record["packages"])
    assert record["config"]["model"]["name"] == "tiny"
    assert not folder.with_name("thing.partial").exists()


def test_what_has_changed_is_named(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    make(folder, cfg)
    with pytest.raises(InputError) as caught:
        reusable(folder / "run.json", TWO, False, "prep")
    assert "lr was 1, now 2" in str(caught.value)
    assert "the input has changed" in str(caught.value)
    assert "names" not in str(caught.value).split(";")[0]
    assert "prep.force=true" in str(caught.value)
    assert not reusable(folder / "run.json", TWO, True, "prep")


NAMED = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["x", "y"]), max_size=4)


@given(NAMED, NAMED, NAMED, NAMED)
def test_what_is_not_there_any_more_has_changed_too(
    settings: dict[str, Any], inputs: dict[str, str], held: dict[str, Any], read: dict[str, str]
) -> None:
    """An artifact is of today's options and inputs, all of them and no others."""
    record = {"settings": held, "inputs": read}
    changes = Fingerprint(inputs, settings).changes(record)
    assert (not changes) == (settings == held and inputs == read)
    reverse = Fingerprint(read, held).changes({"settings": settings, "inputs": inputs})
    assert len(changes) == len(reverse)


def test_an_option_that_is_null_by_itself_is_no_change() -> None:
    """Options that are new since a record was written."""
    assert Fingerprint({}, {"a": None}).changes({"settings": {}}) == []
    assert Fingerprint({}, {}).changes({"settings": {"a": None}}) == []
    assert differing({}, {"settings": {"a": 1}}, ()) == []


def test_interrupted_leaves_no_artifact(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"

    def interrupted() -> None:
        with writing(folder, ONE, cfg, "prep") as partial:
            (partial / "content").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not folder.exists()
    make(folder, cfg)
    assert (folder / "content").read_text() == "done"


def test_a_failed_remake_keeps_the_old_one(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    make(folder, cfg, text="old")

    def fails() -> None:
        with writing(folder, TWO, cfg, "prep") as partial:
            (partial / "content").write_text("new")
            raise InputError("no")

    with pytest.raises(InputError):
        fails()
    assert (folder / "content").read_text() == "old"
    make(folder, cfg, TWO, "new")
    assert (folder / "content").read_text() == "new"
    assert not folder.with_name("thing.old").exists()


def interrupted(folder: Path, fingerprint: Fingerprint, cfg: Config) -> list[str]:
    """Work that is there when a run begins that is stopped before its end."""
    with (
        pytest.raises(KeyboardInterrupt),
        writing(folder, fingerprint, cfg, "regen", "shards/*") as partial,
    ):
        (partial / "shards").mkdir(exist_ok=True)
        (partial / "plan").write_text("made in a second")
        before = [file.name for file in (partial / "shards").iterdir()]
        (partial / "shards" / str(len(before))).write_text("hours")
        raise KeyboardInterrupt
    return sorted(before)


def test_hours_of_work_are_given_up_by_force_only(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    assert interrupted(folder, ONE, cfg) == []
    assert interrupted(folder, ONE, cfg) == ["0"]
    for _ in range(2):
        with pytest.raises(InputError) as refused:
            interrupted(folder, TWO, cfg)
        for words in (
            "thing.partial",
            "lr was 1, now 2",
            "with those",
            "regen.force=true",
            "data.name",
        ):
            assert words in str(refused.value)
    assert interrupted(folder, ONE, cfg) == ["0", "1"]
    cfg.regen.force = True
    assert interrupted(folder, ONE, cfg) == ["0", "1", "2"]  # its own, also of a forced run
    assert interrupted(folder, TWO, cfg) == []
    cfg.regen.force = False
    begun = folder.with_name("thing.partial") / "begun.json"
    for content in ("", "{}", "[]"):
        begun.write_text(content)
        with pytest.raises(InputError, match=r"nobody knows .* regen\.force=true"):
            interrupted(folder, TWO, cfg)
    (begun.parent / "shards" / "0").unlink()
    assert interrupted(folder, ONE, cfg) == []  # nothing was there but what is made in a second


def test_what_a_kill_has_cut_short_is_no_part_of_it(tmp_path: Path, cfg: Config) -> None:
    """safetensors' own half files and those of `replacing`, beside work that is continued."""
    folder = tmp_path / "thing"
    interrupted(folder, ONE, cfg)
    for name in (".tmpAbCd", "index.json.1.partial"):
        (folder.with_name("thing.partial") / name).write_text("half")
    with writing(folder, ONE, cfg, "regen", "shards/*") as partial:
        (partial / "content").write_text("whole")
    assert sorted(file.name for file in folder.iterdir()) == ["content", "plan", "run.json"]
    assert [*artifacts.read_record(folder / "run.json")["files"]] == ["content", "plan"]


def test_what_is_made_in_seconds_is_made_again(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    for again in (ONE, TWO):
        with pytest.raises(KeyboardInterrupt), writing(folder, ONE, cfg, "export") as partial:
            (partial / "content").write_text("half")
            raise KeyboardInterrupt
        with writing(folder, again, cfg, "export") as partial:
            assert [file.name for file in partial.iterdir()] == ["begun.json"]


@pytest.mark.parametrize("at", ["finish", "sync_tree", "replace_folder", "sync"])
def test_killed_at_the_very_end(
    tmp_path: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """What has its run.json is whole: it is finished, even by a forced command, never made again
    nor given up for other options."""
    folder = tmp_path / "thing"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, at, killed)
        with (
            pytest.raises(KeyboardInterrupt),
            writing(folder, ONE, cfg, "regen", "shards/*") as partial,
        ):
            (partial / "shards").mkdir()
            (partial / "shards" / "0").write_text("hours")
            (partial / "content").write_text("hours")
    if partial.exists():
        assert not reusable(folder / "run.json", TWO, False, "regen")
        with (
            pytest.raises(InputError, match="unfinished work of other options"),
            writing(folder, TWO, cfg, "regen", "shards/*"),
        ):
            pass
    assert reusable(folder / "run.json", ONE, partial.exists(), "regen")
    assert sorted(file.name for file in folder.iterdir()) == ["content", "run.json"]


def test_who_reads_the_folder_reads_its_files(tmp_path: Path, cfg: Config) -> None:
    """safetensors makes files that nobody else may read."""
    with writing(tmp_path / "thing", ONE, cfg, "export") as partial:
        (partial / "in").mkdir()
        for file in (partial / "model.safetensors", partial / "in" / "more"):
            file.touch(0o600)
        partial.chmod(0o750)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "thing").rglob("*")}
    assert (modes["model.safetensors"], modes["more"]) == (0o640, 0o640)


def test_one_writer(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    with writing(folder, ONE, cfg, "prep") as partial:
        (partial / "content").write_text("first")
        with pytest.raises(InputError, match=f"another process writes {folder}: process"):
            make(folder, cfg, TWO)
    assert (folder / "content").read_text() == "first"


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["content", "run.json"])
def test_damage_is_seen(tmp_path: Path, cfg: Config, name: str, how: str) -> None:
    folder = tmp_path / "thing"
    make(folder, cfg, text="a long text")
    check(folder, "python prep.py")
    file = folder / name
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(InputError, match=rf"{name} .*make it again with: python prep\.py"):
        check(folder, "python prep.py")
    with pytest.raises(InputError, match=r"make it again with.*prep\.force=true"):
        reusable(folder / "run.json", ONE, False, "prep")


def test_a_large_file_is_compared_in_places(
    tmp_path: Path, cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "WHOLE", 1000)
    monkeypatch.setattr(artifacts, "BLOCK", 10)
    folder = tmp_path / "thing"
    make(folder, cfg, text="a" * 2000)
    assert (
        "sha256 of 16 blocks" in json.loads((folder / "run.json").read_text())["files"]["content"]
    )
    for place in (0, 1999):
        check(folder, "python prep.py")
        (folder / "content").write_text("a" * place + "b" + "a" * (1999 - place))
        with pytest.raises(InputError, match=r"content is damaged \(2000 bytes, "):
            check(folder, "python prep.py")
        (folder / "content").write_text("a" * 2000)


def test_older_artifacts_are_taken_as_they_are(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "thing"
    make(folder, cfg)
    record = json.loads((folder / "run.json").read_text())
    del record["files"], record["sha256"]
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "content").write_text("by hand")
    assert reusable(folder / "run.json", ONE, False, "prep")
    (folder / "run.json").unlink()
    check(folder, "python prep.py")


def test_full_disk_is_one_clear_line(tmp_path: Path, cfg: Config) -> None:
    """/dev/full answers every write with the real error of a full disk."""
    folder = tmp_path / "thing"
    make(folder, cfg, text="old")

    def fills() -> None:
        with writing(folder, TWO, cfg, "prep") as partial:
            (partial / "content").symlink_to("/dev/full")
            (partial / "content").write_text("x" * 100_000)

    with pytest.raises(InputError, match="disk is full"):
        fills()
    assert (folder / "content").read_text() == "old"


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("{")
    with pytest.raises(InputError, match=r"run\.json"):
        reusable(file, ONE, False, "prep")


def test_a_missing_input_names_all_commands_that_are_missing(cfg: Config) -> None:
    def said(stage: str) -> str:
        with pytest.raises(InputError) as missing:
            require(cfg, stage, "train.jsonl")
        return str(missing.value).partition("make it with: ")[2]

    assert said("prep").startswith("python prep.py (with the same options)")
    assert said("preprocess").startswith("python prep.py, python regen.py, python preprocess.py (")
    assert said("regen").endswith("preprocess.source=prep does without regen.py")
    prompts = paths.prompts_dir(cfg)
    prompts.mkdir(parents=True)
    (prompts / "train.jsonl").write_text("")
    assert require(cfg, "prep", "train.jsonl") == prompts
    assert said("preprocess").startswith("python regen.py, python preprocess.py (")
    cfg.preprocess.source = "prep"
    assert said("export") == (
        "python preprocess.py, python train.py, python export.py (with the same options)"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_target_trained_further_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its weights have the names and the sizes that they had, and too many bytes to read all."""
    monkeypatch.setattr(artifacts, "WHOLE", 1000)
    monkeypatch.setattr(artifacts, "BLOCK", 64)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(bytes(5000))
    before = model_digest(str(tmp_path))
    assert before == model_digest(str(tmp_path))
    (tmp_path / name).write_bytes(bytes([1]) * 5000)
    assert before != model_digest(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["vocab.txt", "merges.txt", "qwen.tiktoken", "additional_chat_templates/tool_use.jinja"]
)
def test_a_target_with_another_tokenizer_is_another(tmp_path: Path, name: str) -> None:
    """Of whatever files it is made; where tokenizer.json is, nobody reads the words beside it."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("one")
    before = model_digest(str(tmp_path))
    (tmp_path / name).write_text("two")
    assert before != (after := model_digest(str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    whole = model_digest(str(tmp_path))
    (tmp_path / name).write_text("one")
    assert (model_digest(str(tmp_path)) == whole != after) == (not name.endswith("jinja"))


def test_a_hub_id_is_known_by_its_files_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as they are there: other weights are another model, another README is none."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--a--model"

    def at_commit(letter: str, **files: str) -> str:
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text(letter * 40)
        for name, text in files.items():
            file = root / "snapshots" / (letter * 40) / name.replace("_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return model_digest("a/model")

    bare = model_digest("a/model")
    known = at_commit("a", config_json="{}")
    whole = at_commit("a", model_safetensors="weights")
    said = at_commit("b", config_json="{}", model_safetensors="weights", README_md="words")
    moved = at_commit("c", config_json="{}", model_safetensors="others")
    assert bare == "a/model" and said == whole
    before = {"inputs": {"the target": bare}}
    for digest in (known, whole, moved):
        assert not Fingerprint({"the target": digest}, {}).changes(before)
    assert another(whole, moved) and another("b/model", whole) and not another(known, moved)
    assert not another(whole, known)
    assert changed_target({"inputs": {"the target": whole}}, "a/model")
    for inputs in ({"the target": moved}, {"the target": bare}, {}):
        assert changed_target({"inputs": inputs}, "a/model") == []
    for path in ("a/b/c", str(tmp_path / "nowhere")):
        assert model_digest(path) == path
