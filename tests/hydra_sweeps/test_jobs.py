"""Jobs before they run: names, folders, environment, commands; and how they end alike."""

import itertools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import warm
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus, setup_globals

from hydra_sweeps import records
from hydra_sweeps.command import Terminated, raising_sigterm
from hydra_sweeps.errors import SweepError
from hydra_sweeps.grid.config import ExperimentSweeperConf
from hydra_sweeps.grid.names import named_jobs, place
from hydra_sweeps.jobs import Job, Source, check_environment, compose
from hydra_sweeps.processes import check_value
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.space import Search
from hydra_sweeps.study.state import named_job
from modal_sweep.errors import JobFailed
from modal_sweep.protocol.result import pack_value
from tests.study_app.here import composed, study
from tests.sweep_app.here import ENVIRONMENT, content, runs, started, sweep


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


@cache
def source_once(*overrides: str) -> Source:
    context, master = composed(Path("/nowhere"), *overrides)
    return Source(master, context)


def source(*overrides: str) -> Source:
    """To be read only."""
    setup_globals()  # `${hydra:...}`, which `fresh_hydra` has forgotten
    return source_once(*overrides)


def job(*overrides: str) -> Job:
    return compose(source(), overrides, 0)


def names(*points: str, key: str | None = "run_name") -> list[str]:
    options = ExperimentSweeperConf(name_key=key)
    return [j.subdir for j in named_jobs(source(), [point.split() for point in points], options)]


def test_names_that_one_file_system_takes_for_one() -> None:
    """They are told apart where a key names runs, else refused."""
    same = [f"run_name={name} x={number}" for number, name in enumerate(["a/b", "a//b", "A/./B"])]
    folders = names(*same)
    assert len({place(folder) for folder in folders}) == 3
    assert all(folder.lower().startswith("a/b_") for folder in folders)
    for number in (1, 2):
        with pytest.raises(SweepError, match=r"would both write to|folder of another run"):
            names(same[0], same[number], key=None)


def test_names_are_short_enough_and_the_same_on_every_start() -> None:
    long = [f"run_name={'n' * 300}{end}" for end in "xy"]
    folders = names(*long, f"run_name={'k' * 100}")
    assert [len(folder) for folder in folders] == [200, 200, 100]
    assert len({*folders}) == 3 and names(*long[1:]) == folders[1:2]
    with pytest.raises(SweepError, match="more than 255 bytes"):
        names(*long, key=None)


@pytest.mark.parametrize("name", ["n", "a b", "n_\\${x}", "1,2"])
def test_a_job_that_gets_a_name_is_as_composed_with_it(name: str) -> None:
    """In folders, records and commands, also where they are made of the overrides."""
    origin = source("hydra.sweep.subdir=${run_name}-${hydra:job.override_dirname}", "gamma=1")
    points = [[f"run_name='{name}'", f"x={x}"] for x in (1, 2)]
    jobs = named_jobs(origin, points, ExperimentSweeperConf(name_key="run_name"))
    search = Search(OptunaAsyncConf(name_key="run_name"), origin, None)  # type: ignore[arg-type]
    for found in [*jobs, named_job(search, points[0], 3)]:
        again = compose(origin, found.overrides, found.number)
        assert (found.config, found.subdir) == (again.config, again.subdir)
        assert found.digest() == again.digest() and "run_name=" in found.subdir


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", ".."])
def test_no_run_lies_outside_the_sweep(name: str) -> None:
    with pytest.raises(SweepError, match="outside the sweep's folder"):
        names(f"run_name={name}")


