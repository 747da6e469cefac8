"""After which tokens of a conversation the draft proposes, and by which random numbers.

Both follow from seed, epoch and conversation, so a resumed training finds them again.

Shape suffixes: T tokens, R anchors, K steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.config.onpolicy import OnPolicyConfig


@dataclass(frozen=True)
class Draw:
    """Random numbers of one conversation in one epoch."""

    generator: torch.Generator
    possible: Tensor
    """Positions that may be anchors."""
    most: int
    """Anchors, at most."""

    def uniform(self) -> Tensor:
        """Anchors [R], each of the possible ones as likely."""
        order = torch.randperm(len(self.possible), generator=self.generator)
        return self.possible[order[: self.most]].sort().values

    def with_errors(self, errors: Tensor, share: float) -> Tensor:
        """Anchors [R]: some of `errors`, rising, as far as the share goes; the rest uniform."""
        errors = errors[torch.isin(errors, self.possible)]
        order = torch.randperm(len(errors), generator=self.generator)
        chosen = errors[order[: int(share * self.most)]]
        rest = self.possible[~torch.isin(self.possible, chosen)]
        order = torch.randperm(len(rest), generator=self.generator)
        anchor_R = torch.cat([chosen, rest[order[: self.most - len(chosen)]]])
        return anchor_R.sort().values

    def numbers(self, steps: int, anchors: int) -> Tensor:
        """Numbers in [0, 1), [2, K, R]: to choose tokens by, and to accept them by."""
        return torch.rand(2, steps, anchors, generator=self.generator, dtype=torch.float64)


def draw(cfg: OnPolicyConfig, seed: int, number: int, possible_T: Tensor, steps: int) -> Draw:
    """Of a conversation.

    Args:
        cfg: how many anchors.
        seed: of the run and the epoch.
        number: of the conversation.
        possible_T: whether its tokens may be anchors.
        steps: tokens proposed after each; steps - 1 of them the target reads.
    """
    mixed = (seed * 2_246_822_519 + number * 3_266_489_917 + 374_761_393) % 2**32
    tokens = int(cfg.budget * len(possible_T))
    most = min(cfg.anchors, tokens // (steps - 1) if steps > 1 else cfg.anchors)
    return Draw(torch.Generator().manual_seed(mixed), possible_T.nonzero()[:, 0], most)


def missed(anchor_R: Tensor, tokens_KR: Tensor, ids_T: Tensor, turns_T: Tensor) -> Tensor:
    """The tokens of the text before those that proposals from these anchors missed, each once.

    A chain that says the text to the end of its turn, or of its steps, missed nothing.
    """
    steps = len(tokens_KR)
    at_KR = anchor_R + torch.arange(1, steps + 1)[:, None]
    inside_KR = at_KR < len(ids_T)
    at_KR = at_KR.clamp(max=len(ids_T) - 1)
    inside_KR &= turns_T[at_KR] == turns_T[anchor_R]
    same_KR = tokens_KR == ids_T[at_KR]
    right_R = (same_KR & inside_KR).int().cumprod(0).sum(0)
    failed_R = (right_R < steps) & inside_KR.gather(0, right_R.clamp(max=steps - 1)[None])[0]
    before: Tensor = (anchor_R + right_R)[failed_R].unique()
    return before
