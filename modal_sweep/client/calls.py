"""A sweep's calls, seen from here: looked at without waiting for long, kinds of ends told apart."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modal_sweep.container.cloud import status_dict
from modal_sweep.errors import ResultGone
from modal_sweep.protocol import result

if TYPE_CHECKING:
    import modal


class Unreachable(Exception):
    """Modal does not answer at the moment."""


@dataclass
class Ended:
    """The result of a call."""

    envelope: dict[str, Any]
    trusted: bool
    """It came from the call itself, not from a Volume."""


def look(call: str, seconds: float = 0.0) -> Ended | None:
    """A call's result, or None while it runs.

    Raises:
        ResultGone: its result has expired.
        Unreachable: Modal does not answer.
    """
    import modal
    from modal import exception

    try:
        packed = modal.FunctionCall.from_id(call).get(timeout=seconds)
    except (exception.OutputExpiredError, exception.NotFoundError) as error:
        raise ResultGone(str(error)) from None
    except (exception.FunctionTimeoutError, exception.InternalFailure) as error:
        return failed(type(error).__name__, str(error))
    except (exception.ConnectionError, exception.ServiceError, exception.InternalError) as error:
        raise Unreachable(str(error)) from None
    except exception.RemoteError as error:
        return failed("Cancelled", str(error) or "cancelled", status="cancelled")
    except exception.AuthError:
        raise
    except TimeoutError:
        return None
    except OSError as error:
        raise Unreachable(str(error)) from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if isinstance(error, exception.InputCancellation):
            return failed("Cancelled", "cancelled", status="cancelled")
        return failed(type(error).__name__, str(error))
    return Ended(result.unpack(packed), trusted=True)


def failed(kind: str, message: str, status: str = "failed") -> Ended:
    """An end that Modal reports, not the job."""
    return Ended({"status": status, "error": {"type": kind, "message": message}}, trusted=True)


def read_if_there(volume: "modal.Volume", path: str) -> bytes | None:
    """A file of a Volume, or None."""
    from modal import exception

    try:
        return b"".join(volume.read_file(path))
    except (FileNotFoundError, exception.NotFoundError):
        return None


class Statuses:
    """What the workers say about themselves, read in one request."""

    def __init__(self, name: str) -> None:
        import modal

        self.dict = modal.Dict.from_name(status_dict(name), create_if_missing=True)
        self.known: dict[str, dict[str, Any]] = {}
        self.gone: set[str] = set()
        """Keys of jobs that ran at the last look and do not any more."""
        self.next = 0.0

    def read(self, every: float = 0.0) -> dict[str, dict[str, Any]]:
        """By key of a running job; the last known ones while Modal does not answer.

        Args:
            every: seconds; an earlier answer that is not older is given again.
        """
        from modal import exception

        now = time.monotonic()
        if now < self.next:
            return self.known
        self.next = now + every
        try:
            found = dict(self.dict.items())
        except (exception.Error, OSError):
            return self.known
        self.gone |= self.known.keys() - found.keys()
        self.known = found
        return self.known
