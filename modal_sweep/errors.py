"""What the user can mend, what a job reports, and how a call ends without a result."""

from hydra.errors import CompactHydraException


class LaunchError(CompactHydraException):
    """The launcher refuses, with reason and remedy; Hydra prints it without a traceback."""


class JobFailed(CompactHydraException):
    """A job ended without a result that can be used."""


class Unreachable(Exception):
    """Modal does not answer at the moment."""


class CallError(Exception):
    """A call ended without a result."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class ResultGone(CallError):
    """The result of a call has expired."""


class Cancelled(CallError):
    """Somebody has ended the call."""


class Died(CallError):
    """The container died of a call, or the call took longer than Modal allows."""


class Raised(CallError):
    """The function itself has raised."""
