"""What is said when Modal or this machine refuses: one line, with what helps and what goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modal_sweep.client.plan import Job
from modal_sweep.client.settings import imported, without_hydra
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.journal import Journal
from modal_sweep.protocol.outage import away
from modal_sweep.protocol.records import first_line

LOGIN = "`modal setup` logs in (a free account is enough to start)"
WITHOUT = (
    " hydra.launcher.dry_run=true shows the jobs, their machines and the cost, and Hydra's own "
    "hydra/launcher=basic runs what this machine can run"
)


def advice(job: Job) -> str:
    """What the application says to do without an account."""
    if job.settings.without is None:
        return WITHOUT
    said = imported("without", job.settings.without)
    return str(said(job.config.hydra.job.name, without_hydra(job.config)))


def refusal(error: Exception, without: str = WITHOUT) -> str:
    """What an exception of Modal's client, or of this machine, means to the user.

    Args:
        without: what can be done without an account.
    """
    from modal import exception

    reason, again = first_line(error), "the same command continues"
    if isinstance(error, exception.AuthError):
        if reason.startswith("Token missing"):
            more = f". Without an account:{without}" if without else ""
            return f"Modal does not know this machine; {LOGIN}{more}"
        return f"Modal refuses the token of this machine ({reason}): {LOGIN} anew"
    if isinstance(error, exception.ImageBuildError):
        why = " ".join(str(error).partition("View the build logs")[0].split())[:500]
        why += f" (`modal image logs {error.image_id}` shows it all)"
        return f"the image cannot be built, so nothing was spawned: {why}; mended, {again}"
    if away(error):
        return f"Modal does not answer ({reason}); {again}"
    who = "this machine" if isinstance(error, OSError) else "Modal"
    return f"{who} refuses: {reason}; mended, {again}"


@contextmanager
def modal_errors(
    journal: Journal | None = None, without: Callable[[], str] = lambda: WITHOUT
) -> Iterator[None]:
    """Turn what a user can mend into one message; with the jobs of a journal that go on.

    Args:
        journal: of the sweep that is being worked on.
        without: says what can be done without an account.
    """
    try:
        from modal import exception
    except ImportError:
        text = "hydra/launcher=modal needs the modal package: pip install modal"
        raise LaunchError(text) from None
    try:
        yield
    except (exception.Error, OSError) as error:
        text = refusal(error, without()) + (going_on(journal) if journal else "")
    else:
        return
    raise LaunchError(text)


def going_on(journal: Journal) -> str:
    """The jobs that this process leaves to themselves, and how to come back to them."""
    count = sum(job.call is not None and job.end is None for job in journal.ordered())
    back = f"`modal-sweep attach {journal.sweep_dir}` brings their results"
    return f"; {count} jobs in flight go on and are paid for: {back}" if count else ""