def test_names_of_trials_are_bounded_too(tmp_path: Path) -> None:
    long = f"run_name={'n' * 300}_\\${{x}}"
    study(tmp_path, "x=1,2", "hydra/sweeper/sampler=grid", long)
    folders = sorted(path.name for path in tmp_path.glob("nnn*"))
    assert [len(name) for name in folders] == [200, 200]
    assert {name[-7:] for name in folders} == {"_trial0", "_trial1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_never_a_job_that_cannot_be_composed(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives where a library's clean-up turns it into an error of its own."""
    origin, order = source(), list[str]()
    loader = origin.context.config_loader
    load = loader.load_sweep_config

    def fragile(*words: Any) -> Any:
        try:
            signal.raise_signal(number)
            return load(*words)
        except (KeyboardInterrupt, Terminated):
            raise UnboundLocalError("of the library") from None
        finally:
            order.append("composed")

    monkeypatch.setattr(loader, "load_sweep_config", fragile)
    with raising_sigterm(), pytest.raises((KeyboardInterrupt, Terminated)):
        compose(origin, [], 0)
    assert order == ["composed"]


def test_what_identifies_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values that it reads from the environment; without any, what is written."""
    plain = job("x=1")
    assert plain.digest() == job("x=1").digest()
    below = [job(f"+z={{a:{a},b:{b}}}").digest(["z.a", "nowhere.a"]) for a, b in ("11", "21", "22")]
    assert below[0] == below[1] != below[2]
    default = job("kind=${oc.env:LR_OF_MINE,9}")
    as_written = default.digest()
    assert default.environment() == {}
    either = job("kind=${oc.env:NEVER_SET_HERE,8}-${oc.env:LR_OF_MINE,9}")
    named = job("run_name=LR_OF_MINE", 'kind="${oc.env:${run_name},9}"')
    unset = [either.digest(), named.digest()]
    written = "${oc.decode:${oc.env:LR_OF_MINE}}"
    nested = "gamma='${oc.decode:${oc.env:LR_OF_MINE}}'"
    with pytest.raises(SweepError, match=r"gamma=.* of run 0 .*'LR_OF_MINE' not found"):
        check_environment([job(nested)], None)
    with pytest.raises(SweepError, match="'LR_OF_MINE' not found"):
        check_environment([job("x=1"), job(nested)], None)
    check_environment([job(nested)], None, ignore=["gamma"])
    given = job(nested, "+hydra.job.env_set.LR_OF_MINE='3'")
    assert given.environment() == {f"gamma={written}": 3.0}
    digests = set()
    for value in ("1", "7", "1"):
        monkeypatch.setenv("LR_OF_MINE", value)
        digests.add(job(nested).digest())
        assert job(nested).environment() == {f"gamma={written}": float(value)}
        assert default.digest() != as_written
        assert either.digest() != unset[0] and named.digest() != unset[1]
        assert job(nested).digest(["gamma"]) == job("x=1").digest(["gamma"])
    assert len(digests) == 2


def test_what_a_job_reads_identifies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, and all that folders hold but hide; of a large file so many blocks of it."""
    monkeypatch.setattr(records, "WHOLE", 32)
    monkeypatch.setattr(records, "BLOCK", 2)
    monkeypatch.chdir(tmp_path)
    names = f"hydra.sweeper.inputs=[{tmp_path}/one,[{tmp_path}/more,{tmp_path}/nowhere,'',null]]"
    read, seen = compose(source("hydra/sweeper=experiment", names), [], 0), list[str]()
    times = itertools.count(1)

    def other(name: str, text: str) -> bool:
        """Whether a file with this text, of a time of its own, makes it another job."""
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (moment := next(times), moment))
        seen.append(read.digest())
        return seen.count(seen[-1]) == 1

    for name in ("one", "more/b", "more/deep/a"):
        assert other(name, "x") and other(name, "y") and not other(name, "x")
    assert not any(other(name, "x") for name in ("two", "more/.hidden", "more/.git/index"))
    large = 100 * "x"
    assert other("more/b", large) and other("more/b", large + "x")
    assert not other("more/b", "xxyy" + 96 * "x")  # what lies between two blocks
    for at in (0, 6, 99):
        assert other("more/b", large[:at] + "y" + large[at + 1 :])


