"""Conversations one after the other in one forward: each sees itself alone, from position 0.

transformers masks what lies between packed sequences when positions begin again, at the price of
scores between all tokens. `by_document` calls its attention once for each conversation instead:
SDPA, without a mask where no window is shorter than what is packed, or the model's own `eager`.

Whether a model keeps packed conversations apart is measured, not looked up: see `follows`.

Shape suffixes: B batch, T packed tokens, S heads, E size of a head, H hidden.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from specforge_exp.errors import InputError

NAMES = {"sdpa": "documents", "eager": "documents_eager"}
"""Our attentions, by the one of transformers that they call for each conversation."""
LENGTHS = [5, 1, 9, 3]
"""Of the conversations that `follows` packs."""
FAILURES = (AttributeError, ImportError, IndexError, OSError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot be run in some way."""
BY_PLACE = "floor_scale log_scaling_n_floor"
"""Settings of models whose attention counts tokens by where they stand in a forward, not by their
positions: from so many tokens on it scales queries."""
TOLERANCE = 1e-4
"""In fp32. Narrower numbers differ by more than this anyway: there packed conversations must be
eight times nearer to themselves alone than to one long text."""


def by_document(
    module: Any, query_BSTE: Tensor, key_BSTE: Tensor, value_BSTE: Tensor, mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within each of `documents`, lengths that the forward was given; [B, T, S, E]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend

    lengths = options.pop("documents", None)
    if module.config._attn_implementation == NAMES["eager"]:  # with what only this model has
        attend = sys.modules[type(module).__module__].eager_attention_forward
    if lengths is None:  # a text by itself, maybe behind a cache
        return attend(module, query_BSTE, key_BSTE, value_BSTE, mask, **options)[0], None
    parts, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        own = None if mask is None else mask[..., rows, rows]
        qkv = (x[:, :, rows] for x in (query_BSTE, key_BSTE, value_BSTE))
        parts.append(attend(module, *qkv, own, **options)[0])
        start += length
    return torch.cat(parts, 1), None


def mask_of_windows(*args: Any, **options: Any) -> Tensor | None:
    """A mask for layers with a window that is shorter than what is packed; else None."""
    from transformers.masking_utils import sdpa_mask

    window = options.get("local_size")
    plain = not options.get("use_vmap") and options.get("attention_mask") is None
    if (
        plain
        and options["q_length"] == options["kv_length"]
        and (window is None or options["q_length"] <= window)
    ):
        return None
    mask: Tensor | None = sdpa_mask(*args, **options)
    return mask


def register() -> None:
    """Make the attentions known to transformers."""
    # torch's compiler comes with these (2 s): who needs a tokenizer alone does without.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, mask in zip(NAMES.values(), (mask_of_windows, eager_mask), strict=True):
        ALL_ATTENTION_FUNCTIONS.register(name, by_document)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)


def last_states(decoder: Any, ids_T: Tensor, lengths: list[int], documents: bool) -> Tensor:
    """Post-norm last states [T, H] of packed conversations.

    Args:
        decoder: what turns tokens into states.
        ids_T: their tokens.
        lengths: of each.
        documents: whether the model's attention is `by_document`.

    Raises:
        InputError: there are more than the model keeps apart; see `most_places`.
    """
    most = most_places(decoder.config.get_text_config())
    if most and len(lengths) > 1 and len(ids_T) > most:
        raise InputError(
            f"{len(ids_T)} packed tokens, but {decoder.config.model_type} scales by where a token "
            f"stands in a forward from {most + 1} on: trainer.pack_tokens={most}, or "
            "causal.packing=false"
        )
    positions = [torch.arange(length, device=ids_T.device) for length in lengths]
    more = {"documents": lengths} if documents else {}
    out = decoder(
        ids_T[None], position_ids=torch.cat(positions)[None], use_cache=False,
        **more,
    )  # fmt: skip
    states_TH: Tensor = out.last_hidden_state[0]
    return states_TH


@torch.no_grad()
def follows(model: Any, decoder: Any, documents: bool) -> bool:
    """Whether packed conversations give the states that they give one by one."""
    size = model.config.get_text_config().vocab_size
    ids_T = torch.arange(7, 7 + sum(LENGTHS), device=model.device) * 31 % size

    def states(lengths: list[int]) -> Tensor:
        return last_states(decoder, ids_T, lengths, documents).float()

    try:
        packed_TH, text_TH = states(LENGTHS), states([len(ids_T)])
        alone = [
            last_states(decoder, part, [len(part)], documents) for part in ids_T.split(LENGTHS)
        ]
    except FAILURES:
        return False
    alone_TH = torch.cat(alone).float()
    apart = float((packed_TH - alone_TH).norm() / alone_TH.norm())
    if model.dtype == torch.float32:
        return apart <= TOLERANCE
    return 8 * apart <= float((text_TH - alone_TH).norm() / alone_TH.norm())


def first_that_follows(model: Any, decoder: Any, names: list[str]) -> str | None:
    """The first of these attentions with which a model keeps packed conversations apart; it has
    it then. None: with none of them, and it has the last that it takes; or it hands states of its
    layers from token to token, which a few tokens in bfloat16 need not show."""
    register()
    layers = DynamicCache(config=model.config.get_text_config()).layers
    if any(hasattr(layer, "conv_states") for layer in layers):
        return None
    for name in names:
        try:
            model.set_attn_implementation(name)
        except FAILURES:  # it has no such attention, or this one is not installed
            continue
        if follows(model, decoder, name in NAMES.values()):
            return name
    return None


def most_places(text: Any) -> int | None:
    """Tokens that one forward of packed conversations may have; None: any number."""
    tuned = getattr(text, "attn_temperature_tuning", True)
    limits = [getattr(text, name, None) for name in BY_PLACE.split()]
    return min((limit - 1 for limit in limits if limit and tuned), default=None)


def together(lengths: Mapping[int, int], most: int) -> list[list[int]]:
    """Conversations by number, longest first each in the first forward of `most` tokens that has
    room; a longer one is a forward of its own."""
    forwards: list[list[int]] = []
    room: list[int] = []
    for number in sorted(lengths, key=lambda n: (-lengths[n], n)):
        fits = next((i for i, left in enumerate(room) if left >= lengths[number]), None)
        if fits is None:
            forwards.append([])
            room.append(most)
            fits = len(room) - 1
        forwards[fits].append(number)
        room[fits] -= lengths[number]
    return forwards
