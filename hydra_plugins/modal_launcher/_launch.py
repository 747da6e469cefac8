"""One launch: compose, check, deploy, spawn, wait, bring back."""

import contextlib
import hashlib
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from omegaconf import OmegaConf, open_dict, read_write

from hydra_plugins.modal_launcher import (
    _code,
    _plan,
    _preflight,
    _report,
    _result,
    _settings,
    _state,
)
from hydra_plugins.modal_launcher._errors import JobFailed, LaunchError, ResultGone
from hydra_plugins.modal_launcher._journal import JobRecord, Journal
from hydra_plugins.modal_launcher.config import ModalLauncherConf

if TYPE_CHECKING:
    from hydra_plugins.modal_launcher._app import Functions
    from hydra_plugins.modal_launcher._calls import Ended
    from hydra_plugins.modal_launcher.launcher import ModalLauncher

log = logging.getLogger(__name__)


def launch(
    launcher: "ModalLauncher", job_overrides: Sequence[Sequence[str]], first: int
) -> Sequence[JobReturn]:
    """What `ModalLauncher.launch` does."""
    master, context, task = launcher.config, launcher.hydra_context, launcher.task_function
    assert master is not None and context is not None and task is not None
    setup_globals()
    configure_log(master.hydra.hydra_logging, master.hydra.verbose)
    conf = _settings.launcher_conf(master)
    refuse_search(conf, str(master.hydra.sweeper._target_))
    sweep_dir = Path(str(master.hydra.sweep.dir))
    sweep_dir.mkdir(parents=True, exist_ok=True)
    configs = _plan.compose(master, context, job_overrides, first)
    jobs = _plan.describe(configs, conf, _code.project_root(task), sweep_dir)
    _preflight.check_jobs(jobs)
    if conf.dry_run or conf.setup:
        _report.rehearse(jobs, conf, sweep_dir)
        raise SystemExit(0)
    with _report.modal_errors():
        from hydra_plugins.modal_launcher import _submit

        alike = _submit.alike(sweep_dir, _plan.pickled(jobs[0].config))
        common = _state.pack(context, task, alike)
        return run(jobs, conf, Shared(common, alike), sweep_dir)


def refuse_search(conf: ModalLauncherConf, sweeper: str) -> None:
    """A sweeper that needs every job's value cannot go on without the values."""
    for name in ("dry_run", "detach"):
        if getattr(conf, name) and "optuna" in sweeper.lower():
            raise LaunchError(
                f"hydra.launcher.{name}=true and {sweeper.rpartition('.')[2]} do not go together: "
                "it chooses the next jobs by the results of the last ones; "
                "leave one of them out (hydra/sweeper=basic for a dry run)"
            )


@dataclass(frozen=True)
class Shared:
    """What is sent once for all jobs of a launch."""

    common: bytes
    alike: bytes
    """Part of `common`: what the payloads are compressed against."""


def run(
    jobs: Sequence[_plan.Job], conf: ModalLauncherConf, shared: Shared, sweep_dir: Path
) -> list[JobReturn]:
    """Check against Modal, spawn, wait."""
    from hydra_plugins.modal_launcher import _app, _table, _watch

    journal = Journal(sweep_dir)
    functions = _app.Functions()
    try:
        with journal.locked():
            said = spawn_all(journal, jobs, conf, shared, functions)
        records = [journal.jobs[job.identity] for job in jobs]
        for job in jobs:
            overrides = " ".join(filter_overrides(job.overrides))
            log.info(f"\t#{job.number} : {overrides} ({said[job.identity]})")
        if conf.detach:
            _report.detached(journal, len(records))
            raise SystemExit(0)
        with _table.Table(conf.prices) as table:
            watch = _watch.Watch(journal, table, functions, conf.poll)
            ended = watch.wait(records)
    except KeyboardInterrupt:
        _report.interrupted(journal)
        raise SystemExit(130) from None
    _report.summary(journal, records)
    return [
        job_return(job, record, ended.get(job.identity), journal)
        for job, record in zip(jobs, records, strict=True)
    ]


