"""prefetch: download the target once.

Reads the hub; writes $HF_HOME/hub/models--<owner>--<name>/, where the other stages find it, so that
eight processes do not each fetch it, and $HF_HOME/prefetched/models--<owner>--<name>, which says
that it is whole. What an interrupted download has got is kept.
"""

import errno
import logging
import sys
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from specforge_exp.artifacts import disk_errors
from specforge_exp.config import Config
from specforge_exp.config.resolvers import prefetched
from specforge_exp.errors import InputError

log = logging.getLogger(__name__)

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
OTHER_FORMATS = ["original/*", "onnx/*", "consolidated*"]


def prefetch(cfg: Config) -> Path:
    """Download model.path's weights, configuration and tokenizer; returns their folder."""
    name = cfg.model.path
    if Path(name).is_dir():
        log.info("prefetch: model.path=%s is a folder of this machine: nothing to do", name)
        return Path(name)
    if not sys.stderr.isatty():
        disable_progress_bars()
    log.info("prefetch: %s from %s to %s", name, constants.ENDPOINT, constants.HF_HUB_CACHE)
    with disk_errors(Path(constants.HF_HUB_CACHE)):
        folder = download(name)
        marker = Path(constants.HF_HOME) / (prefetched(name) or "prefetched/folder")
        marker.parent.mkdir(parents=True, exist_ok=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not any(path.suffix == ".safetensors" for path in files):
        raise InputError(f"{name} has no weights in safetensors format, the only one that is read")
    marker.touch()
    size = sum(path.stat().st_size for path in files)
    log.info("prefetch: complete: %d files, %.2f GB in %s", len(files), size / 1e9, folder)
    return folder


def download(name: str) -> Path:
    """The model's folder in the cache; raises InputError for what keeps it from coming."""
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=OTHER_FORMATS))
    except Exception as error:  # the hub client raises dozens of types
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(problem(name, error)) from None


def problem(name: str, error: Exception) -> str:
    """One line on why a download failed and what to do."""
    first = (str(error).strip().splitlines() or [""])[0]
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its licence at {page} and give a token of that account, here "
            "as HF_TOKEN=..., on Modal with `modal secret create huggingface-secret HF_TOKEN=...` "
            "and model.secrets={huggingface-secret: [HF_TOKEN]}"
        )
    if isinstance(error, HFValidationError):
        return f"model.path={name} is neither a folder nor a hub id: {first}"
    if isinstance(error, RepositoryNotFoundError):
        return f"model.path={name}: there is no {page}, or it is private and HF_TOKEN cannot see it"
    if constants.HF_HUB_OFFLINE:
        return f"{name} is not in {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE forbids to fetch it"
    if isinstance(error, LocalEntryNotFoundError) and not isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} cannot be reached, and {name} is not here yet"
    return (
        f"{name}: {type(error).__name__}: {first}; the same command continues with what is missing"
    )
