"""Whether the hub can be asked: looked at once, before its client tries for a minute."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from specforge_exp.config import Config

FOUND = "SPECFORGE_OFFLINE"
"""The environment variable that says why this process, and those it starts, do not ask the hub."""
PATIENCE = 5.0
"""Seconds for a connection."""


def settle(cfg: Config) -> None:
    """Where something may come from the hub and it cannot be reached, use its cache alone.

    The hub's client reads the environment when it is imported. Behind a proxy nothing is tried.
    """
    models = [path for path in (cfg.model.path, cfg.export.source) if not Path(path or "").exists()]
    wanted = models or cfg.export.push or "hub:" in str([cfg.data, cfg.bench])
    if not wanted or os.environ.get("HF_HUB_OFFLINE") or getproxies():
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = urlsplit(endpoint)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), PATIENCE).close()
    except (OSError, ValueError):
        os.environ[FOUND] = f"offline: {endpoint} cannot be reached"
        os.environ["HF_HUB_OFFLINE"] = "1"


def offline() -> str | None:
    """Why the hub is not asked; None: it is."""
    forbidden = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    said = "offline: HF_HUB_OFFLINE forbids to ask the hub" if forbidden else None
    return os.environ.get(FOUND, said)
