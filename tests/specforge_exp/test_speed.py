"""What MFU is measured against."""

import pytest
import torch

from specforge_exp.training import speed

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None), ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090 D", None),
    ],
)  # fmt: skip
def test_a_gpu_has_the_peak_of_its_own_name(
    monkeypatch: pytest.MonkeyPatch, name: str, teraflops: int | None
) -> None:
    """One whose name begins or ends like a known one's is another: it is measured, by a product
    that takes far longer than its start."""
    sizes: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(speed, "matmul_rate", lambda device, dtype, size: sizes.append(size) or 7.0)
    assert speed.peak_flops(CUDA) == (7.0 if teraflops is None else teraflops * 1e12)
    assert sizes == ([8192] if teraflops is None else [])
