"""Volumes, dicts, queues and secrets of the real client against the local control plane."""

import json
import sys
from pathlib import Path

import pytest

from modal_local.client import LocalModal
from modal_local.programs import Program, run_command
from modal_local.volumes import Checkout, Volume, VolumeFullError

pytest_plugins = ["modal_local.fixtures"]
pytestmark = pytest.mark.usefixtures("needs_modal")

APP = """
import json, os, sys
import modal

app = modal.App("volumes")
volume = modal.Volume.from_name("shared", create_if_missing=True, version=2)
part = modal.Volume.from_name("parts", create_if_missing=True, version=2)

@app.function(volumes={"/data/v": volume})
def write(name, commit=True):
    with open(f"/data/v/{name}", "w") as file:
        file.write(name)
    if commit:
        volume.commit()
    return sorted(os.listdir("/data/v"))

@app.function(volumes={"/data/v": volume}, max_containers=1, scaledown_window=60)
def look(name, reload):
    if reload:
        volume.reload()
    return os.path.exists(f"/data/v/{name}")

@app.function(volumes={"/data/v": volume})
def reload_with_open_file():
    with open("/data/v/open", "w"):
        volume.reload()

@app.function(volumes={"/jobs/7": part.with_mount_options(sub_path="jobs/7")})
def write_part():
    os.makedirs("/jobs/7/a/b")
    with open("/jobs/7/a/b/result", "w") as file:
        file.write("7")
    part.commit()

@app.function(volumes={"/all": part.with_mount_options(read_only=True)})
def read_part():
    try:
        open("/all/new", "w")
        refused = ""
    except OSError as error:
        refused = error.strerror
    return open("/all/jobs/7/a/b/result").read(), refused

@app.function(volumes={"/data/full": modal.Volume.from_name("full", create_if_missing=True)})
def fill():
    with open("/data/full/x", "w") as file:
        file.write("x")
    modal.Volume.from_name("full").hydrate().commit()
"""


def test_commit_and_reload(run_program: Program, isolated_modal: LocalModal) -> None:
    found = run_program(
        APP,
        """
        with app.run():
            out = {
                "before": look.remote("a", False),
                "written": write.remote("a"),
                "stale": look.remote("a", False),
                "fresh": look.remote("a", True),
            }
            try:
                reload_with_open_file.remote()
            except RuntimeError as error:
                out["open"] = str(error)
            write_part.remote()
            out["part"] = read_part.remote()
        out["outside"] = b"".join(part.read_file("jobs/7/a/b/result")).decode()
        print(json.dumps(out))
        """,
    )
    assert (found["before"], found["stale"], found["fresh"]) == (False, False, True)
    assert "open files" in found["open"]
    assert found["part"] == ["7", "Read-only file system"]
    assert found["outside"] == "7"


def test_full_volume(run_program: Program, isolated_modal: LocalModal) -> None:
    run_program(APP, 'modal.Volume.from_name("full", create_if_missing=True).hydrate(); print(1)')
    isolated_modal.full_volume("full")
    main = """
        out = []
        volume = modal.Volume.from_name("full")
        with app.run():
            try:
                out.append(fill.remote())
            except Exception as error:
                out.append(str(error))
        try:
            with volume.batch_upload(force=True) as batch:
                batch.put_file(__file__, "/program.py")
            out.append(None)
        except Exception as error:
            out.append(str(error))
        print(json.dumps(out))
        """
    found = run_program(APP, main)
    assert all("volume 'full' is full" in text for text in found)
    isolated_modal.full_volume("full", False)
    assert run_program(APP, main) == [None, None]


def test_files_from_outside(run_program: Program, local_modal: LocalModal, tmp_path: Path) -> None:
    found = run_program(
        "import json, io, modal",
        """
        out = {}
        for version in (1, 2):
            name = f"outside{version}"
            volume = modal.Volume.from_name(name, create_if_missing=True, version=version)
            with volume.batch_upload() as batch:
                batch.put_file(io.BytesIO(b"z" * (9 << 20)), "/a/big")
                batch.put_file(io.BytesIO(b"small"), "/a/small")
            volume.copy_files(["/a/small"], "/a/copy")
            paths = sorted(e.path for e in volume.listdir("/", recursive=True))
            copied = b"".join(volume.read_file("/a/copy")).decode()
            volume.remove_file("/a", recursive=True)
            out[name] = [paths, copied, list(e.path for e in volume.iterdir("/"))]
            try:
                list(volume.read_file("/a/small"))
            except FileNotFoundError:
                out[name].append("gone")
        modal.Volume.objects.create("made", version=2)
        out["made"] = "made" in [v.name for v in modal.Volume.objects.list()]
        modal.Volume.objects.delete("made")
        out["deleted"] = "made" not in [v.name for v in modal.Volume.objects.list()]
        print(json.dumps(out))
        """,
    )
    expected = [["a", "a/big", "a/copy", "a/small"], "small", [], "gone"]
    assert found == {"outside1": expected, "outside2": expected, "made": True, "deleted": True}

    def cli(*arguments: str) -> str:
        command = [sys.executable, "-m", "modal", "volume", *arguments]
        return run_command(local_modal, command, tmp_path)

    (tmp_path / "up").write_text("up")
    cli("put", "outside2", "up", "/x/up")
    assert "x/up" in cli("ls", "outside2", "/x")
    cli("get", "outside2", "/x/up", "down")
    assert (tmp_path / "down").read_text() == "up"
    cli("rm", "outside2", "/x/up")


