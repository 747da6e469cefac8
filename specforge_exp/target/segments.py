"""One forward of the target over many continuations of one text.

Keys and values of the text are those of a cache. A segment sees the text up to its anchor and
itself; its positions go on from its anchor. The model's own rule of what sees what (causal, a
sliding window, chunks) is asked with those positions in place of the places in the cache.

Shape suffixes: T tokens of the text, R segments, J tokens of a segment, Q = J * R, L keys, H
hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from specforge_exp.errors import InputError
from specforge_exp.target.anatomy import CACHE, one_line
from specforge_exp.target.model import Target
from specforge_exp.target.packing import most_places

TOLERANCE = {torch.float32: 1e-4}
"""Difference of states from plain forwards, as a share of their norm; else 0.2."""


@torch.no_grad()
def verify_segments(
    target: Target, cache: DynamicCache, anchor_R: Tensor, tokens_JR: Tensor
) -> Tensor:
    """Post-norm last hidden states [J, R, H] of continuations.

    Args:
        target: the target.
        cache: of the text alone; the segments are appended to it.
        anchor_R: position of the last token of the text before each segment.
        tokens_JR: the segments' tokens.

    Raises:
        InputError: they are more tokens together than `packing.most_places`.
    """
    J, R = tokens_JR.shape
    device, length, most = target.device, cache.get_seq_length(), most_places(target.text)
    if most and length + J * R > most:
        raise InputError(
            f"{length} tokens and {J * R} proposed ones, but {target.text.model_type} scales by "
            f"where a token stands in a forward from {most + 1} on: a smaller max_length or "
            "onpolicy.anchors, or onpolicy=none"
        )
    anchor_R, chain_R = anchor_R.to(device), torch.arange(R, device=device)
    after_J = torch.arange(1, J + 1, device=device)
    at_Q = (anchor_R[None] + after_J[:, None]).flatten()
    chain_Q, after_Q = chain_R.repeat(J), after_J.repeat_interleave(R)
    at_L = torch.cat([torch.arange(length, device=device), at_Q])
    text_QT = at_L[:length] <= anchor_R[chain_Q][:, None]
    own_QQ = (chain_Q[:, None] == chain_Q) & (after_Q[:, None] >= after_Q)
    with seeing(target.text, torch.cat([text_QT, own_QQ], 1), at_Q, at_L):
        out = target.decoder(
            tokens_JR.to(device).reshape(1, -1), position_ids=at_Q[None], use_cache=True,
            **{CACHE: cache},
        )  # fmt: skip
    last_1QH: Tensor = out.last_hidden_state
    return last_1QH[0].view(J, R, -1)


@contextmanager
def seeing(text: Any, seen_QL: Tensor, at_Q: Tensor, at_L: Tensor) -> Iterator[None]:
    """Forwards of this block see what `seen_QL` and the model's own rule, by position, allow."""
    kind = text._attn_implementation
    own = ALL_MASK_ATTENTION_FUNCTIONS[kind]
    if own not in (sdpa_mask, eager_mask):
        raise ValueError(f"attention by {kind} takes no mask of segments; sdpa and eager do")

    def mask(mask_function: Any, kv_length: int, q_length: int, **options: Any) -> Tensor:
        if (q_length, kv_length) != seen_QL.shape:
            raise ValueError(f"a layer keeps {kv_length} of {seen_QL.shape[1]} keys")
        zero = torch.zeros((), dtype=torch.long, device=at_Q.device)
        allowed_QL: Tensor = mask_function(zero, zero, at_Q[:, None], at_L[None])
        allowed_11QL = (allowed_QL & seen_QL)[None, None]
        if own is sdpa_mask:
            return allowed_11QL
        dtype = options.get("dtype", torch.float32)
        bias = torch.zeros(allowed_11QL.shape, dtype=dtype, device=at_Q.device)
        return bias.masked_fill_(~allowed_11QL, torch.finfo(dtype).min)

    ALL_MASK_ATTENTION_FUNCTIONS[kind] = mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[kind]  # of this process; the library's own shows again
        if ALL_MASK_ATTENTION_FUNCTIONS[kind] is not own:
            ALL_MASK_ATTENTION_FUNCTIONS[kind] = own


@torch.no_grad()
def check_segments(target: Target, length: int) -> None:
    """Refuse a target whose attention or state cannot take many continuations of one text.

    Three of them after a text of `length` tokens are compared with plain forwards.

    Raises:
        InputError: it cannot; names the reason.
    """
    size = min(target.text.vocab_size, target.tokens or target.text.vocab_size)
    J = min(4, length - 2)
    ids_T = torch.randint(0, size, (length + J * 3,), generator=torch.Generator().manual_seed(0))
    ids_T, tokens_JR = ids_T[:length], ids_T[length:].view(J, 3)
    anchor_R = torch.tensor([0, length // 2, length - J - 1])
    try:
        cache = target.new_cache()
        target.features(ids_T[None].to(target.device), cache)
        last_JRH = verify_segments(target, cache, anchor_R, tokens_JR)
    except InputError as error:
        raise refused(target, str(error)) from None
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise refused(target, one_line(error)) from None
    bound = TOLERANCE.get(last_JRH.dtype, 0.2)
    for chain, anchor in enumerate(anchor_R.tolist()):
        plain_T = torch.cat([ids_T[: anchor + 1], tokens_JR[:, chain]])
        plain_JH = target.features(plain_T[None].to(target.device))[1][0, -J:]
        difference = float((last_JRH[:, chain] - plain_JH).norm() / plain_JH.norm())
        if not difference <= bound:
            raise refused(
                target, f"after token {anchor} of {length} its states differ by {difference:.2%} "
                "from those of a plain forward",
            )  # fmt: skip


def refused(target: Target, reason: str) -> InputError:
    """Why proposals cannot be judged."""
    return InputError(
        f"onpolicy judges many proposals in one forward of the target, which "
        f"{target.text.model_type} cannot ({reason}); use onpolicy=none"
    )