def spawn_all(
    journal: Journal,
    jobs: Sequence[_plan.Job],
    conf: ModalLauncherConf,
    shared: Shared,
    functions: "Functions",
) -> dict[str, str]:
    """Check what is about to run, deploy, spawn; by identity: spawned, attached or done."""
    from hydra_plugins.modal_launcher import _app, _submit

    _submit.refuse_other_code(journal, jobs)
    fresh = [job for job in jobs if _submit.will_spawn(journal.jobs.get(job.identity), conf)]
    _preflight.check_secrets(fresh)
    for line in _preflight.check_requires(fresh, push=True):
        log.info(f"\tuploaded {line}")
    _preflight.check_cost(fresh, conf, ask=True)
    for name in _preflight.wanted_volumes(fresh, volume_name(conf)):
        _app.volume(name).hydrate()
    sweep = begin(journal, jobs, conf, shared.common)
    if fresh and _app.deploy(sweep["app"], jobs, {**conf.tags, "sweep": sweep["id"]}):
        log.info(f"\tdeployed {sweep['app']}")
    _submit.stage_common(journal, shared.common, sweep["common"])
    _submit.plan(journal, [_plan.plan_event(job, conf, sweep, shared.alike) for job in fresh])
    records = [journal.jobs[job.identity] for job in jobs]
    return _submit.submit(journal, records, conf, functions)


def volume_name(conf: ModalLauncherConf) -> str:
    """The Volume for outputs and results."""
    return conf.volume or f"{conf.app}-sweeps"


def begin(
    journal: Journal, jobs: Sequence[_plan.Job], conf: ModalLauncherConf, common: bytes
) -> dict[str, Any]:
    """The sweep's own line in the journal, written once; with this launch's app and common part."""
    from hydra_plugins.modal_launcher import _app

    if not journal.sweep:
        name = secrets.token_hex(6)
        journal.write(
            [
                {
                    "event": "sweep",
                    "id": name,
                    "dict": f"{conf.app}-sweep-{name}",
                    "volume": volume_name(conf),
                    "argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
                    "cwd": os.getcwd(),
                }
            ]
        )
    return {
        **journal.sweep,
        "app": _app.app_name(conf.app, jobs),
        "common": hashlib.sha256(common).hexdigest(),
        "max_containers": share_parallel(jobs, conf.max_parallel),
    }


def share_parallel(jobs: Sequence[_plan.Job], most: int | None) -> dict[str, int]:
    """Containers per kind of job, so that together they are at most `most`."""
    if most is None:
        return {}
    counts: dict[str, int] = {}
    for job in jobs:
        kind = _plan.job_kind(job.settings)
        counts[kind] = counts.get(kind, 0) + 1
    if len(counts) > most:
        raise LaunchError(
            f"hydra.launcher.max_parallel={most} but the jobs need {len(counts)} kinds of "
            "machines, which Modal limits one by one; raise it or launch the kinds separately"
        )
    shares = dict.fromkeys(counts, 1)
    for _ in range(most - len(counts)):
        kind = max(counts, key=lambda kind: counts[kind] / shares[kind])
        shares[kind] += 1
    return shares


def job_return(
    job: _plan.Job, record: JobRecord, ended: "Ended | None", journal: Journal
) -> JobReturn:
    """Hydra's record of a job, as `run_job` would have returned it here."""
    from hydra_plugins.modal_launcher._collect import output_dir

    config = job.config
    OmegaConf.set_readonly(config, False)
    with read_write(config.hydra), open_dict(config):
        config.hydra.runtime.output_dir = str(output_dir(journal, record).resolve())
        hydra = config.pop("hydra")
    # Composed configurations are large: they are handed over, not copied.
    hydra_cfg = OmegaConf.create({}, flags={"no_deepcopy_set_nodes": True})
    hydra_cfg["hydra"] = hydra
    end = record.end
    assert end is not None
    returned = JobReturn(
        overrides=list(hydra.overrides.task),
        cfg=config,
        hydra_cfg=hydra_cfg,
        working_dir=end["working_dir"] or os.getcwd(),
        task_name=end["task_name"] or str(hydra.job.name),
    )
    returned.status = JobStatus.FAILED
    if end["status"] != "completed":
        returned.return_value = JobFailed(_report.failure_text(journal, record))
        return returned
    try:
        returned.return_value = value_of(end, ended)
        returned.status = JobStatus.COMPLETED
    except JobFailed as error:
        returned.return_value = JobFailed(f"job {record.number}: {error}")
    return returned


def value_of(end: dict[str, Any], ended: "Ended | None") -> Any:
    """A completed job's return value; raises JobFailed when it is not to be had any more."""
    from hydra_plugins.modal_launcher import _calls

    if ended is None and "json" in (end["value"] or {"json": None}):
        return (end["value"] or {"json": None})["json"]
    if ended is None:
        with contextlib.suppress(ResultGone):
            ended = _calls.look(end["call"])
    if ended is None:
        raise JobFailed("its return value was kept in its call, which has expired")
    return _result.unpack_value(ended.envelope["value"], ended.trusted)