def test_values_of_interpolations_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tables a value is what the job got; but for secrets, which are not written down."""
    monkeypatch.setenv("A_TOKEN", "s3cr3t")
    typed = ["kind=${oc.env:LR_OF_MINE,9}", "x=3", "gamma=${x}", "run_name=${oc.env:A_TOKEN}"]
    assert job(*typed).resolved == ["kind=9", "x=3", "gamma=3.0", "run_name=${oc.env:A_TOKEN}"]
    given = job(*typed, "+hydra.job.env_set.LR_OF_MINE='3'")
    assert "s3cr3t" not in str(job("kind=${run_name}", typed[-1]).resolved)
    numbered = job("x=${gamma}", "+hydra.job.env_set.NUMBER='${hydra:job.num}'", "gamma=2")
    assert numbered.resolved[0] == "x=2.0"
    assert given.resolved[0] == "kind=3" and job("x=3", "kind=\\${x}").resolved == []
    notes = 'note="${oc.env:NOTE,9}",b'
    printed, _ = sweep(tmp_path, notes, "seed=${x}", environment={"NOTE": "5"})
    table = printed[printed.index("rank") :]
    assert "note=5" in table and "${oc.env" not in table and "seed" not in table
    first, second = content(tmp_path)["runs"]
    assert 'note="${oc.env:NOTE,9}"' in first["overrides"]
    assert {"note=5", "seed=1.0"} <= {*first["resolved"]} and second["resolved"]
    assert "oc.env:NOTE,9" in first["command"]


@pytest.mark.parametrize("name", ["SOME_TOKEN", "my_secret", "OPENAI_API_KEY", "AWS_CREDENTIALS"])
def test_secrets_are_not_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "s3cr3t")
    with pytest.raises(SweepError, match=f"env_copy={name} would write its value"):
        check_environment([compose(source(f"hydra.job.env_copy=[{name}]"), [], 0)], None)


def test_an_environment_counts(tmp_path: Path) -> None:
    """Another value runs again, the same is done, a missing variable starts nothing."""
    read = ['note="${oc.env:NOTE}"', "hydra.sweeper.ignore=[]", "x=1,2"]
    _, errors = sweep(tmp_path, *read, code=1)
    assert "'NOTE' not found" in errors and "Traceback" not in errors and not started(tmp_path)
    for note, count in [("a", 2), ("a", 2), ("b", 4)]:
        sweep(tmp_path, *read, environment={"NOTE": note})
        assert len(started(tmp_path)) == count
    secret = ["hydra.job.env_copy=[A_TOKEN]", "x=3"]
    _, errors = sweep(tmp_path, *secret, code=1, environment={"A_TOKEN": "s3cr3t"})
    assert "env_copy=A_TOKEN" in errors and "s3cr3t" not in errors
    assert not any(b"s3cr3t" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_commands_and_tables_are_whole(tmp_path: Path) -> None:
    """Hydra's own overrides are in a row's command; a row shows whatever differs."""
    extra = tmp_path / "extra" / "kind"
    extra.mkdir(parents=True)
    (extra / "found.yaml").write_text("name: value\n")
    options = [f"hydra.searchpath=[file://{tmp_path}/extra]", "hydra.job.chdir=true",
               "hydra.sweeper.name_key=null", "hydra.sweep.subdir=${hydra:job.num}",
               "hydra.sweep.dir=${hydra:runtime.cwd}/sweep"]  # fmt: skip
    printed, _ = sweep(tmp_path, "kind=found", "x=1,2", "seed=0,1", "note='a b'", *options)
    rows = [line.split()[1:4] for line in printed[printed.index("rank") :].splitlines()[1:]]
    assert sorted(rows) == [
        ["0", "x=1", "seed=0"], ["1", "x=1", "seed=1"], ["2", "x=2", "seed=0"],
        ["3", "x=2", "seed=1"],
    ]  # fmt: skip
    words = shlex.split(runs(tmp_path)["3"]["command"])
    assert words[-2:] == options[:2] and "-m" not in words and "note='a b'" in words
    alone = warm.run([*words[1:], f"hydra.run.dir={tmp_path}/alone"], tmp_path, ENVIRONMENT)
    assert alone.returncode == 0, alone.stderr
    assert len(started(tmp_path)) == 5 and (tmp_path / "alone").is_dir()
    assert content(tmp_path)["state"] == "complete"


@pytest.mark.parametrize("n_jobs", ["null", "2"])
def test_a_value_that_cannot_be_sent(tmp_path: Path, n_jobs: str) -> None:
    """Is a failure with the same reason one by one and in processes."""
    sweep(tmp_path, "kind=generates", f"hydra.sweeper.n_jobs={n_jobs}", code=1)
    [run] = runs(tmp_path).values()
    assert run["status"] == "failed"
    assert run["error"].startswith("the return value, a generator, cannot be sent: cannot pickle")


def values_of_any_kind() -> list[Any]:
    """What a task may return, in a function, so that some can be sent by cloudpickle alone."""
    return [1.0, None, {"a": [1, (2,)]}, threading.Lock(), {"held": threading.Lock()},
            (n for n in range(3)), lambda x: x, [lambda x: [x]], sys]  # fmt: skip


@pytest.mark.parametrize("number", range(len(values_of_any_kind())))
def test_one_law_of_values_here_and_on_modal(number: int) -> None:
    """What a launcher's container could send is a result here too, and the rest fails alike."""
    value = values_of_any_kind()[number]
    returned = JobReturn([], status=JobStatus.COMPLETED, _return_value=value)
    check_value(returned)
    try:
        pack_value(value)
    except JobFailed as error:
        assert returned.status == JobStatus.FAILED
        assert str(returned._return_value) == str(error)
    else:
        assert returned.status == JobStatus.COMPLETED and returned.return_value is value
