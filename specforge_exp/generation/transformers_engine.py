"""Answers by the target in this process: batches through transformers' own `generate`."""

from collections.abc import Iterator
from typing import Any

import torch

from specforge_exp.chat import eos_token_ids
from specforge_exp.config import Config
from specforge_exp.target import load_target, load_tokenizer, set_up_torch


class TransformersEngine:
    """Generates answers for batches of rendered prompts.

    Raises:
        InputError: the target cannot be loaded.
    """

    def __init__(self, cfg: Config) -> None:
        self.tokenizer = load_tokenizer(cfg.model)
        self.target = load_target(cfg.model, set_up_torch(cfg), cfg.model.dtype)
        self.options = cfg.regen
        self.eos = sorted(eos_token_ids(cfg.model.path, self.tokenizer))

    @torch.no_grad()
    def answers(self, prompts: list[list[int]], seed: int) -> Iterator[tuple[str, int, bool]]:
        """Text, number of tokens and whether it ended by itself, per prompt, in order.

        Args:
            prompts: token ids; padded on the left here.
            seed: of the samples, so that a resumed run says the same.
        """
        width = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        pad = self.eos[0] if pad is None else pad
        ids_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        torch.manual_seed(seed)
        sampled = self.options.temperature > 0
        chosen: dict[str, Any] = {"do_sample": sampled}
        if sampled:
            chosen |= {"temperature": self.options.temperature, "top_p": self.options.top_p}
            chosen |= {"top_k": 0}
        out_BT = self.target.model.generate(
            ids_BT.to(self.target.device),
            attention_mask=mask_BT.to(self.target.device),
            max_new_tokens=self.options.max_tokens,
            eos_token_id=self.eos,
            pad_token_id=pad,
            **chosen,
        )
        for row in out_BT[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in self.eos), None)
            kept = row if end is None else row[:end]
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            yield text, len(kept) + (end is not None), end is not None
