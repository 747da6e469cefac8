"""The draft: training and serving see the same states, and only supervised rows count."""

from dataclasses import replace

import pytest
import torch
from conftest import small_target
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference
from torch import Tensor

from specforge_exp.config import LossConfig
from specforge_exp.drafts import chain_attention, head_loss, teacher
from specforge_exp.drafts.eagle3.chains import make_chains, turn_masks
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.draft import Eagle3, draft_config
from specforge_exp.drafts.eagle3.training import denominators
from specforge_exp.drafts.eagle3.unroll import unroll
from specforge_exp.drafts.rows import document_bounds
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, RowLoss, TeacherRows, opd
from specforge_exp.target import Head, Target
from specforge_exp.training.batches import Batch
from specforge_exp.training.objective import Outcome, Sample

K, T, V = 4, 14, 64
CFG = Eagle3Config(name="eagle3", draft_vocab_size=40, ttt_length=K)
TURNS = [0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0]
LOSS = Loss(opd, LossConfig(name="m", lambda_ce=0.4, lambda_rkl=0.5, beta=0.1))


def small_draft(target: Target, size: int = 40) -> Eagle3:
    counts = torch.randint(0, 9, (V,), generator=torch.Generator().manual_seed(1))
    cfg = replace(CFG, draft_vocab_size=size)
    return Eagle3.new(target, cfg, vocabulary_mapping(counts, size), seed=3)


def conversation(seed: int, turns: list[int] = TURNS) -> tuple[Tensor, Tensor]:
    """Random tokens; by default two assistant turns and a prompt before, between and after them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, V, (len(turns),), generator=generator), torch.tensor(turns)


def packed(target: Target, *conversations: tuple[Tensor, Tensor]) -> Sample:
    """Conversations one after the other, each seen by the target alone."""
    ids, turns = (torch.cat(column) for column in zip(*conversations, strict=True))
    states = [target.features(i[None]) for i, _ in conversations]
    aux, last = (torch.cat([x[0] for x in column]) for column in zip(*states, strict=True))
    numbers = list(range(len(conversations)))
    return Sample(ids, turns, numbers, [len(i) for i, _ in conversations], 0, aux, last)


def divisors(sample: Sample, cfg: Eagle3Config = CFG) -> Tensor:
    return denominators(cfg, sample)


def outcome(draft: Eagle3, target: Target, sample: Sample, window: Tensor) -> Outcome:
    return draft.objective(sample, target.head, LOSS, CFG, window)


def gradients(draft: Eagle3) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rel: float = 1e-5) -> None:
    """Every gradient within `rel` of its tensor's largest entry."""
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert float((found[name] - gradient).abs().max()) <= rel * scale, name


MIXTURES = [
    {"lambda_ce": 1.0},
    {"lambda_ce": 0.4, "lambda_rkl": 0.5, "beta": 0.1},
    {"lambda_lk": 1.0, "lambda_tv": 0.3, "lambda_lk_alpha": 0.2},
]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("weights", MIXTURES, ids="+".join)
def test_the_fast_path_is_the_reference(
    random_target: Target, weights: dict[str, float], temperature: float
) -> None:
    """Losses, metrics and gradients of two packed conversations."""
    draft = small_draft(random_target)
    loss_cfg = LossConfig(name="m", temperature=temperature, **weights)
    sample = packed(random_target, conversation(1), conversation(2, [0, 1, 1, 1, 0]))
    window = divisors(sample)
    head = random_target.head_weight_VH
    total, sums = reference(draft, sample, head, (CFG, loss_cfg), window)
    total.backward()
    expected = gradients(draft)
    found = draft.objective(sample, random_target.head, Loss(opd, loss_cfg), CFG, window)
    found.loss.backward()
    torch.testing.assert_close(found.loss, total.detach(), rtol=1e-5, atol=0)
    assert_same(gradients(draft), expected)
    for name, value in sums.items():
        torch.testing.assert_close(found.sums[name].float(), value.float(), rtol=1e-5, atol=1e-5)


def test_accepted_lengths_by_conversation(random_target: Target) -> None:
    """What an evaluation keeps of packed conversations is what each has alone."""
    draft = small_draft(random_target)
    each = [conversation(1), conversation(2, [0, 1, 1, 0]), conversation(3, [1] * 8)]
    sample = packed(random_target, *each)
    with torch.no_grad():
        found = outcome(draft, random_target, sample, divisors(sample)).pairs_B2
        alone = [
            outcome(draft, random_target, one, divisors(one)).sums
            for one in (packed(random_target, part) for part in each)
        ]
    expected = [[float(sums["length"]), float(sums["length_slots"])] for sums in alone]
    assert found is not None
    torch.testing.assert_close(found.float(), torch.tensor(expected))
    assert expected[1][1] == 0 < expected[0][1]


