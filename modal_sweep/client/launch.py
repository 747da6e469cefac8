"""One launch from end to end: plan, spawn, collect."""

import logging
from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from modal_sweep.client import messages, plan, preflight
from modal_sweep.client.collect import job_return
from modal_sweep.client.failures import advice, modal_errors
from modal_sweep.client.spawn import Spawner, spawn_jobs
from modal_sweep.client.table import Table
from modal_sweep.client.watch import Watch
from modal_sweep.protocol import payload
from modal_sweep.protocol.journal import Journal

log = logging.getLogger(__name__)


def launch(
    config: DictConfig,
    context: HydraContext,
    task: TaskFunction,
    overrides: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """Run the jobs of a multirun on Modal.

    Args:
        config: of the multirun, with the options of hydra/launcher=modal in `hydra.launcher`.
        overrides: of every job; they are numbered from `first`.

    Raises:
        SystemExit: after a dry run (0), a detached submission (0) or Ctrl-C (130).
        LaunchError: for what the user can mend, before anything is spawned.
    """
    sweep = plan.open_sweep(config, context, task)
    conf = sweep.conf
    if "optuna" in str(config.hydra.sweeper._target_).lower():
        plan.refuse_search(sweep)
    jobs = plan.plan_jobs(sweep, overrides, first)
    preflight.check_jobs(jobs)
    common = payload.pack(context, task)
    if conf.dry_run or conf.setup:
        messages.rehearse(jobs, conf, sweep.folder)
        raise SystemExit(0)
    journal = Journal(sweep.folder)
    with modal_errors(journal, lambda: advice(jobs[0])):
        spawner = Spawner(journal, conf, common)
        try:
            states = spawn_jobs(spawner, jobs)
            for job in jobs:
                log.info(f"\t#{job.number} : {' '.join(job.overrides)} ({states[job.identity]})")
            if conf.detach:
                messages.detached(journal)
                raise SystemExit(0)
            records = [journal.jobs[job.identity] for job in jobs]
            with Table(conf.prices) as table:
                ended = Watch(journal, table, conf.poll).collect(records)
        except KeyboardInterrupt:
            messages.detached(journal)
            raise SystemExit(130) from None
        messages.summary(journal, records)
        return [
            job_return(job, record, ended.get(job.identity), journal)
            for job, record in zip(jobs, records, strict=True)
        ]
