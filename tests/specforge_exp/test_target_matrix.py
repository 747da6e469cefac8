"""Every family from its states to lossless decoding; a handful of them in the fast tier."""

from pathlib import Path

import pytest
from families import FAMILIES, save
from target_matrix import CHECKS, examine

FAST = ("Llama 3.x", "Gemma 3 (pictures)", "gpt-oss", "Granite 3", "Phi-4-mini", "Qwen3-Next")
REFUSED = {
    (family, draft) for family in ("Qwen3-Next", "MiniMax") for draft in ("EAGLE-3", "DFlash")
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the models are that exist."""
    return {}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in FAST else [pytest.mark.slow]) for f in FAMILIES]
)
def test_family(
    family: str, check: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if family not in folders:
        folders[family] = save(FAMILIES[family](), tmp_path_factory.mktemp("target"))
    answer = examine(check, folders[family])
    if (family, check) in REFUSED:
        assert "cannot be decoded in this process" in answer
    else:
        assert answer == "yes"
