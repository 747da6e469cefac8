"""The two presets against losses and gradients recorded from the peers."""

import json
import subprocess
from pathlib import Path

import numpy as np
import parity
import pytest
import warm

from specforge_exp.errors import InputError

FOLDER = Path(__file__).parents[1] / "parity"
FILES = sorted([*FOLDER.glob("*.npz"), *FOLDER.glob("peagle/*.npz")])
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parity.py"


def run(*files: Path) -> subprocess.CompletedProcess[str]:
    return warm.run([str(SCRIPT), *map(str, files)], kind="stages")


def test_peers_are_reproduced() -> None:
    done = run(*FILES)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is True
    assert set(result["files"]) == {path.name for path in FILES}
    for figures in result["files"].values():
        assert figures["loss_rel"] <= parity.LOSS_TOLERANCE
        assert figures["grad_rel"] <= parity.GRADIENT_TOLERANCE


def changed(tmp_path: Path, source: Path, **changes: object) -> Path:
    """A copy of a file with other arrays or meta entries."""
    arrays = dict(np.load(source))
    meta = json.loads(str(arrays["meta"]))
    for name, value in changes.items():
        if name in arrays:
            arrays[name] = value
        else:
            meta[name] = value
    arrays["meta"] = np.array(json.dumps(meta))
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
def test_a_wrong_loss_is_found(tmp_path: Path) -> None:
    source = next(path for path in FILES if path.name == "sf_tiny.npz")
    wrong = changed(tmp_path, source, ploss=np.load(source)["ploss"] * 1.0001)
    done = run(wrong)
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["ok"] is False


def test_a_wrong_gradient_is_found(tmp_path: Path) -> None:
    source = next(path for path in FILES if path.name == "spec_tiny.npz")
    wrong = changed(tmp_path, source, **{"g/fc.weight": np.load(source)["g/fc.weight"] * 1.001})
    assert parity.compare(wrong)["grad_rel"] > 1e-4


def test_not_a_number_never_passes(tmp_path: Path) -> None:
    source = next(path for path in FILES if path.name == "spec_tiny.npz")
    wrong = changed(tmp_path, source, **{"g/fc.weight": np.load(source)["g/fc.weight"] * np.nan})
    assert parity.compare(wrong)["grad_rel"] > 1


@pytest.mark.parametrize("name", ["norm_output", "norm_before_fc", "norm_before_residual"])
def test_what_specforge_does_not_train_is_refused_by_name(tmp_path: Path, name: str) -> None:
    source = next(path for path in FILES if path.name == "sf_tiny.npz")
    with pytest.raises(InputError, match=name):
        parity.compare(changed(tmp_path, source, **{name: True}))


@pytest.mark.parametrize("name", ["norm_output", "norm_before_residual"])
def test_an_option_left_out_is_found(tmp_path: Path, name: str) -> None:
    """Options without weights of their own, which nothing else would miss."""
    source = next(path for path in FILES if path.name == f"sp_{name}.npz")
    assert parity.compare(changed(tmp_path, source, **{name: False}))["grad_rel"] > 1e-2


def test_another_mask_and_another_draw_are_found(tmp_path: Path) -> None:
    source = FOLDER / "peagle" / "two_layers.npz"
    wrong = changed(tmp_path, source, mask_token_id=1)
    assert parity.compare(wrong)["loss_rel"] > 1e-4
    anchors, depths = (np.load(source)[f"in/{name}"] for name in ("anchor_pos", "depth"))
    fewer = {"in/anchor_pos": anchors[depths < 4], "in/depth": depths[depths < 4]}
    assert parity.compare(changed(tmp_path, source, **fewer))["grad_rel"] > 1e-3


@pytest.mark.parametrize("window", [5, 7])
def test_another_window_is_found(tmp_path: Path, window: int) -> None:
    """A position more or less; the file's is 6."""
    source = next(path for path in FILES if path.name == "sp_window.npz")
    wrong = changed(tmp_path, source, sliding_window=window)
    assert parity.compare(wrong)["grad_rel"] > 1e-3


def test_an_unknown_loss_is_refused_by_name(tmp_path: Path) -> None:
    source = next(path for path in FILES if path.name == "spec_tiny.npz")
    with pytest.raises(InputError, match=r"jsd is not known.*kl_div, rkl, tv, nla"):
        parity.compare(changed(tmp_path, source, loss_fn='{"kl_div": 0.5, "jsd": 0.5}'))


@pytest.mark.slow
def test_not_a_parity_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("nothing")
    done = run(path)
    assert done.returncode == 1
    assert "x.npz" in done.stderr
    assert "Traceback" not in done.stderr
