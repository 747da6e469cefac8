"""One launch: compose, check, deploy, spawn, wait, bring back."""

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from modal_sweep.client import code, messages, plan, preflight, settings
from modal_sweep.config import ModalLauncherConf
from modal_sweep.errors import JobFailed, LaunchError, ResultGone
from modal_sweep.protocol import payload, result
from modal_sweep.protocol.journal import JobRecord, Journal

if TYPE_CHECKING:
    from hydra_plugins.modal_launcher.launcher import ModalLauncher
    from modal_sweep.client.calls import Ended
    from modal_sweep.client.prepare import Spawner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What Hydra hands to the launcher, and what is kept for all jobs."""

    master: DictConfig
    context: HydraContext
    task: TaskFunction
    conf: ModalLauncherConf
    sweep_dir: Path
    packed: dict[str, plan.Packed] = field(default_factory=dict)


def launch(
    launcher: "ModalLauncher", job_overrides: Sequence[Sequence[str]], first: int
) -> Sequence[JobReturn]:
    """What `ModalLauncher.launch` does."""
    asked = opened(launcher)
    if "optuna" in (sweeper := str(asked.master.hydra.sweeper._target_)).lower():
        refuse_search(asked.conf, sweeper)
    jobs = composed(asked, job_overrides, first)
    preflight.check_jobs(jobs)
    if asked.conf.dry_run or asked.conf.setup:
        messages.rehearse(jobs, asked.conf, asked.sweep_dir)
        raise SystemExit(0)
    with messages.modal_errors():
        return run(jobs, spawner(asked, Journal(asked.sweep_dir), jobs[0]))


def opened(launcher: "ModalLauncher") -> Asked:
    """Take over what Hydra has set up; makes the sweep's directory."""
    master, context, task = launcher.config, launcher.hydra_context, launcher.task_function
    assert master is not None and context is not None and task is not None
    setup_globals()
    configure_log(master.hydra.hydra_logging, master.hydra.verbose)
    sweep_dir = Path(str(master.hydra.sweep.dir))
    asked = Asked(master, context, task, settings.launcher_conf(master), sweep_dir)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    return asked


def composed(asked: Asked, job_overrides: Sequence[Sequence[str]], first: int) -> list[plan.Job]:
    """The jobs of these overrides, numbered from `first`."""
    configs = plan.compose(asked.master, asked.context, job_overrides, first)
    root = code.project_root(asked.task)
    return plan.describe(configs, asked.conf, root, asked.sweep_dir, asked.packed)


def spawner(asked: Asked, journal: Journal, first: plan.Job, search: bool = False) -> "Spawner":
    """What spawns the jobs of this process."""
    from modal_sweep.client import prepare, spawn

    alike = spawn.alike(asked.sweep_dir, plan.pickled(first.config))
    common = payload.pack(asked.context, asked.task, alike)
    return prepare.Spawner(journal, asked.conf, common, alike, search)


def refuse_search(conf: ModalLauncherConf, sweeper: str) -> None:
    """A sweeper that needs every job's value cannot go on without the values."""
    for name in ("dry_run", "detach"):
        if getattr(conf, name):
            raise LaunchError(
                f"hydra.launcher.{name}=true and {sweeper.rpartition('.')[2]} do not go together: "
                "it chooses the next jobs by the results of the last ones; "
                "leave one of them out (hydra/sweeper=basic for a dry run)"
            )


def run(jobs: Sequence[plan.Job], spawner: "Spawner") -> list[JobReturn]:
    """Check against Modal, spawn, wait."""
    from modal_sweep.client import prepare
    from modal_sweep.client import table as _table
    from modal_sweep.client import watch as _watch

    journal, conf = spawner.journal, spawner.conf
    try:
        said = prepare.spawn_all(spawner, jobs)
        records = [journal.jobs[job.identity] for job in jobs]
        for job in jobs:
            overrides = " ".join(filter_overrides(job.overrides))
            log.info(f"\t#{job.number} : {overrides} ({said[job.identity]})")
        if conf.detach:
            messages.detached(journal)
            raise SystemExit(0)
        with _table.Table(conf.prices) as table:
            watch = _watch.Watch(journal, table, spawner.functions, conf.poll)
            ended = watch.wait(records)
    except KeyboardInterrupt:
        messages.detached(journal)
        raise SystemExit(130) from None
    messages.summary(journal, records)
    return [
        job_return(job, record, ended.get(job.identity), journal)
        for job, record in zip(jobs, records, strict=True)
    ]


def job_return(
    job: plan.Job, record: JobRecord, ended: "Ended | None", journal: Journal
) -> JobReturn:
    """Hydra's record of a job, as `run_job` would have returned it here."""
    from modal_sweep.client.collect import output_dir

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
        overrides=list(hydra.overrides.task._iter_ex(resolve=False)),
        cfg=config,
        hydra_cfg=hydra_cfg,
        working_dir=end["working_dir"] or os.getcwd(),
        task_name=end["task_name"] or str(hydra.job.name),
    )
    returned.status = JobStatus.FAILED
    if end["status"] != "completed":
        returned.return_value = JobFailed(messages.failure_text(journal, record))
        return returned
    try:
        returned.return_value = value_of(end, ended)
        returned.status = JobStatus.COMPLETED
    except JobFailed as error:
        returned.return_value = JobFailed(f"job {record.number}: {error}")
    return returned


def value_of(end: dict[str, Any], ended: "Ended | None") -> Any:
    """A completed job's return value; raises JobFailed when it is not to be had any more."""
    from modal_sweep.client import calls

    held = end["value"] or {"json": None}
    if ended is None and "json" not in held:
        with contextlib.suppress(ResultGone):
            ended = calls.look(end["call"])
    if ended is None:
        return result.unpack_value(held, trusted=False)
    return result.unpack_value(ended.envelope["value"], ended.trusted)
