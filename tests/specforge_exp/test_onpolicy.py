"""Replay: the target's verdict is a plain forward's, the loss is the text's where text is proposed,
and acceptance is bench's."""

from dataclasses import replace
from functools import partial
from typing import Any

import families
import pytest
import torch
from conftest import small_target
from proofs import Forced, Partly
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from specforge_exp.bench.speculative import Decoding, generate, speculate
from specforge_exp.config import DraftConfig, LossConfig
from specforge_exp.config.onpolicy import OnPolicyConfig
from specforge_exp.drafts.dflash import DFlash
from specforge_exp.drafts.dflash.blocks import Blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.training import as_chains
from specforge_exp.drafts.dflash.training import weighting as dflash_weighting
from specforge_exp.drafts.eagle3 import Eagle3
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.training import weighting as eagle3_weighting
from specforge_exp.drafts.eagle3.unroll import unroll
from specforge_exp.drafts.head_loss import head_and_loss
from specforge_exp.drafts.replay import replay_outcome
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, ProposedLoss, opd
from specforge_exp.onpolicy.anchors import Draw, draw, missed
from specforge_exp.onpolicy.replay import Chooser, Replayer, stands
from specforge_exp.target import Head, Target
from specforge_exp.target.segments import check_segments, verify_segments
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Sample

K = 4
EAGLE3 = Eagle3Config(name="eagle3", draft_vocab_size=None, ttt_length=K, start="random")
DFLASH = DFlashConfig(
    name="dflash", block_size=K + 1, num_layers=2, num_features=3, loss_gamma=4.0, min_loss_tokens=1
)
slow = partial(pytest.param, marks=pytest.mark.slow)
KINDS = [
    pytest.param(Eagle3, EAGLE3, id="eagle3"),
    slow(Eagle3, replace(EAGLE3, num_layers=2, sliding_window=8), id="eagle3.1"),
    pytest.param(DFlash, DFLASH, id="dflash"),
    slow(DFlash, replace(DFLASH, block_size=K, sample_from_anchor=True), id="dflash from anchors"),
]
MIXTURE = LossConfig(name="m", lambda_ce=0.4, lambda_rkl=0.5, beta=0.1, lambda_tv=0.2)


def small(target: Target, kind: Any, cfg: DraftConfig) -> Any:
    size = len(target.embed_VH)
    mapping = {"d2t": torch.zeros(size, dtype=torch.long), "t2d": torch.ones(size).bool()}
    return kind.new(target, cfg, mapping, 3)


def batch_of(ids: list[Tensor], prompt: int = 5, step: int = 0) -> Batch:
    """Conversations whose answers begin at `prompt`."""
    turns = [(torch.arange(len(part)) >= prompt).long() for part in ids]
    numbers, lengths = list(range(len(ids))), [len(part) for part in ids]
    return Batch(torch.cat(ids), torch.cat(turns), numbers, lengths, 7, step=step)


@families.each_family
def test_verification_is_a_plain_forward(family: str) -> None:
    """Logits of every segment, with anchors further apart than a window; or refused, with why."""
    target = Target(families.build(families.FAMILIES[family]()).eval().requires_grad_(False), [1])
    if family in families.LINEAR_STATES | families.NOT_FED | {"DeepSeek-V3.2", "GLM-5"}:
        with pytest.raises(InputError, match=r"onpolicy judges .* keep more than keys and values"):
            check_segments(target, 60)
        return
    check_segments(target, 60)
    ids_T, tokens_JR = families.tokens(60), families.tokens(12, 1).view(4, 3)
    anchor_R = torch.tensor([55, 3, 41])
    cache = target.new_cache()
    target.features(ids_T[None], cache)
    logits_JRV = target.head(verify_segments(target, cache, anchor_R, tokens_JR))
    for chain, anchor in enumerate(anchor_R.tolist()):
        plain_T = torch.cat([ids_T[: anchor + 1], tokens_JR[:, chain]])
        plain_JV = target.model(plain_T[None]).logits[0, -4:]
        torch.testing.assert_close(logits_JRV[:, chain], plain_JV, rtol=1e-5, atol=1e-5)