def test_secrets_dicts_and_queues(
    run_program: Program, local_modal: LocalModal, tmp_path: Path
) -> None:
    found = run_program(
        """
        import json, os, modal
        app = modal.App("objects")

        @app.function(secrets=[modal.Secret.from_name("token", required_keys=["TOKEN"])])
        def token():
            return os.environ["TOKEN"], os.environ.get("HOST_ONLY")
        """,
        """
        os.environ["HOST_ONLY"] = "1"
        out = {}
        with app.run():
            out["token"] = token.remote()
        try:
            modal.Secret.from_name("token", required_keys=["OTHER"]).hydrate()
        except modal.exception.NotFoundError as error:
            out["lacks"] = str(error)
        modal.Secret.objects.create("made", {"A": "1"})
        names = [s.name for s in modal.Secret.objects.list()]
        modal.Secret.objects.delete("made")
        out["secrets"] = ["made" in names, "made" in [s.name for s in modal.Secret.objects.list()]]
        d = modal.Dict.from_name("d", create_if_missing=True)
        d["k"] = [1]
        out["put"] = [d.put("k", 2, skip_if_exists=True), d.put("n", 3, skip_if_exists=True)]
        out["items"] = sorted((k, str(v)) for k, v in d.items())
        out["keys"] = [sorted(d.keys()), d.pop("k"), d.len(), d.contains("k")]
        d.clear()
        out["dicts"] = "d" in [x.name for x in modal.Dict.objects.list()]
        modal.Dict.objects.delete("d")
        out["left"] = "d" in [x.name for x in modal.Dict.objects.list()]
        with modal.Queue.ephemeral() as queue:
            queue.put_many([1, 2, 3])
            out["queue"] = [list(queue.iterate()), queue.get(), queue.get_many(5), queue.len()]
        print(json.dumps(out))
        """,
    )
    assert found["token"] == ["t-1", None]
    assert "OTHER" in found["lacks"]
    assert found["secrets"] == [True, False]
    assert found["put"] == [False, True]
    assert found["items"] == [["k", "[1]"], ["n", "3"]]
    assert found["keys"] == [["k", "n"], [1], 1, False]
    assert (found["dicts"], found["left"]) == (True, False)
    assert found["queue"] == [[1, 2, 3], 1, [2, 3], 0]
    command = [sys.executable, "-m", "modal", "secret"]
    run_command(local_modal, [*command, "create", "cli", "A=1"], tmp_path)
    listed = run_command(local_modal, [*command, "list", "--json"], tmp_path)
    assert "cli" in json.dumps(json.loads(listed))


def test_checkouts_pull_only_what_changed(tmp_path: Path) -> None:
    volume = Volume("vo-1", "v", 2, tmp_path / "root")
    one, two = (Checkout(volume, "", tmp_path / name) for name in ("one", "two"))
    (one.work / "folder").mkdir()
    (one.work / "folder" / "file").write_text("1")
    assert one.commit() == 2
    assert one.commit() == 0
    assert two.pull() == 2
    assert two.pull() == 0
    (two.work / "folder" / "file").write_text("two")
    assert (two.commit(), one.pull(), two.pull()) == (1, 1, 0)
    assert (one.work / "folder" / "file").read_text() == "two"
    (one.work / "folder" / "file").unlink()
    (one.work / "folder").rmdir()
    assert (one.commit(), two.pull()) == (2, 2)
    assert list(two.work.iterdir()) == []


def test_copies_of_clean_containers_are_used_again(tmp_path: Path) -> None:
    volume = Volume("vo-1", "v", 2, tmp_path / "root")
    first = volume.checkout("", tmp_path / "one")
    (first.work / "file").write_text("1")
    first.commit()
    first.release(clean=True)
    second = volume.checkout("", tmp_path / "two")
    assert second is first
    (second.work / "file").write_text("uncommitted")
    second.release(clean=True)
    third = volume.checkout("", tmp_path / "three")
    assert third is not first
    assert (third.work / "file").read_text() == "1"


def test_full_volume_keeps_what_it_has(tmp_path: Path) -> None:
    volume = Volume("vo-1", "v", 2, tmp_path / "root")
    checkout = volume.checkout("", tmp_path / "one")
    (checkout.work / "file").write_text("1")
    volume.full = True
    with pytest.raises(VolumeFullError, match="'v' is full"):
        checkout.commit()
    volume.full = False
    assert checkout.commit() == 1


def test_paths_cannot_leave_a_volume(tmp_path: Path) -> None:
    volume = Volume("vo-1", "v", 2, tmp_path / "root")
    with pytest.raises(ValueError, match="escapes"):
        volume.path("../other")
