"""A sweep's calls, seen from here: looked at without waiting for long, kinds of ends told apart."""

import time
from typing import Any

from modal_sweep.errors import CallError, Cancelled, Died, Raised, ResultGone, Unreachable
from modal_sweep.protocol import result
from modal_sweep.protocol.names import status_dict
from modal_sweep.protocol.outage import away


def call_error(error: BaseException) -> CallError | Unreachable | None:
    """What an exception of `FunctionCall.get` says of the call; None: that it runs.

    Raises:
        AuthError, KeyboardInterrupt, SystemExit: what was given, when it says nothing of the call.
    """
    from modal import exception

    if isinstance(error, exception.AuthError | KeyboardInterrupt | SystemExit):
        raise error
    if isinstance(error, exception.OutputExpiredError | exception.NotFoundError):
        return ResultGone(error)
    if isinstance(error, exception.FunctionTimeoutError | exception.InternalFailure):
        return Died(error)
    if isinstance(error, exception.RemoteError | exception.InputCancellation):
        return Cancelled(error)
    if isinstance(error, TimeoutError):
        return None
    return Unreachable(str(error)) if away(error) else Raised(error)


def look(call: str, seconds: float = 0.0) -> dict[str, Any] | None:
    """The envelope of a call's result, or None while it runs.

    Raises:
        ResultGone: its result has expired.
        Unreachable: Modal does not answer.
    """
    import modal

    try:
        packed = modal.FunctionCall.from_id(call).get(timeout=seconds)
    except BaseException as error:
        problem = call_error(error)
    else:
        return result.unpack(packed)
    if isinstance(problem, ResultGone | Unreachable):
        raise problem
    if isinstance(problem, Cancelled):
        return result.failed("Cancelled", str(problem) or "cancelled", "cancelled")
    return None if problem is None else result.failed(type(problem.error).__name__, str(problem))


class Statuses:
    """What the workers say about themselves, read in one request."""

    def __init__(self, name: str) -> None:
        import modal

        self.dict = modal.Dict.from_name(status_dict(name), create_if_missing=True)
        self.latest: dict[str, dict[str, Any]] = {}
        """By key of a running job."""
        self.gone: set[str] = set()
        """Keys of jobs that ran at the last look and do not any more."""
        self.next = 0.0

    def read(self, every: float = 0.0) -> dict[str, dict[str, Any]]:
        """By key of a running job; the latest ones while Modal does not answer.

        Args:
            every: seconds; an earlier answer that is not older is given again.
        """
        from modal import exception

        now = time.monotonic()
        if now < self.next:
            return self.latest
        self.next = now + every
        try:
            statuses = dict(self.dict.items())
        except (exception.Error, OSError):
            return self.latest
        self.gone |= self.latest.keys() - statuses.keys()
        self.latest = statuses
        return self.latest