def test_a_loss_of_ones_own_is_differentiated(random_target: Target) -> None:
    """A `_target_` that is not `opd` goes through autograd row by row, to the same numbers."""
    draft = small_draft(random_target)
    sample = packed(random_target, conversation(1))
    window = divisors(sample)
    first = outcome(draft, random_target, sample, window)
    first.loss.backward()
    expected = gradients(draft)

    def own(logits: Tensor, teacher: TeacherRows, cfg: LossConfig) -> RowLoss:
        return opd(logits, teacher, cfg)

    second = draft.objective(sample, random_target.head, Loss(own, LOSS.cfg), CFG, window)
    second.loss.backward()
    torch.testing.assert_close(second.loss, first.loss)
    torch.testing.assert_close(second.sums, first.sums)  # the loss itself is none of the metrics
    assert_same(gradients(draft), expected)


def test_chunks_change_nothing(random_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """One position, row or block at a time instead of all together."""
    draft = small_draft(random_target)
    sample = packed(random_target, conversation(1), conversation(3))
    window = divisors(sample)
    first = outcome(draft, random_target, sample, window)
    first.loss.backward()
    expected = gradients(draft)
    monkeypatch.setitem(head_loss.POSITIONS, "cpu", 3)
    monkeypatch.setitem(head_loss.LOGITS, "cpu", 5 * 40)
    monkeypatch.setitem(head_loss.BLOCK, "cpu", 2 * 40)
    monkeypatch.setitem(head_loss.TILE, "cpu", 7 * random_target.head_weight_VH.shape[1])
    monkeypatch.setitem(teacher.TILE_ELEMENTS, "cpu", 20)
    monkeypatch.setitem(chain_attention.BLOCK_ROWS, "cpu", 2)
    second = outcome(draft, random_target, sample, window)
    second.loss.backward()
    torch.testing.assert_close(second.loss, first.loss)
    assert_same(gradients(draft), expected)


def test_checkpointing_changes_no_number(random_target: Target) -> None:
    draft = small_draft(random_target)
    sample = packed(random_target, conversation(1), conversation(3))
    window = divisors(sample)
    first = outcome(draft, random_target, sample, window)
    first.loss.backward()
    expected = gradients(draft)
    draft.gradient_checkpointing = True
    second = outcome(draft, random_target, sample, window)
    second.loss.backward()
    assert torch.equal(second.loss, first.loss)
    for name, gradient in gradients(draft).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_compute_keeps_fp32_gradients(random_target: Target, checkpointing: bool) -> None:
    """What a GPU does: products in bfloat16, weights and gradients in fp32, the same direction."""
    draft = small_draft(random_target)
    sample = packed(random_target, conversation(1), conversation(3))
    window = divisors(sample)
    first = outcome(draft, random_target, sample, window)
    first.loss.backward()
    expected = gradients(draft)
    draft.compute_dtype = torch.bfloat16
    draft.gradient_checkpointing = checkpointing
    second = outcome(draft, random_target, sample, window)
    second.loss.backward()
    torch.testing.assert_close(second.loss, first.loss, rtol=2e-2, atol=0)
    for name, gradient in gradients(draft).items():
        assert gradient.dtype == torch.float32
        flat, wanted = gradient.flatten(), expected[name].flatten()
        assert torch.cosine_similarity(flat, wanted, 0) > 0.99, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_gradients(random_target: Target, dtype: torch.dtype) -> None:
    """In fp32 to rounding, in bfloat16 the same direction."""
    draft = small_draft(random_target)
    sample = packed(random_target, conversation(1), conversation(3))
    window = divisors(sample)
    first = outcome(draft, random_target, sample, window)
    first.loss.backward()
    expected = gradients(draft)
    draft.trains_on(torch.device("cuda"))
    draft.compute_dtype = dtype
    tensors = {n: v.cuda() for n, v in vars(sample).items() if isinstance(v, Tensor)}
    head = Head(random_target.head_weight_VH.to("cuda", dtype))
    second = draft.objective(replace(sample, **tensors), head, LOSS, CFG, window)
    second.loss.backward()
    near = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(second.loss.cpu(), first.loss, rtol=near, atol=0)
    for name, gradient in gradients(draft).items():
        flat, wanted = gradient.cpu().flatten(), expected[name].flatten()
        assert torch.cosine_similarity(flat, wanted, 0) > 0.99, name


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=2, max_size=4))
def test_packed_is_unpacked(turns: list[list[int]]) -> None:
    """Conversations in one forward, or one after the other with one divisor."""
    target = small_target()
    draft = small_draft(target)
    each = [packed(target, conversation(i, sorted(t))) for i, t in enumerate(turns)]
    together = packed(target, *(conversation(i, sorted(t)) for i, t in enumerate(turns)))
    window = divisors(together)
    assert torch.equal(window, sum(divisors(sample) for sample in each))
    whole = outcome(draft, target, together, window)
    whole.loss.backward()
    expected = gradients(draft)
    parts = [outcome(draft, target, sample, window) for sample in each]
    for part in parts:
        part.loss.backward()
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert_same(gradients(draft), expected, 2e-5)


