"""P-EAGLE as the stages use it: EAGLE-3's layers, whose depths are guessed side by side.

Shape suffixes: T tokens, A three target hidden sizes, K depths.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specforge_exp.drafts.eagle3.chains import nothing_to_learn
from specforge_exp.drafts.eagle3.draft import Eagle
from specforge_exp.drafts.eagle3.training import needed_flops, speculators_weighting
from specforge_exp.drafts.eagle3.unroll import Fed
from specforge_exp.drafts.head_loss import head_and_loss
from specforge_exp.drafts.peagle.config import PEagleConfig
from specforge_exp.drafts.peagle.decoder import PEagleDecoder
from specforge_exp.drafts.peagle.rows import make_chains, make_masks
from specforge_exp.drafts.weighting import Weighting, weighted
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss
from specforge_exp.target import Head
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Outcome, Sample


class PEagle(Eagle[PEagleConfig]):
    """A P-EAGLE draft; `mask_hidden` stands for the target's states that do not exist yet."""

    own: ClassVar[tuple[str, ...]] = ("mask_token_id",)
    algorithm: ClassVar[str] = "peagle"

    def __init__(self, *arguments: Any) -> None:
        """See `Eagle3Model`."""
        super().__init__(*arguments)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, self.fc.in_features))

    @classmethod
    def entries(cls, cfg: PEagleConfig, vocabulary: int) -> dict[str, Any]:
        """The mask token.

        Raises:
            InputError: the target has no such token.
        """
        mask = vocabulary - 1 if cfg.mask_token_id is None else cfg.mask_token_id
        if mask >= vocabulary:
            raise InputError(
                f"draft.mask_token_id={mask}: the target has tokens 0..{vocabulary - 1}"
            )
        return {"mask_token_id": mask}

    @classmethod
    def opened(cls, folder: Path, layers: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As `Eagle.opened`; vLLM takes `mask_hidden` in any shape."""
        config, tensors = super().opened(folder, layers)
        if "mask_hidden" in tensors:
            tensors["mask_hidden"] = tensors["mask_hidden"].reshape(1, 1, -1)
        return config, tensors

    @staticmethod
    def sglang_options(chain_length: int) -> dict[str, Any]:
        """None: SGLang 0.5.23 has no P-EAGLE."""
        return {}

    @staticmethod
    def vllm_options(chain_length: int) -> dict[str, Any]:
        """vLLM's configuration of speculation with so many depths, but for the folder."""
        return {
            "method": "eagle3", "num_speculative_tokens": chain_length, "parallel_drafting": True,
        }  # fmt: skip

    def fed(self, cfg: PEagleConfig) -> Fed:
        """The mask at every depth but the first."""
        return Fed(self.config.mask_token_id, self.mask_hidden.view(1, -1))

    def decoder(self) -> PEagleDecoder:
        """A decoder for one request."""
        return PEagleDecoder(self, self.mask_hidden.detach().view(1, -1))

    @staticmethod
    def nothing_to_learn(cfg: PEagleConfig, turns_T: Tensor, lengths_B: Tensor) -> dict[str, int]:
        """See `chains.nothing_to_learn`."""
        return nothing_to_learn(cfg.supervision, turns_T, lengths_B)

    def denominators(self, cfg: PEagleConfig, batch: Batch) -> Tensor:
        """How many slots train at each depth; [K] float64."""
        return torch.stack([mask_T.sum() for mask_T in make_masks(cfg, batch)]).double()

    def objective(
        self,
        sample: Sample,
        target_head: Head,
        loss: Loss,
        cfg: PEagleConfig,
        window_K: Tensor,
    ) -> Outcome:
        """Guess packed conversations at all depths and compare with the target.

        The gradient of its head exists when this returns. Arguments as in `Draft.objective`.
        """
        chains = make_chains(cfg, sample)
        states, heads = self.states_and_heads(sample, target_head, loss, cfg, chains)
        weights = weighting(loss, cfg, window_K.to(sample.ids_T.device))
        outcome = head_and_loss(chains, states, heads, weights)
        attn, H = self.midlayer.self_attn, self.config.hidden_size
        once = H * sum(len(proj.weight) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        repeated = 6.0 * once * sum(chains.counts[1:])  # all masked rows enter as one
        return replace(outcome, flops=outcome.flops + needed_flops(self, chains) - repeated)


def weighting(loss: Loss, cfg: PEagleConfig, window_K: Tensor) -> Weighting:
    """The weights of the terms at every depth: decay over the window's sum of decays."""
    decay_K = cfg.depth_decay ** torch.arange(cfg.num_depths, device=window_K.device)
    total = (decay_K * window_K).sum()
    if cfg.supervision == "speculators":
        return speculators_weighting(loss.cfg, decay_K / (total + 1e-5), decay_K)
    return weighted(loss, (decay_K / total.clamp(min=1e-9)).float(), decay_K)
