"""What the user can mend."""

from hydra.errors import CompactHydraException


class SweepError(CompactHydraException):
    """The sweeper refuses, or reports failed runs; Hydra prints it without a traceback."""


class JobFailed(CompactHydraException):
    """A job ended without a result: a signal, an exit code, a configuration that cannot be made."""
