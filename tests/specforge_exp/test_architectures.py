"""Both drafts beside each other, in the shape of Qwen3-8B: how large they are, what they learn."""

import torch
from test_launches import dflash, eagle3
from test_losses import rows
from torch import nn

from specforge_exp.config import LossConfig
from specforge_exp.losses import opd


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def test_parameters_beside_each_other() -> None:
    """EAGLE-3 is one layer of twice the width, a projection and a head; DFlash five layers."""
    H, F, heads, kv, D = 4096, 12288, 32 * 128, 8 * 128, 32000
    mlp, attention = 3 * H * F, 2 * H * heads + 2 * H * kv
    own, other = eagle3()[0], dflash()[0]
    wide = H * (2 * kv + heads)  # queries, keys and values also read the embedding
    expected = 3 * H * H + mlp + attention + wide + D * H
    assert 0 <= count(own) - expected <= 10 * H  # norms
    layers = 5 * (mlp + attention)
    assert 0 <= count(other) - layers - 3 * H * H <= 25 * H
    assert 1.9 < count(other) / count(own) < 2.6


def test_cross_entropy_is_kl_and_the_targets_entropy() -> None:
    """So both have one gradient, and the losses of runs differ by what no draft can change."""
    logits_ND, teacher = rows(4)
    ce_N = opd(logits_ND, teacher, LossConfig(name="ce", lambda_ce=1.0)).loss_N
    logp_ND = teacher.logp_ND
    kl_N = (logp_ND.exp() * (logp_ND - logits_ND.log_softmax(-1))).sum(-1)
    entropy_N = -(logp_ND.exp() * logp_ND).sum(-1)
    torch.testing.assert_close(ce_N, kl_N + entropy_N)
    [of_ce] = torch.autograd.grad(ce_N.sum(), logits_ND, retain_graph=True)
    [of_kl] = torch.autograd.grad(kl_N.sum(), logits_ND)
    torch.testing.assert_close(of_ce, of_kl)
