"""prefetch: download the target once.

Reads the hub; writes $HF_HOME/hub/models--<owner>--<name>/, where the other stages find it, so that
eight processes do not each fetch it, and $HF_HOME/prefetched/models--<owner>--<name>, which says
that it is whole. What an interrupted download has got is kept.
"""

import logging
from pathlib import Path

from huggingface_hub import constants

from specforge_exp.artifacts import disk_errors
from specforge_exp.config import Config
from specforge_exp.config.machine import prefetched
from specforge_exp.errors import InputError
from specforge_exp.serving.downloads import download

log = logging.getLogger(__name__)


def prefetch(cfg: Config) -> Path:
    """Download model.path's weights, configuration and tokenizer; returns their folder."""
    name = cfg.model.path
    if Path(name).is_dir():
        log.info("prefetch: model.path=%s is a folder of this machine: nothing to do", name)
        return Path(name)
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
