"""What the system refuses is one line that names the file."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from specforge_exp.artifacts import Fingerprint, disk_errors, sha256, writing
from specforge_exp.config import Config
from specforge_exp.errors import InputError, told_by_the_system
from specforge_exp.records import whole_lines


@pytest.mark.parametrize("by", ["python", "safetensors"])
def test_a_limit_of_files_sizes_is_one_clear_line(by: str, tmp_path: Path, cfg: Config) -> None:
    """`ulimit -f`, which answers a write with the system's error, or with its words."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def grows() -> None:
        with writing(tmp_path / "thing", Fingerprint({}, {}), cfg, "prep") as partial:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            try:
                if by == "python":
                    (partial / "content").write_text("x" * 200_000)
                save_file({"x": np.zeros(200_000)}, partial / "content")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(InputError, match=r"too large .* while writing .*; raise the limit \(ulim"):
        grows()


def test_what_the_system_refuses_of_weights_is_one_clear_line(tmp_path: Path) -> None:
    """safetensors says the system's number in words; what is none of the system stays as it is."""
    told = pytest.raises(InputError, match=r"os error 5\) while writing .*/x; mend that")
    with told, disk_errors(tmp_path / "x"):
        raise SafetensorError("Error: I/O error: Input/output error (os error 5)")
    with pytest.raises(SafetensorError), disk_errors(tmp_path / "x"):
        raise SafetensorError("Error: I/O error: Invalid argument (os error 22)")


BAD = Path("/proc/self/mem")
"""Reading its first bytes is an input/output error."""


@pytest.mark.skipif(not BAD.exists(), reason="no /proc")
@pytest.mark.parametrize("read", [sha256, lambda path: [*whole_lines(path)]])
def test_an_error_of_the_disk_names_the_file(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").symlink_to(BAD)
    told = pytest.raises(InputError, match=rf"^{tmp_path}/train\.jsonl: Input/output error$")
    with told, told_by_the_system():
        read(tmp_path / "train.jsonl")