@pytest.mark.parametrize("supervision", ["specforge", "speculators"])
def test_packed_is_unpacked_for_the_peers(random_target: Target, supervision: str) -> None:
    """Their last slots, too, whose next token would be another conversation's."""
    draft, cfg = small_draft(random_target), replace(CFG, supervision=supervision)
    loss = Loss(opd, LossConfig(name="ce", lambda_ce=1.0))
    each = [packed(random_target, conversation(n, [0, 1, 1, 1, 1])) for n in range(3)]
    together = packed(random_target, *(conversation(n, [0, 1, 1, 1, 1]) for n in range(3)))
    window = divisors(together, cfg)
    whole = draft.objective(together, random_target.head, loss, cfg, window)
    whole.loss.backward()
    expected = gradients(draft)
    parts = [draft.objective(one, random_target.head, loss, cfg, window) for one in each]
    for part in parts:
        part.loss.backward()
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert_same(gradients(draft), expected, 2e-5)


def test_decoder_repeats_the_unroll(random_target: Target) -> None:
    """Every state of the training unroll is the one that serving reaches."""
    draft = small_draft(random_target)
    sample = packed(random_target, conversation(0, [1] * T))
    aux = sample.aux_TA[None]
    carried = make_chains("inference", sample.turns_T, sample.lengths, K)
    with torch.no_grad():
        states = unroll(draft, carried, sample.ids_T, sample.aux_TA)
    for slot in (0, 3, T - K - 2):
        row = carried.slot_R.tolist().index(slot)
        decoder = draft.decoder()
        half = slot // 2 + 1  # two commits, as after two verifications
        tokens = sample.ids_T[1 : slot + 2].tolist()
        decoder.commit(aux[:, :half], tokens[:half])
        if tokens[half:]:
            decoder.propose(K, lambda logits: int(logits.argmax()))  # forgotten by the next commit
            decoder.commit(aux[:, half : slot + 1], tokens[half:])
        state = decoder.state_11H
        for step in range(K):
            torch.testing.assert_close(state[0, 0], states[step][row], rtol=1e-4, atol=1e-5)
            token = sample.ids_T[slot + 2 + step][None, None]
            state = decoder.advance(token, state, slot + 1 + step)


def test_supervision_is_what_serving_reaches() -> None:
    """Per conversation: the second one's turn 1 has nothing to do with the first one's."""
    turns = torch.tensor([0, 1, 1, 1, 0, 2, 2, 0, 1, 1, 0])
    _, end = document_bounds([8, 3], turns.device)
    masks = [m.nonzero().flatten().tolist() for m in turn_masks("inference", turns, end, 3)]
    assert masks == [[0, 1, 4], [0], []]
    across = [m.nonzero().flatten().tolist() for m in turn_masks("speculators", turns, end, 1)]
    assert across == [[0, 1, 2, 4, 5, 8]]
    batch = Batch(turns, turns, [0, 1], [8, 3], 0)
    assert denominators(replace(CFG, ttt_length=3), batch).tolist() == [3, 1, 0]


