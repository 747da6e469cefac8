"""The draft's vocabulary: the target tokens that a draft can propose.

d2t is an offset (target id = draft id + d2t[draft id]), t2d a mask over the target's ids: the
layout that SGLang and vLLM read.
"""

import io
from pathlib import Path

import torch
from torch import Tensor

from specforge_exp.data.tokens import again
from specforge_exp.errors import InputError, first_line


def vocabulary_mapping(counts_V: Tensor, size: int) -> dict[str, Tensor]:
    """The `size` most frequent ids, ties by the lower id, in ascending order.

    Args:
        counts_V: how often each target id is supervised, int64.
        size: D; with D = V the map is the identity.

    Returns:
        d2t [D] int64 and t2d [V] bool.
    """
    order_V = torch.argsort(counts_V, descending=True, stable=True)
    ids_D = order_V[:size].sort().values
    t2d_V = torch.zeros(len(counts_V), dtype=torch.bool)
    t2d_V[ids_D] = True
    return {"d2t": ids_D - torch.arange(size), "t2d": t2d_V}


def write_mapping(path: Path, mapping: dict[str, Tensor]) -> None:
    """Write what `read_mapping` reads; OSError where there is no room, which torch.save hides."""
    content = io.BytesIO()
    torch.save(mapping, content)
    path.write_bytes(content.getvalue())


def read_mapping(path: Path) -> dict[str, Tensor]:
    """The mapping that preprocess wrote; InputError when it cannot be read or is none."""
    try:
        mapping: dict[str, Tensor] = torch.load(path, weights_only=True)
        check_mapping(mapping["d2t"], mapping["t2d"])
    except Exception as error:  # also whatever a zip file and its pickle may lack
        raise InputError(f"{path} cannot be read ({first_line(error)}); {again()}") from None
    return mapping


def check_mapping(d2t: Tensor, t2d: Tensor) -> None:
    """Raise InputError unless d2t and t2d describe the same ascending set of ids."""
    ids = d2t + torch.arange(len(d2t), device=d2t.device)
    if d2t.dtype != torch.int64 or t2d.dtype != torch.bool:
        raise InputError(f"d2t must be int64 and t2d bool, got {d2t.dtype} and {t2d.dtype}")
    if not torch.equal(ids, t2d.nonzero().flatten()):
        raise InputError("d2t and t2d name different tokens")
