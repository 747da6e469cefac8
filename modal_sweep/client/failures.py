"""What is said when Modal or this machine refuses: one line, with what helps and what goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

from modal_sweep.errors import LaunchError
from modal_sweep.protocol.journal import Journal
from modal_sweep.protocol.outage import away
from modal_sweep.protocol.records import first_line

LOGIN = "`modal setup` logs in (a free account is enough to start)"
WITHOUT = (
    "without an account, hydra.launcher.dry_run=true shows the jobs, their machines and the cost, "
    "and Hydra's own hydra/launcher=basic runs what this machine can run"
)


def refusal(error: Exception, without: str = WITHOUT) -> str:
    """What an exception of Modal's client, or of this machine, means to the user.

    Args:
        without: what can be done without an account.
    """
    from modal import exception

    reason, again = first_line(error), "the same command continues"
    if isinstance(error, exception.AuthError):
        if reason.startswith("Token missing"):
            return f"Modal does not know this machine. {LOGIN}; {without}"
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
def modal_errors(journal: Journal | None = None) -> Iterator[None]:
    """Turn what a user can mend into one message; with the jobs of a journal that go on."""
    try:
        from modal import exception
    except ImportError:
        text = "hydra/launcher=modal needs the modal package: pip install modal"
        raise LaunchError(text) from None
    try:
        yield
    except (exception.Error, OSError) as error:
        text = refusal(error) + (going_on(journal) if journal else "")
    else:
        return
    raise LaunchError(text)


def going_on(journal: Journal) -> str:
    """The jobs that this process leaves to themselves, and how to come back to them."""
    count = sum(job.call is not None and job.end is None for job in journal.ordered())
    back = f"`modal-sweep attach {journal.sweep_dir}` brings their results"
    return f"; {count} jobs in flight go on and are paid for: {back}" if count else ""