def test_a_target_that_ignores_the_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by the check forward."""
    target = small_target()
    own = target.decoder.forward

    def deaf(ids: Tensor, position_ids: Tensor | None = None, **rest: Any) -> Any:
        return own(ids, **rest)  # positions as they stand in the cache

    monkeypatch.setattr(target.decoder, "forward", deaf)
    with pytest.raises(InputError, match=r"its states differ by .* from those of a plain forward"):
        check_segments(target, 60)


def greedy_text(target: Target, seed: int, new: int = 30) -> Tensor:
    size, seeded = len(target.embed_VH), torch.Generator().manual_seed(seed)
    prompt = torch.randint(size, (5,), generator=seeded).tolist()
    return torch.tensor([*prompt, *generate(target, prompt, Decoding(new)).tokens])


def forced_sample(target: Target, anchors: list[Tensor]) -> Sample:
    """Two packed greedy texts, the text itself proposed after these anchors."""
    batch = batch_of([greedy_text(target, 1), greedy_text(target, 2)])
    packed_R = torch.cat([anchors[0], anchors[1] + batch.lengths[0]])
    tokens_KR = batch.ids_T[packed_R + torch.arange(1, K + 1)[:, None]]
    options = OnPolicyConfig(name="replay")
    replayer = Replayer(options, Forced(tokens_KR), target, K, 512)
    sample = replayer.sample(replace(batch, step=-1))
    caches = []
    for ids_T in batch.ids_T.split(batch.lengths):
        caches.append(target.new_cache())
        target.features(ids_T[None], caches[-1])
    replay = replayer.judged(sample, caches, anchors, torch.zeros(2, K, len(packed_R)))
    assert replay.accepted_RK.all()
    assert replay.counts_RK.all()
    return replace(sample, replay=replay)


def restricted(draft: Any, cfg: Any, sample: Sample, head: Head) -> Tensor:
    """Level 0 at the anchors alone."""
    assert sample.replay is not None
    anchor_R, window_K = (
        sample.replay.anchor_R,
        torch.full((K,), float(sample.replay.anchor_R.numel())),
    )
    start_T, end_T = document_bounds(sample.lengths, anchor_R.device)
    counted = torch.ones(len(anchor_R), K, dtype=torch.bool)
    loss = Loss(opd, MIXTURE)
    if isinstance(cfg, Eagle3Config):
        rows = [len(anchor_R)] * K
        chains = Chains(start_T, end_T, sample.lengths, anchor_R - 1, rows, list(counted.T))
        states = unroll(draft, chains, sample.ids_T, sample.aux_TA)
        weights = eagle3_weighting(loss, cfg, window_K, len(sample.ids_T), None)
    else:
        blocks = Blocks(anchor_R, start_T, end_T, counted)
        chains = as_chains(blocks, sample.lengths)
        state_QH = draft.states(sample.ids_T, sample.aux_TA, blocks, cfg.block_size)
        state_RSH = state_QH.unflatten(0, (-1, cfg.block_size))
        states = list(state_RSH[:, draft.first_slot :].transpose(0, 1))
        weights = dflash_weighting(loss, cfg, window_K)
    return head_and_loss(chains, states, draft.heads(sample, head), weights).loss


@pytest.mark.parametrize(("kind", "cfg"), KINDS)
def test_the_targets_own_text_gives_level_0(kind: Any, cfg: Any) -> None:
    """Loss and gradients at these positions, in packed conversations."""
    target = small_target()
    draft = small(target, kind, cfg)
    sample = forced_sample(target, [torch.tensor([6, 9, 20]), torch.tensor([5, 17])])
    decay = cfg.ttt_decay if kind is Eagle3 else float(torch.exp(torch.tensor(-1 / cfg.loss_gamma)))
    proposed = ProposedLoss(Loss(opd, MIXTURE), Loss(opd, MIXTURE), decay)
    window_K = torch.full((K,), 5.0)
    outcome = replay_outcome(
        draft, sample, target.head, Loss(opd, MIXTURE, 1.0, proposed), cfg, window_K
    )
    outcome.loss.backward()
    found = {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad(set_to_none=True)
    expected = restricted(draft, cfg, sample, target.head)
    expected.backward()
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-5, atol=0)
    assert found
    for name, weight in draft.named_parameters():
        if weight.grad is not None:
            scale = float(weight.grad.abs().max())
            assert float((found[name] - weight.grad).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize(("kind", "cfg"), KINDS)
def test_acceptance_is_that_of_bench(kind: Any, cfg: Any) -> None:
    """At the places where bench's verifications began, as many tokens are accepted."""
    target = small_target()
    draft = small(target, kind, cfg)
    replayer = Replayer(OnPolicyConfig(name="replay"), draft, target, K, 512)
    sample = replayer.sample(batch_of([greedy_text(target, seed) for seed in range(6)], step=-1))
    optimizer = torch.optim.Adam(draft.parameters(), 1e-2)
    window_K = draft.denominators(cfg, sample)
    for _ in range(40):  # a draft that is right now and then
        optimizer.zero_grad()
        loss, _ = draft(sample, target.head, Loss(opd, MIXTURE), cfg, window_K)
        loss.backward()
        optimizer.step()
    accepted = []
    for seed in range(6):
        prompt = greedy_text(target, seed)[:5].tolist()
        answer = speculate(target, draft.decoder(), draft.draft_ids_D, prompt, Decoding(24, K))
        ids_T = torch.tensor([*prompt, *answer.tokens])
        began_R = 5 + torch.tensor([0, *answer.gained]).cumsum(0)[:-1]
        kept = began_R + K < len(ids_T)  # those whose proposals lie within the text
        if not kept.any():
            continue
        sample = replayer.sample(batch_of([ids_T], step=-1))
        cache = target.new_cache()
        target.features(ids_T[None], cache)
        numbers = torch.zeros(2, K, int(kept.sum()))
        replay = replayer.judged(sample, [cache], [began_R[kept]], numbers)
        expected = [n for n, keep in zip(answer.accepted, kept.tolist(), strict=True) if keep]
        assert replay.accepted_RK.sum(1).tolist() == expected
        accepted += expected
    assert {0, 1, 2, K} <= set(accepted)


