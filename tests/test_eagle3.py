"""The draft: training and serving see the same states, and only supervised rows count."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import small_target
from torch import Tensor

from specforge_exp.config import DraftConfig, LossConfig
from specforge_exp.drafts.eagle3 import Eagle3, draft_config
from specforge_exp.drafts.eagle3_training import denominators, turn_masks
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.losses import acceptance_rate, opd, teacher_rows
from specforge_exp.target import Target
from specforge_exp.training.objective import Outcome, Sample

K, T, V = 4, 14, 64
CFG = DraftConfig(name="eagle3", draft_vocab_size=40, ttt_length=K)
LOSS = (opd, LossConfig(name="m", lambda_ce=0.4, lambda_rkl=0.5, beta=0.1))


def small_draft(target: Target, size: int = 40) -> Eagle3:
    counts = torch.randint(0, 9, (V,), generator=torch.Generator().manual_seed(1))
    cfg = replace(CFG, draft_vocab_size=size)
    return Eagle3.new(target, cfg, vocabulary_mapping(counts, size), seed=3)


def conversations(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Random tokens; two assistant turns and a prompt before, between and after them."""
    ids = torch.randint(0, V, (rows, T), generator=torch.Generator().manual_seed(seed))
    turns = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0])
    return ids, turns.expand(rows, T)


def outcome(draft: Eagle3, target: Target, ids: Tensor, turns: Tensor, window: Tensor) -> Outcome:
    aux, last = target.features(ids)
    return draft.objective(Sample(ids, turns, aux, last), target.head, LOSS, CFG, window)


def test_decoder_repeats_the_unroll(random_target: Target) -> None:
    """Every state of the training unroll is the one that serving reaches."""
    draft = small_draft(random_target)
    ids, _ = conversations(0, 1)
    aux, _ = random_target.features(ids)
    states = list(draft.unroll(F.pad(ids[:, 1:], (0, K)), aux, K, None))
    for slot in (0, 3, T - K - 2):
        decoder = draft.decoder()
        half = slot // 2 + 1  # two commits, as after two verifications
        tokens = ids[0, 1 : slot + 2].tolist()
        decoder.commit(aux[:, :half], tokens[:half])
        if tokens[half:]:
            decoder.propose(K, lambda logits: int(logits.argmax()))  # forgotten by the next commit
            decoder.commit(aux[:, half : slot + 1], tokens[half:])
        state = decoder.state_11H
        for step in range(K):
            torch.testing.assert_close(state[0, 0], states[step][0, slot], rtol=1e-4, atol=1e-5)
            token = ids[:, slot + 2 + step][None]
            state = decoder.advance(token, state, slot + 1 + step)


def test_supervision_is_what_serving_reaches() -> None:
    turns = torch.tensor([[0, 1, 1, 1, 0, 2, 2, 0]])
    masks = [mask[0].nonzero().flatten().tolist() for mask in turn_masks("inference", turns, 3)]
    assert masks == [[0, 1, 4], [0], []]
    assert denominators(replace(CFG, ttt_length=3), turns).tolist() == [3, 1, 0]


def test_loss_of_a_row_by_hand(random_target: Target) -> None:
    """One supervised slot: the loss is the formula on that row's logits."""
    draft = small_draft(random_target)
    ids, _ = conversations(5, 1)
    turns = torch.zeros(1, T, dtype=torch.long)
    turns[0, 6:8] = 1
    window = denominators(CFG, turns)
    found = outcome(draft, random_target, ids, turns, window)
    assert found.sums["rows"].tolist() == [1, 0, 0, 0]
    aux, last = random_target.features(ids)
    state = next(draft.unroll(F.pad(ids[:, 1:], (0, K)), aux, K, None))
    logits = draft.lm_head(draft.norm(state[0, 5:6]))
    full = random_target.head(last[0, 6:7])
    rows = teacher_rows(full[:, draft.draft_ids_D], torch.logsumexp(full, -1))
    torch.testing.assert_close(found.loss, opd(logits, rows, LOSS[1]).loss_N[0])
    alpha = acceptance_rate(torch.log_softmax(logits, -1), rows)
    torch.testing.assert_close(found.sums["alpha"][0], alpha[0].detach())


def gradients(draft: Eagle3) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad(set_to_none=True)
    return found


