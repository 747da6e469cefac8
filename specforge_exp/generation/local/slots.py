"""Keys and values of many sequences at once, written at a position of each row's own.

Shape suffixes: B rows of a forward, T new tokens of a row, K positions seen, H heads, D of a head,
C capacity of a slot, S slots and one more, N = B H T, V vocabulary.
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from specforge_exp.errors import InputError
from specforge_exp.target.anatomy import CACHE

log = logging.getLogger(__name__)

GROWTH = 64
USUAL = 8192
"""Tokens of a sequence for which memory is planned where the context is longer."""
ATTENTION = {"full_attention", "sliding_attention"}


class Slots(Cache):
    """The model and the memory of its rows; row i of a sequence's keys is its token i.

    transformers' DynamicCache copies everything at every token, its StaticCache has one position
    for all rows; here a token is written where it belongs and rows are read as views.

    Args:
        model: a causal model of transformers, on its device.
        count: most sequences at a time.
        context: most tokens of a sequence.
        aside: bytes of the device to leave to others.

    Raises:
        InputError: the model keeps more than keys and values of attention.
    """

    def __init__(self, model: Any, count: int, context: int, aside: int = 0) -> None:
        super().__init__(layers=[])
        config = model.config.get_text_config()
        self.kinds: list[str] = getattr(config, "layer_types", None) or []
        self.window: int | None = getattr(config, "sliding_window", None)
        if set(self.kinds) - ATTENTION:
            raise InputError(
                f"engine=transformers serves models of {sorted(ATTENTION)}; this one has "
                f"{sorted(set(self.kinds) - ATTENTION)}: use engine=sglang or engine=openai"
            )
        self.model, self.device = model, model.device
        probe = DynamicCache()
        model(torch.zeros(1, 1, dtype=torch.long, device=self.device), **{CACHE: probe})
        self.capacity = 0
        self.dtype = model.dtype
        probed = [tensor for layer in probe.layers for tensor in (layer.keys, layer.values)]
        self.token_bytes = sum(tensor.numel() * tensor.element_size() for tensor in probed)
        affordable = (free_bytes(self.device) - aside) // self.token_bytes
        self.count = max(1, min(count, affordable // min(context, USUAL) - 1))
        """Sequences at a time: fewer than were asked for where memory is short."""
        if self.count < count:
            log.warning(
                "%d sequences at a time instead of %d: memory for keys and values holds %d tokens",
                self.count, count, affordable,
            )  # fmt: skip
        self.stores = [x.new_zeros(self.count + 1, x.shape[1], 0, x.shape[3]) for x in probed]
        """Keys of the first layer, its values, keys of the second, ..."""
        self.room = max(GROWTH, min(context, affordable // (self.count + 1)))
        """Tokens that a slot may come to hold; less than the context where memory is short."""
        self.rows_B: Tensor | None = None
        self.at: dict[int, Tensor] = {}
        self.seen = 0

    def reserve(self, tokens: int) -> None:
        """Let every slot hold so many tokens."""
        if tokens <= self.capacity:
            return
        capacity = -(-tokens // GROWTH) * GROWTH
        for number, old_SHCD in enumerate(self.stores):
            # Zeros, since what is masked is still multiplied, and memory may hold NaN.
            slots, heads, _, dim = old_SHCD.shape
            new_SHCD = old_SHCD.new_zeros(slots, heads, capacity, dim)
            new_SHCD[:, :, : self.capacity] = old_SHCD
            self.stores[number] = new_SHCD
        self.capacity = capacity

    def clear(self) -> None:
        """Give the memory back, whatever state it is in; it grows again."""
        self.capacity = 0
        self.stores = [store_SHCD[:, :, :0].clone() for store_SHCD in self.stores]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a sequence to another slot."""
        for store_SHCD in self.stores:
            store_SHCD[target, :, :tokens] = store_SHCD[source, :, :tokens]

    def run(self, slots: list[int] | None, ids: list[list[int]], starts: list[int]) -> Tensor:
        """Logits [B, V] after the last of the new tokens of each row.

        Args:
            slots: where the rows live; None: row i in slot i.
            ids: new tokens per row.
            starts: position of the first of them; all before are there already.
        """
        width = max(map(len, ids))
        self.seen = max(start + len(new) for start, new in zip(starts, ids, strict=True))
        self.reserve(self.seen)
        # Padding on the left: the last column is every row's last token.
        table = torch.tensor(
            [
                [[0] * (width - len(new)) + new for new in ids],
                [
                    [-1] * (width - len(new)) + list(range(start, start + len(new)))
                    for start, new in zip(starts, ids, strict=True)
                ],
            ]
        ).to(self.device)
        ids_BT, position_BT = table[0], table[1]
        if slots is None:
            self.rows_B = None
            slot_B = torch.arange(len(ids), device=self.device)
        else:
            slot_B = self.rows_B = torch.tensor(slots, device=self.device)
        # What padding computes goes to the spare slot at the end.
        slot_BT = torch.where(position_BT < 0, self.count, slot_B[:, None])
        position_BT = position_BT.clamp(min=0)
        for heads in {store.shape[1] for store in self.stores}:
            head_H1 = torch.arange(heads, device=self.device)[:, None]
            at_BHT = (slot_BT[:, None] * heads + head_H1) * self.capacity + position_BT[:, None]
            self.at[heads] = at_BHT.view(-1)
        out = self.model(
            input_ids=ids_BT,
            attention_mask=self._masks(position_BT),
            position_ids=position_BT,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self},
        )
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV

    def _masks(self, position_BT: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks [B, 1, T, K]; one per kind of layer where the model has several."""
        back_B1TK = position_BT[:, None, :, None] - torch.arange(self.seen, device=self.device)
        full_B1TK = additive(back_B1TK < 0, self.dtype)
        if not self.window or set(self.kinds) == {"full_attention"}:
            return full_B1TK
        near_B1TK = additive((back_B1TK < 0) | (back_B1TK >= self.window), self.dtype)
        if len(set(self.kinds)) < 2:
            return near_B1TK
        return {"full_attention": full_B1TK, "sliding_attention": near_B1TK}

    def update(
        self, keys_BHTD: Tensor, values_BHTD: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; returns all that the rows have, [B, H, K, D]."""
        keys_SHCD, values_SHCD = self.stores[2 * layer_idx : 2 * layer_idx + 2]
        return self._write(keys_SHCD, keys_BHTD), self._write(values_SHCD, values_BHTD)

    def _write(self, store_SHCD: Tensor, new_BHTD: Tensor) -> Tensor:
        rows, heads, _, dim = new_BHTD.shape
        at_N = self.at[heads]
        store_SHCD.view(-1, dim).index_copy_(0, at_N, new_BHTD.reshape(-1, dim))
        seen_SHKD = store_SHCD[:, :, : self.seen]
        if self.rows_B is None:
            return seen_SHKD[:rows]
        return seen_SHKD.index_select(0, self.rows_B)


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a position may be seen and the least number where it is hidden."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, torch.finfo(dtype).min
    )


def free_bytes(device: torch.device) -> int:
    """Memory that keys and values may take: most of what a GPU has free, a quarter of a CPU's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
