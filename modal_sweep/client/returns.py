"""What Hydra gets for a job that has ended."""

import contextlib
import os
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf, open_dict, read_write

from modal_sweep.client.calls import look
from modal_sweep.client.collect import output_dir
from modal_sweep.client.messages import failure_text
from modal_sweep.client.plan import Job
from modal_sweep.errors import JobFailed, ResultGone
from modal_sweep.protocol import result
from modal_sweep.protocol.journal import JobRecord, Journal


def job_return(
    job: Job, record: JobRecord, envelope: dict[str, Any] | None, journal: Journal
) -> JobReturn:
    """Hydra's record of a job, as `run_job` would have returned it here.

    Args:
        envelope: of its result, where this process has it.
    """
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
    if record.broken:
        returned.return_value = JobFailed(failure_text(journal, record))
        return returned
    try:
        returned.return_value = value_of(end, envelope)
        returned.status = JobStatus.COMPLETED
    except JobFailed as error:
        returned.return_value = JobFailed(f"job {record.number}: {error}")
    return returned


def value_of(end: dict[str, Any], envelope: dict[str, Any] | None) -> Any:
    """A completed job's return value; raises JobFailed when it is not to be had any more."""
    packed = end["value"] or {"json": None}
    if "json" not in packed:  # too large for the journal, or no JSON
        with contextlib.suppress(ResultGone):
            envelope = envelope or look(end["call"])
        packed = envelope["value"] if envelope else packed
    return result.unpack_value(packed)
