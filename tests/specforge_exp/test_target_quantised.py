"""Quantised targets say what the numbers say that they stand for, or they are refused.

GPTQ, AWQ, compressed-tensors and bitsandbytes need packages that the tests do not have:
`test_target.test_a_quantised_target_needs_its_package`. FP8 and MXFP4 are unpacked where nothing
runs them as they are.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specforge_exp.config import ModelConfig
from specforge_exp.errors import InputError
from specforge_exp.target import load_target

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What DeepSeek-V3's files hold of a projection: bytes, and a scale for 128 x 128 of them."""
    scale = weight.abs().amax() / 448
    packed = (weight / scale).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scale[None, None]}, packed.float() * scale


def mxfp4(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What gpt-oss's files hold of experts: two numbers a byte, an exponent for 32 inputs."""
    rows = weight.transpose(1, 2).unflatten(2, (-1, 32))
    power = torch.ceil(torch.log2(rows.abs().amax(-1) / 6))
    code = (rows / 2 ** power[..., None])[..., None].sub(FP4).abs().argmin(-1)
    packed = (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)
    stored = {f"{name}_blocks": packed, f"{name}_scales": (power + 127).to(torch.uint8)}
    return stored, (FP4[code] * 2 ** power[..., None]).flatten(2).transpose(1, 2).contiguous()


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """What the target says, by the head that teaches and samples."""
    target = load_target(ModelConfig(name="t", path=str(folder)), torch.device("cpu"))
    ids_1T = tokens(24)[None]
    served = target.head(target.features(ids_1T)[1][0])
    torch.testing.assert_close(served, target.model(ids_1T).logits[0])
    return served


@pytest.mark.skipif(torch.cuda.is_available(), reason="there FP8 is not unpacked")
@pytest.mark.parametrize(
    ("family", "pack", "part", "config"),
    [
        ("Llama 2", fp8, "_proj.weight", {"weight_block_size": [128, 128]}),
        ("gpt-oss", mxfp4, "experts.", {"modules_to_not_convert": ["lm_head", "*.self_attn"]}),
    ],
)
def test_unpacked_weights_say_what_their_numbers_say(
    tmp_path: Path, family: str, pack: Any, part: str, config: dict[str, Any]
) -> None:
    folder = save(FAMILIES[family](), tmp_path)
    stored, plain = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        packs = part in name and not name.endswith("bias")
        half = weight.bfloat16()  # as published: what is not packed is not as wide as what is asked
        packed, plain[name] = pack(name, weight) if packs else ({name: half}, half)
        stored |= packed
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    expected = logits(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": pack.__name__, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    torch.testing.assert_close(logits(folder), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there FP8 is not unpacked")
def test_blocks_that_weights_do_not_fill_are_refused(tmp_path: Path) -> None:
    """transformers would take two scales of 96 rows for 48 each, where they are of 64 and 32."""
    folder = save(FAMILIES["Llama 2"](), tmp_path)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rows, columns = (-(-side // 64) for side in weights[name].shape)
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.ones(rows, columns)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"which blocks of \[64, 64\] do not fill"):
        logits(folder)


def test_a_head_of_packed_numbers_is_refused(tmp_path: Path) -> None:
    """Bytes cannot be multiplied with a state: as where a package packs lm_head too."""
    folder = save(FAMILIES["Llama 2"](), tmp_path)
    target = load_target(ModelConfig(name="t", path=str(folder)), torch.device("cpu"))
    weight = target.model.lm_head.weight.data.to(torch.float8_e4m3fn)
    target.model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    target.model.lm_head.register_forward_hook(lambda _m, _i, _o: torch.zeros(1, 8, len(weight)))
    target.model.lm_head.forward = lambda hidden: hidden
    target.__dict__.pop("end", None)
    with pytest.raises(InputError, match="llama has no head of plain numbers: Linear"):
        _ = target.head
