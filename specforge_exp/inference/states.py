"""How states cross from a worker to a trainer: as plain bytes.

NumPy has no bfloat16 and Ray pickles a torch tensor in full, ten times slower than an array, which
it maps from shared memory; Mooncake moves bytes only.

Shape suffixes: T tokens, H hidden, A auxiliary states, F both side by side.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge_exp.inference.store import Bytes


def bytes_of(x: Tensor) -> Bytes:
    """The numbers of a tensor; its last dimension becomes as many bytes."""
    array: Bytes = x.detach().cpu().contiguous().view(torch.uint8).numpy()
    return array


def tensor_of(data: Bytes, dtype: torch.dtype) -> Tensor:
    """What `bytes_of` took apart, in memory of its own: Ray's is for reading only."""
    return torch.from_numpy(np.array(data)).view(dtype)


def packed(aux_TA: Tensor, last_TH: Tensor) -> Bytes:
    """One array of a conversation's states."""
    return bytes_of(torch.cat([aux_TA, last_TH], -1))


def unpacked(data: Bytes, dtype: torch.dtype, hidden: int) -> tuple[Tensor, Tensor]:
    """Auxiliary and last states of what `packed` made."""
    states_TF = tensor_of(data, dtype)
    return states_TF[:, :-hidden], states_TF[:, -hidden:]


def crossing(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Named tensors as bytes with their dtypes."""
    return {name: (bytes_of(x), str(x.dtype).removeprefix("torch.")) for name, x in weights.items()}


def crossed(weights: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """What `crossing` made, as tensors on a device."""
    return {
        name: tensor_of(data, getattr(torch, dtype)).to(device)
        for name, (data, dtype) in weights.items()
    }