@pytest.mark.parametrize(("kind", "cfg"), KINDS)
def test_proposals_are_the_decoders(kind: Any, cfg: Any) -> None:
    """Greedy chains in packed conversations are what the decoder drafts after the same tokens."""
    target = small_target()
    draft = small(target, kind, cfg)
    parts = [greedy_text(target, 1), greedy_text(target, 2)]
    replayer = Replayer(OnPolicyConfig(name="replay"), draft, target, K, 512)
    sample = replayer.sample(batch_of(parts, step=-1))
    anchors = [(0, 8), (1, 5), (1, 20)]
    anchor_R = torch.tensor([at + conversation * len(parts[0]) for conversation, at in anchors])
    tokens_KR, *_ = replayer.propose(sample, anchor_R, torch.zeros(K, 3))
    for chain, (conversation, at) in enumerate(anchors):
        ids_T = parts[conversation]
        decoder = draft.decoder()
        aux_1TA, _ = target.features(ids_T[None, :at])
        decoder.commit(aux_1TA, ids_T[1 : at + 1].tolist())
        tokens, _ = decoder.propose(K, lambda logits: int(logits.argmax()))
        assert tokens_KR[:, chain].tolist() == tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_replay_is_a_function_of_epoch_and_conversation(temperature: float) -> None:
    """Not of what a conversation is packed with; its chains end at the first rejection."""
    target = small_target()
    draft = small(target, Eagle3, EAGLE3)
    options = OnPolicyConfig(name="replay", temperature=temperature, anchors=6)
    replayer = Replayer(options, draft, target, K, 512)
    batch = batch_of([greedy_text(target, 1), greedy_text(target, 2)])
    together = replayer.sample(batch).replay
    length = batch.lengths[0]
    alone = replayer.sample(
        Batch(batch.ids_T[length:], batch.turns_T[length:], [1], batch.lengths[1:], 7, step=0)
    ).replay
    assert together is not None
    assert alone is not None
    later = together.anchor_R >= length
    assert (together.anchor_R[later] - length).tolist() == alone.anchor_R.tolist()
    assert together.tokens_KR[:, later].tolist() == alone.tokens_KR.tolist()
    assert together.accepted_RK[later].tolist() == alone.accepted_RK.tolist()
    accepted_R = together.accepted_RK.sum(1)
    at_K = torch.arange(K)
    assert not (together.counts_RK & (at_K > accepted_R[:, None])).any()
    assert together.counts_RK[:, 0].all()
    other = replayer.sample(replace(batch, draw=8)).replay
    assert other is not None
    assert other.anchor_R.tolist() != together.anchor_R.tolist()
    chains = sum(len(each.anchor_R) for each in (together, alone, other))
    assert replayer.verified == (K - 1) * chains
    assert replayer.read == 2 * sum(batch.lengths) + batch.lengths[1]


