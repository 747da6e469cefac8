"""A model from the hub, tried again where that may help; what a broken attempt has got is kept."""

import logging
import time
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from specforge_exp.errors import FULL, InputError, first_line, number_of
from specforge_exp.offline import offline

log = logging.getLogger(__name__)

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
OTHER_FORMATS = ["original/*", "onnx/*", "consolidated*"]
WAITS = (1.0, 4.0, 15.0, 60.0)
"""Seconds before each further attempt after what may pass: 429, 5xx, a connection that is cut."""
BUSY = (408, 429)
PASSING = {"TimeoutException", "ReadError", "WriteError", "RemoteProtocolError"}
"""Names of the hub's HTTP client's errors, which has changed its package once."""


def download(name: str) -> Path:
    """The model's folder in the cache; raises InputError for what keeps it from coming."""
    for wait in (*WAITS, None):
        try:
            folder = snapshot_download(name, allow_patterns=FILES, ignore_patterns=OTHER_FORMATS)
            return Path(folder)
        except Exception as error:  # the hub client raises dozens of types
            if number_of(error) in FULL:
                raise
            if wait is None or not passes(error):
                raise InputError(problem(name, error)) from None
            log.warning("download: %s; again in %.0f s", first_line(error), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def passes(error: BaseException | None) -> bool:
    """Whether another attempt may succeed, by the error or what it was raised from."""
    if error is None:
        return False
    status = getattr(getattr(error, "response", None), "status_code", None) or 0
    names = {kind.__name__ for kind in type(error).__mro__}
    return status in BUSY or status >= 500 or bool(names & PASSING) or passes(error.__cause__)


def problem(name: str, error: Exception) -> str:
    """One line on why a download failed and what to do."""
    first = first_line(error)
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its licence at {page} and give a token of that account, here "
            "as HF_TOKEN=..., on Modal with `modal secret create huggingface-secret HF_TOKEN=...` "
            "and +model.secrets.huggingface-secret=[HF_TOKEN]"
        )
    if isinstance(error, HFValidationError):
        return f"model.path={name} is neither a folder nor a hub id: {first}"
    if isinstance(error, RepositoryNotFoundError):
        return f"model.path={name}: there is no {page}, or it is private and HF_TOKEN cannot see it"
    if why := offline():
        return f"{why}, and {name} is not in {constants.HF_HUB_CACHE}"
    if isinstance(error, LocalEntryNotFoundError) and not isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} cannot be reached, and {name} is not here yet"
    return (
        f"{name}: {type(error).__name__}: {first}; the same command continues with what is missing"
    )