def test_rows_are_carried_as_long_as_they_are_needed() -> None:
    """Longest chains first, so that the rows of a step are the first of the step before."""
    carried = make_chains("inference", torch.tensor([0, 1, 1, 1, 0, 2, 2, 0]), [8], 3)
    assert carried.slot_R.tolist() == [0, 1, 4]
    assert carried.counts == [3, 1, 0]
    assert carried.reads(1).tolist() == [2]
    shifted = make_chains("specforge", torch.tensor([0, 0, 0, 1, 0]), [5], 3)
    assert shifted.slot_R.tolist() == [1, 2, 3]  # slot 1 counts at its last step only
    assert [mask.tolist() for mask in shifted.supervised] == [
        [False, False, True], [False, True], [True],
    ]  # fmt: skip


def test_unsupervised_tail_has_no_influence(random_target: Target) -> None:
    draft = small_draft(random_target)
    ids, turns = conversation(9)
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % V
    samples = [packed(random_target, (x, turns)) for x in (ids, changed)]
    first, second = (outcome(draft, random_target, s, divisors(s)).loss for s in samples)
    torch.testing.assert_close(first, second)


def test_identity_vocabulary(random_target: Target) -> None:
    """D = V: the map is the identity and nothing is outside the draft's vocabulary."""
    draft = small_draft(random_target, size=V)
    assert draft.d2t.tolist() == [0] * V
    assert draft.t2d.all()
    sample = packed(random_target, conversation(13))
    found = outcome(draft, random_target, sample, divisors(sample))
    found.loss.backward()
    assert torch.isfinite(found.loss)
    torch.testing.assert_close(draft.lm_head.weight, random_target.head_weight_VH)


def test_no_supervised_row_is_no_gradient(random_target: Target) -> None:
    draft = small_draft(random_target)
    sample = packed(random_target, conversation(15, [0] * T))
    found = outcome(draft, random_target, sample, divisors(sample))
    found.loss.backward()
    assert found.loss.item() == 0
    assert all(not p.grad.any() for p in draft.parameters() if p.grad is not None)
    assert not any(value.any() for value in found.sums.values()) and "top1" in found.sums


def test_one_conversation_can_be_learnt(random_target: Target) -> None:
    """Overfitting one sample drives the acceptance rate of every step towards 1."""
    draft = small_draft(random_target, size=V)
    sample = packed(random_target, conversation(17))
    window = divisors(sample)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    for _ in range(150):
        found = outcome(draft, random_target, sample, window)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
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
    layer = random_target.layers[-1]
    layer.input_layernorm.weight.add_(0.5)
    layer.post_attention_layernorm.weight.add_(0.25)
    draft = small_draft(random_target)
    mid = draft.midlayer
    H = draft.config.hidden_size
    assert torch.equal(mid.mlp.down_proj.weight, layer.mlp.down_proj.weight)
    assert torch.equal(mid.self_attn.v_proj.weight[:, H:], layer.self_attn.v_proj.weight)
    assert torch.equal(mid.hidden_norm.weight, layer.input_layernorm.weight)
    assert torch.equal(mid.post_attention_layernorm.weight, layer.post_attention_layernorm.weight)
    assert bool((mid.input_layernorm.weight == 1).all())  # the embedding's: the target has none
    # Qwen3 norms each head of q and k, which the draft does not, so these are not copied
    assert not torch.equal(mid.self_attn.q_proj.weight[:, H:], layer.self_attn.q_proj.weight)
    aux, _ = random_target.features(conversation(0)[0][None])
    torch.testing.assert_close(draft.fc(aux), aux[..., -H:])
    head = random_target.head_weight_VH[draft.draft_ids_D]
    assert torch.equal(draft.lm_head.weight, head)
    blank = Eagle3.new(
        random_target, replace(CFG, start="random"), vocabulary_mapping(torch.ones(V), 40), 0
    )
    assert float(blank.lm_head.weight.detach().std()) < 0.03


def test_a_loss_that_was_scaled_is_refused(random_target: Target) -> None:
    """Half of the gradients exists before backward(): scaling the rest would be silently wrong."""
    draft, sample = small_draft(random_target), packed(random_target, conversation(1))
    with pytest.raises(RuntimeError, match=r"multiplied by 0\.25 before backward"):
        (outcome(draft, random_target, sample, divisors(sample)).loss * 0.25).backward()
    draft.zero_grad()
    outcome(draft, random_target, sample, divisors(sample)).loss.backward()
    once = gradients(draft)
    both = [outcome(draft, random_target, sample, divisors(sample)).loss for _ in range(2)]
    (both[0] + both[1]).backward()
    assert_same(gradients(draft), {name: 2 * gradient for name, gradient in once.items()})
