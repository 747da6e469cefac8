"""hydra/sweeper=optuna_async over hydra/launcher=modal: the study outlives its controller."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from modal_app import driver
from modal_local.client import LocalModal

from hydra_sweeps.study.trials import connection

pytestmark = pytest.mark.usefixtures("on_local_modal")
ACTS = ["value", "raises", "killed", "notanumber"]
POINTS = [
    ("value", 2), ("value", 3), ("raises", 5), ("killed", 5),
    ("notanumber", 5), ("value", 4), ("value", -1), ("value", 5),
]  # fmt: skip
STEPS = 12


def asked(sweep: Path, held: Path) -> list[str]:
    """The study: a few points, one of which nobody ends but the pruner."""
    options = [
        "hydra/sweeper=optuna_async", "hydra/launcher=modal", f"hydra.sweep.dir={sweep}",
        "hydra.sweep.subdir=${name}", "hydra.launcher.poll=0.2",
        "hydra.launcher.image.sources=[trial.py,standing.py]",
        "hydra.sweeper.direction=maximize", "hydra.sweeper.name_key=name",
        f"hydra.sweeper.n_trials={len(POINTS)}", "hydra.sweeper.n_jobs=3",
        "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1",
        "hydra.sweeper.progress_file=progress.jsonl", "hydra.sweeper.progress_metric=score",
        f"hydra.sweeper.warm_start={[f'act={act} x={x}' for act, x in POINTS]}",
    ]  # fmt: skip
    space = [f"act={','.join(ACTS)}", "x=range(-1,6)"]
    fixed = [f"steps={STEPS}", "pause=0.7", f"name={sweep.name}", f"hold={held}"]
    return [str(driver.APP / "trial.py"), "-m", *options, *space, *fixed]


def trials(sweep: Path) -> list[Any]:
    storage = connection(f"sqlite:///{sweep / 'study.db'}")  # waits for who writes meanwhile
    [summary] = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage).get_trials()


@pytest.mark.slow
def test_a_study_whose_controller_is_killed(
    tmp_path: Path, held: Path, control_plane: LocalModal
) -> None:
    sweep = tmp_path / "killed-study"
    waiting = {number: held / f"killed-study_trial{number}" for number in (0, 1, 4)}
    for file in waiting.values():
        file.write_text(str(STEPS - 1))
    process = driver.start(asked(sweep, held))
    driver.wait_for_steps(control_plane, sweep, jobs=3, steps=3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = driver.events(sweep, "spawn")
    orphans = [trial.number for trial in trials(sweep) if trial.state.name == "RUNNING"]
    assert len(before) >= 3 and len(orphans) >= 2

    process = driver.start(asked(sweep, held))
    while process.printed().count("] attached") < 2:
        assert process.poll() is None, process.printed()
        time.sleep(0.02)
    waiting[0].unlink()
    waiting[4].unlink()
    while trials(sweep)[0].state.name != "COMPLETE":  # or the better one may have it pruned
        assert process.poll() is None, process.printed()
        time.sleep(0.1)
    waiting[1].unlink()
    printed = driver.finish(process)
    spawned = driver.events(sweep, "spawn")
    assert spawned[: len(before)] == before and printed.count("] attached") >= 2
    assert len({event["identity"] for event in spawned}) == len(POINTS)
    assert {event["generation"] for event in spawned} == {0}
    told = trials(sweep)
    assert [trial.number for trial in told] == list(range(len(POINTS)))
    expected = ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "FAIL", "COMPLETE", "PRUNED", "COMPLETE"]
    assert [trial.state.name for trial in told] == expected
    assert [trial.value for trial in told if trial.state.name == "COMPLETE"] == [2, 3, 4, 5]
    names = {f"killed-study_trial{n}" for n, state in enumerate(expected) if state == "COMPLETE"}
    executed = driver.steps_by_call(names, control_plane)
    assert set(executed) == names
    assert all(list(calls.values()) == [list(range(STEPS))] for calls in executed.values())
    for trial in told:  # nothing that a job has said is lost, before the kill or after
        if trial.state.name == "COMPLETE":
            assert sorted(trial.intermediate_values) == list(range(STEPS))

    recorded = json.loads((sweep / "sweep.json").read_text())
    assert recorded["state"] == "complete"
    statuses = {run["number"]: run["status"] for run in recorded["runs"]}
    assert statuses == {
        trial.number: {"COMPLETE": "completed", "FAIL": "failed", "PRUNED": "pruned"}[
            trial.state.name
        ]
        for trial in told
    }
    errors = {run["number"]: run["error"] for run in recorded["runs"]}
    for number, reason in ((2, "a trial that raises"), (3, "signal 9"), (4, "NaN")):
        assert reason in errors[number]
    pruned = (sweep / "killed-study_trial6" / "progress.jsonl").read_text().splitlines()
    assert len(pruned) >= 2

    driver.run(asked(sweep, held))  # a study that is complete starts nothing
    assert driver.events(sweep, "spawn") == spawned
