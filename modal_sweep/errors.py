"""What the user can mend, and what a job reports."""

from hydra.errors import CompactHydraException


class LaunchError(CompactHydraException):
    """The launcher refuses, with reason and remedy; Hydra prints it without a traceback."""


class JobFailed(CompactHydraException):
    """A job ended without a result that can be used."""


class ResultGone(Exception):
    """A call's result has expired and its Volume has none."""