def test_window_is_normalised_once(random_target: Target) -> None:
    """Two batches of one, with one divisor, are a batch of two; padding changes nothing."""
    draft = small_draft(random_target)
    ids, turns = conversations(7, 2)
    turns = turns.clone()
    turns[1, 8:] = 0  # unequal counts, so that a mean of means would differ
    window = denominators(CFG, turns)
    whole = outcome(draft, random_target, ids, turns, window)
    whole.loss.backward()
    expected = gradients(draft)
    parts = [outcome(draft, random_target, ids[i][None], turns[i][None], window) for i in (0, 1)]
    sum(part.loss for part in parts).backward()
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    padded = outcome(draft, random_target, F.pad(ids, (0, 5)), F.pad(turns, (0, 5)), window)
    torch.testing.assert_close(padded.loss, whole.loss)


def test_unsupervised_tail_has_no_influence(random_target: Target) -> None:
    draft = small_draft(random_target)
    ids, turns = conversations(9, 1)
    window = denominators(CFG, turns)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % V
    first, second = (outcome(draft, random_target, x, turns, window).loss for x in (ids, changed))
    torch.testing.assert_close(first, second)


def test_simulated_length_is_a_mean_of_products(random_target: Target) -> None:
    draft = small_draft(random_target)
    ids, turns = conversations(11, 1)
    found = outcome(draft, random_target, ids, turns, denominators(CFG, turns))
    assert found.sums["length_slots"] == 1  # turn one has five tokens: one slot with all four steps
    assert 1 <= float(found.sums["length"]) <= 1 + K


def test_identity_vocabulary(random_target: Target) -> None:
    """D = V: the map is the identity and nothing is outside the draft's vocabulary."""
    draft = small_draft(random_target, size=V)
    assert draft.d2t.tolist() == [0] * V
    assert draft.t2d.all()
    ids, turns = conversations(13, 1)
    found = outcome(draft, random_target, ids, turns, denominators(CFG, turns))
    found.loss.backward()
    assert torch.isfinite(found.loss)
    torch.testing.assert_close(draft.lm_head.weight, random_target.head_weight_VH)


def test_no_supervised_row_is_no_gradient(random_target: Target) -> None:
    draft = small_draft(random_target)
    ids, _ = conversations(15, 1)
    turns = torch.zeros(1, T, dtype=torch.long)
    found = outcome(draft, random_target, ids, turns, denominators(CFG, turns))
    found.loss.backward()
    assert found.loss.item() == 0
    assert all(not p.grad.any() for p in draft.parameters() if p.grad is not None)


def test_one_conversation_can_be_learnt(random_target: Target) -> None:
    """Overfitting one sample drives the acceptance rate of every step towards 1."""
    draft = small_draft(random_target, size=V)
    ids, turns = conversations(17, 1)
    window = denominators(CFG, turns)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    for _ in range(150):
        found = outcome(draft, random_target, ids, turns, window)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    alpha = found.sums["alpha"] / found.sums["rows"].clamp(min=1)
    assert alpha.min() > 0.9


def test_too_large_a_vocabulary_is_refused(random_target: Target) -> None:
    with pytest.raises(InputError, match="draft_vocab_size=65"):
        draft_config(random_target.model.config, replace(CFG, draft_vocab_size=65))


def test_seed_decides_the_start() -> None:
    target = small_target()
    one, two = (small_draft(target).midlayer.self_attn.q_proj.weight for _ in range(2))
    assert torch.equal(one, two)


def test_start_is_the_targets_last_layer(random_target: Target) -> None:
    draft = small_draft(random_target)
    layer, mid = random_target.model.base_model.layers[-1], draft.midlayer
    H = draft.config.hidden_size
    assert torch.equal(mid.mlp.down_proj.weight, layer.mlp.down_proj.weight)
    assert torch.equal(mid.self_attn.v_proj.weight[:, H:], layer.self_attn.v_proj.weight)
    assert torch.equal(mid.hidden_norm.weight, layer.input_layernorm.weight)
    # Qwen3 norms each head of q and k, which the draft does not, so these are not copied
    assert not torch.equal(mid.self_attn.q_proj.weight[:, H:], layer.self_attn.q_proj.weight)
    aux, _ = random_target.features(conversations(0, 1)[0])
    torch.testing.assert_close(draft.fc(aux), aux[..., -H:])
    head = random_target.head_weight_VH[draft.draft_ids_D]
    assert torch.equal(draft.lm_head.weight, head)
    blank = Eagle3.new(
        random_target, replace(CFG, start="random"), vocabulary_mapping(torch.ones(V), 40), 0
    )
    assert float(blank.lm_head.weight.detach().std()) < 0.03