def test_sampled_tokens_stand_by_the_rule_of_bench() -> None:
    """With probability min(1, p / q), at the temperature."""
    generator = torch.Generator().manual_seed(0)
    head, N = Head(torch.randn(7, 5, generator=generator)), 4000
    hidden_1H = torch.randn(1, 5, generator=generator)
    logits_1D = torch.randn(1, 7, generator=generator)
    never = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]])  # also by the number 0
    assert Chooser(1.0, torch.zeros(1, 1))(0, never).tolist() == [1]
    chooser = Chooser(1.5, torch.rand(1, N, generator=generator, dtype=torch.float64))
    tokens_1N = chooser(0, logits_1D.expand(N, -1))[None]
    numbers_1N = torch.rand(1, N, generator=generator, dtype=torch.float64)
    states_1NH, log_q_1N = hidden_1H[None].expand(1, N, 5), torch.stack(chooser.log_q)
    found_1N = stands(head, states_1NH, tokens_1N, log_q_1N, numbers_1N, 1.5)
    p_V, q_V = (torch.softmax(x[0].double() / 1.5, -1) for x in (head(hidden_1H), logits_1D))
    share_V = torch.bincount(tokens_1N[0], minlength=7) / N
    assert float((share_V - q_V).abs().max()) < 0.03
    assert found_1N.equal(numbers_1N * q_V[tokens_1N] < p_V[tokens_1N])


def test_anchors_stand_before_what_was_missed() -> None:
    """Within the turn, each once, up to the share."""
    ids_T, turns_T = torch.arange(10, 22), torch.tensor([0] * 3 + [1] * 9)
    right = ids_T[torch.tensor([3, 6, 7]) + torch.arange(1, 5)[:, None]]
    wrong = right.clone()
    wrong[2, 0], wrong[0, 1] = 0, 0  # the third token after 3 and the first after 6
    assert missed(torch.tensor([3, 6, 7]), wrong, ids_T, turns_T).tolist() == [5, 6]
    assert missed(torch.tensor([3, 6, 7]), right, ids_T, turns_T).tolist() == []
    half = OnPolicyConfig(name="replay", anchors=99, budget=0.5)  # of 12 tokens, 3 per chain
    assert [draw(half, 1, 2, turns_T > 0, steps).most for steps in (4, 1)] == [2, 99]
    own = draw(OnPolicyConfig(name="replay", anchors=4), 1, 2, turns_T > 0, 4)
    chosen = own.with_errors(torch.tensor([5, 6]), 0.5)
    assert {5, 6} <= set(chosen.tolist()) and len(set(chosen.tolist())) == 4
    three = Draw(torch.Generator().manual_seed(0), torch.arange(999), 3)
    assert int((three.with_errors(torch.tensor([5, 6]), 0.5) < 9).sum()) == 1


