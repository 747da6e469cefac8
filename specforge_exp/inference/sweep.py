"""One fleet for the runs of a sweep: the sweep's process starts another, which has it.

Jobs are forked from the sweep's process, so that may not be in a cluster itself. Loads no torch.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from omegaconf import DictConfig

from specforge_exp.config import Config, from_omegaconf
from specforge_exp.errors import InputError
from specforge_exp.inference import FLEET

TOKEN = "RAY_AUTH_TOKEN"


@contextmanager
def fleet_of_sweep(
    stage: str, jobs: Sequence[DictConfig], folder: Path, places: int | None
) -> Iterator[None]:
    """What hydra.sweeper.around names: a fleet for jobs with target.share=sweep, while they run.

    Args:
        stage: the script's name.
        jobs: configurations of what is to run.
        folder: of the sweep's record.
        places: processes at a time on this machine; None: jobs run otherwise.

    Raises:
        InputError: they cannot share one, or it does not start.
    """
    if stage != "train" or not any(job.target.share == "sweep" for job in jobs):
        yield
        return
    configs = []
    for job in jobs:
        with suppress(InputError):  # it fails alone
            configs.append(from_omegaconf(job))
    share = [cfg.target.share == "sweep" and not cfg.target.dry_run for cfg in configs]
    if not any(share):
        yield
        return
    if not all(share):
        raise InputError("target.share=sweep is for all runs of a sweep or for none")
    if not places or places < 2:
        raise InputError(
            "target.share=sweep is for runs that go on at the same time on this machine: "
            f"hydra/launcher=basic and hydra.sweeper.n_jobs={len(configs)}, or as many as fit"
        )
    # A cluster that is there has a secret of its own, perhaps in a file.
    own_token = TOKEN not in os.environ and "RAY_ADDRESS" not in os.environ
    if own_token:
        os.environ[TOKEN] = secrets.token_hex(32)
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=keep, args=(theirs, configs, folder, places))
    try:
        process.start()
        theirs.close()
        try:
            os.environ[FLEET] = answered(ours)
        except BaseException:
            process.terminate()  # it does not look at the pipe yet
            raise
        yield
    finally:
        os.environ.pop(FLEET, None)
        if own_token:
            del os.environ[TOKEN]
        ours.close()
        process.join()


def answered(pipe: Connection) -> str:
    """What the fleet's process says of it; InputError where it refuses or ends."""
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise InputError("the process of the sweep's fleet has ended; why is above") from None
    if isinstance(answer, InputError):
        raise answer
    return str(answer)


def keep(pipe: Connection, configs: list[Config], folder: Path, places: int) -> None:
    """What the fleet's process does."""
    from specforge_exp.inference.shared import keep_fleet

    os.setsid()  # Ctrl-C is the sweep's, which closes the pipe
    keep_fleet(pipe, configs, folder, places)
