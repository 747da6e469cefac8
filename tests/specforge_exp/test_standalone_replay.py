"""A stand-alone draft on what it proposes: as the other drafts in test_onpolicy.py."""

import pytest
import test_onpolicy as onpolicy
import torch
from conftest import small_target
from torch.utils.flop_counter import FlopCounterMode

from specforge_exp.config.onpolicy import OnPolicyConfig
from specforge_exp.drafts.head_loss import head_and_loss
from specforge_exp.drafts.replay import replay_outcome
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.drafts.standalone import Standalone
from specforge_exp.drafts.standalone.config import StandaloneConfig
from specforge_exp.drafts.weighting import weighted
from specforge_exp.losses import Loss, ProposedLoss, opd
from specforge_exp.onpolicy.replay import Replayer

K = onpolicy.K
OPTIONS = StandaloneConfig(
    name="standalone", init="random", config={"num_hidden_layers": 2}, horizon=K
)
WINDOWED = StandaloneConfig(
    name="standalone", init="random", horizon=K,
    config={
        "num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)  # fmt: skip


@pytest.mark.parametrize("cfg", [OPTIONS, WINDOWED], ids=["plain", "windowed"])
def test_the_targets_own_text_gives_level_0(cfg: StandaloneConfig) -> None:
    """Loss and gradients at these positions, in packed conversations."""
    target = small_target()
    draft = onpolicy.small(target, Standalone, cfg)
    sample = onpolicy.forced_sample(target, [torch.tensor([6, 9, 20]), torch.tensor([5, 17])])
    assert sample.replay is not None
    loss, window_K = Loss(opd, onpolicy.MIXTURE), torch.full((K,), 5.0)
    both = Loss(opd, onpolicy.MIXTURE, 1.0, ProposedLoss(loss, loss, 0.8))
    outcome = replay_outcome(draft, sample, target.head, both, cfg, window_K)
    outcome.loss.backward()
    found = {name: weight.grad.clone() for name, weight in draft.named_parameters()}
    draft.zero_grad()

    anchor_R = sample.replay.anchor_R
    states_TH = draft.causal.states(sample.ids_T, sample.lengths)
    rows, counted_R = [len(anchor_R)] * K, torch.ones(len(anchor_R), dtype=torch.bool)
    bounds = document_bounds(sample.lengths, anchor_R.device)
    chains = Chains(*bounds, sample.lengths, anchor_R - 1, rows, [counted_R] * K)
    decay_K = 0.8 ** torch.arange(K)
    weights = weighted(loss, decay_K / (decay_K * window_K).sum(), decay_K)
    states = [states_TH[anchor_R + step] for step in range(K)]
    expected = head_and_loss(chains, states, draft.heads(sample, target.head), weights).loss
    expected.backward()
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-5, atol=0)
    for name, weight in draft.named_parameters():
        scale = float(weight.grad.abs().max())
        assert float((found[name] - weight.grad).abs().max()) <= 1e-5 * scale, name


def test_acceptance_is_that_of_bench() -> None:
    onpolicy.test_acceptance_is_that_of_bench(Standalone, OPTIONS)


def test_proposing_is_counted() -> None:
    """All products, and the text's scores; torch counts the former alone."""
    target = small_target(vocabulary=512)
    draft = onpolicy.small(target, Standalone, OPTIONS)
    replayer = Replayer(OnPolicyConfig(name="replay"), draft, target, K, 512)
    sample = replayer.sample(onpolicy.batch_of([torch.arange(40)], step=-1))
    with FlopCounterMode(display=False) as counter:
        _, _, flops = replayer.propose(sample, torch.arange(6, 30), torch.zeros(K, 24))
    config = draft.model.config
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    pairs = 40**2 / 2 + (K - 1) * 24 / 2  # a proposed token counts as a text by itself
    assert flops == counter.get_total_flops() + 4 * width * pairs


@pytest.mark.parametrize("cfg", [OPTIONS, WINDOWED], ids=["plain", "windowed"])
def test_proposals_are_plain_forwards(cfg: StandaloneConfig) -> None:
    """Greedy chains in packed conversations are what the model says token by token."""
    target = small_target()
    draft = onpolicy.small(target, Standalone, cfg)
    parts = [onpolicy.greedy_text(target, 1), onpolicy.greedy_text(target, 2)]
    replayer = Replayer(OnPolicyConfig(name="replay"), draft, target, K, 512)
    sample = replayer.sample(onpolicy.batch_of(parts, step=-1))
    anchors = [(0, 8), (1, 5), (1, 20)]
    anchor_R = torch.tensor([at + conversation * len(parts[0]) for conversation, at in anchors])
    draft.model.train()  # as a step before it leaves the model
    draft.model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens_KR, *_ = replayer.propose(sample, anchor_R, torch.zeros(K, 3))
    for chain, (conversation, at) in enumerate(anchors):
        ids = parts[conversation][: at + 1].tolist()
        for step in range(K):
            ids.append(int(draft.model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert tokens_KR[step, chain] == ids[-1]