def chain_of(
    target: Target, draft: Any, ids_T: Tensor, at: int, tokens_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of draft and target, [K, V] each, at prefixes of tokens after `at`."""
    decoder, forced = draft.decoder(), iter(tokens_K.tolist())
    aux_1TA, _ = target.features(ids_T[None, :at])
    decoder.commit(aux_1TA, ids_T[1 : at + 1].tolist())
    _, logits = decoder.propose(len(tokens_K), lambda logits: next(forced))
    plain_T = torch.cat([ids_T[: at + 1], tokens_K[:-1]])
    served_KV = target.model(plain_T[None]).logits[0, -len(tokens_K) :]
    return torch.log_softmax(torch.stack(logits), -1), torch.log_softmax(served_KV, -1)


@pytest.mark.parametrize("options", [{}, {"beyond": 2}, {"length": 2, "decay": 0.5}], ids=str)
@pytest.mark.parametrize(("kind", "cfg"), KINDS)
def test_the_loss_is_what_its_formula_says(kind: Any, cfg: Any, options: dict[str, Any]) -> None:
    """In packed conversations, over a window of two samples, each proposed position by itself."""
    target = small_target(vocabulary=4)
    draft = small(target, kind, cfg)
    own = OnPolicyConfig(name="replay", anchors=6, **options)
    steps = own.length or K
    replayer = Replayer(own, Partly(), target, steps, 512)
    texts = [greedy_text(target, seed) for seed in (1, 2, 3)]
    together = replayer.sample(batch_of(texts[:2]))
    samples = [together, replayer.sample(replace(batch_of(texts[2:]), numbers=[2]))]
    window_K, expected = torch.zeros(2 * K, dtype=torch.float64), []
    for sample in samples:
        replay = sample.replay
        assert replay is not None
        lengths = replay.accepted_RK.sum(1).tolist()
        assert len(set(lengths)) > 2 and lengths != sorted(lengths, reverse=True)
        window_K[K : K + steps] += replay.counts_RK.sum(0)
        starts = torch.tensor([0, *sample.lengths]).cumsum(0)
        for row, anchor in enumerate(replay.anchor_R.tolist()):
            which = int((starts[1:] <= anchor).sum())
            ids_T, at = sample.ids_T.split(sample.lengths)[which], anchor - int(starts[which])
            tokens_K = replay.tokens_KR[:, row]
            logq_KV, logp_KV = chain_of(target, draft, ids_T, at, tokens_K)
            right = int((logp_KV.argmax(-1) == tokens_K).int().cumprod(0).sum())
            ends = len(ids_T) - 1 - at  # where all is the text, nothing follows its last token
            said = (tokens_K[:ends] == ids_T[at + 1 : at + 1 + steps]).all()
            last = min(steps, right + 1 + own.beyond, ends if said else steps)
            assert replay.counts_RK[row].tolist() == [k < last for k in range(steps)]
            for k in range(last):
                q, p = logq_KV[k], logp_KV[k]
                value = -(p.exp() * q).sum() if k < right else (q.exp() * (q - p)).sum()
                expected.append(own.decay**k * float(value))
    decay_K = own.decay ** torch.arange(steps, dtype=torch.float64)
    divisor = float((decay_K * window_K[K : K + steps]).sum())
    scale = float(decay_K.sum()) if kind is Eagle3 else 1.0
    parts = [Loss(opd, LossConfig(name=n, **{n: 1.0})) for n in ("lambda_ce", "lambda_rkl")]
    loss = Loss(opd, MIXTURE, 0.0, ProposedLoss(parts[0], parts[1], own.decay))
    found = 0.0
    for sample in samples:
        value, outcome = draft(sample, target.head, loss, cfg, window_K)
        value.backward()
        found += float(value.detach())
        assert float(outcome.sums["onpolicy/loss"]) == pytest.approx(float(value.detach()))
    assert found == pytest.approx(scale * sum(expected) / divisor, rel=1e-4)


@pytest.mark.parametrize(("kind", "cfg"), [KINDS[0], KINDS[2]])
def test_the_text_is_only_measured(kind: Any, cfg: Any) -> None:
    """With its weight 0; before onpolicy.start and held out it has its whole weight."""
    target = small_target()
    draft = small(target, kind, cfg)
    sample = Replayer(OnPolicyConfig(name="replay"), draft, target, K, 512).sample(
        batch_of([greedy_text(target, 1)], step=3)
    )
    assert sample.replay is not None
    proposed = ProposedLoss(Loss(opd, MIXTURE), None, 0.8, start=3)
    window_K = torch.cat([draft.denominators(cfg, sample), sample.replay.counts_RK.sum(0)])
    bare = replace(sample, replay=None)
    value, outcome = draft(bare, target.head, Loss(opd, MIXTURE, 0.0, proposed), cfg, window_K)
    assert not value.requires_grad
    assert float(value) == 0
    plain, whole = draft(bare, target.head, Loss(opd, MIXTURE), cfg, window_K)
    assert float(plain.detach()) > 0
    assert outcome.sums["alpha"].tolist() == whole.sums["alpha"].tolist()
    assert outcome.flops == whole.flops / 3
    for step in (2, -1):
        early = replace(bare, step=step)
        value, _ = draft(early, target.head, Loss(opd, MIXTURE, 0.0, proposed), cfg, window_K)
        assert float(value.detach()) == float(plain.detach())
        assert value.requires_grad


@pytest.mark.parametrize(("kind", "cfg"), KINDS)
@pytest.mark.parametrize("length", [2, K])
def test_proposing_is_counted(kind: Any, cfg: Any, length: int) -> None:
    """FLOP of the products, of which only attention's and what is made twice are left out."""
    target = small_target(vocabulary=512)
    draft = small(target, kind, cfg)
    replayer = Replayer(OnPolicyConfig(name="replay"), draft, target, length, 512)
    sample = replayer.sample(batch_of([torch.arange(40)], step=-1))
    with FlopCounterMode(display=False) as counter:
        _, _, flops = replayer.propose(sample, torch.arange(6, 30), torch.zeros(length, 24))
    assert 0.7 < flops / counter.get_total_flops() <= 1
