"""DFlash: training sees what serving sees, and nothing that serving does not have."""

from dataclasses import replace

import pytest
import torch
from conftest import small_target
from dense_dflash import dense_objective
from test_eagle3 import assert_same, conversation, gradients, packed
from torch import Tensor

from specforge_exp.config import LossConfig
from specforge_exp.drafts.dflash.blocks import make_blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, opd
from specforge_exp.target import Target
from specforge_exp.training.objective import Outcome, Sample

CFG = DFlashConfig(
    name="dflash", draft_vocab_size=None, start="random", block_size=5, num_layers=2,
    num_features=3, num_anchors=6, min_loss_tokens=4, loss_gamma=3.0,
)  # fmt: skip
LONG = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 0]
LOSS = LossConfig(name="m", lambda_ce=0.4, lambda_rkl=0.5, beta=0.1)


@pytest.fixture
def target() -> Target:
    return small_target()


def small_draft(target: Target, cfg: DFlashConfig = CFG) -> DFlash:
    draft = DFlash.new(target, cfg, {}, seed=3)
    with torch.no_grad():
        for weight in draft.parameters():  # far from the start: every path carries something
            weight.add_(torch.randn_like(weight) * 0.1)
    return draft


def outcome(
    draft: DFlash, target: Target, sample: Sample, loss: LossConfig = LOSS, cfg: DFlashConfig = CFG
) -> Outcome:
    window = draft.denominators(cfg, sample)
    return draft.objective(sample, target.head, Loss(opd, loss), cfg, window)


MIXTURES = [
    {"lambda_hard": 1.0},
    {"lambda_ce": 1.0},
    {"lambda_ce": 0.4, "lambda_rkl": 0.5, "beta": 0.1},
    {"lambda_hard": 0.3, "lambda_lk": 1.0, "lambda_tv": 0.3, "lambda_lk_alpha": 0.2},
]


@pytest.mark.parametrize("weights", MIXTURES, ids="+".join)
def test_the_fast_path_is_the_dense_one(target: Target, weights: dict[str, float]) -> None:
    """R5: losses, metrics and gradients of two packed conversations, and of a block by itself."""
    draft, loss = small_draft(target), LossConfig(name="m", **weights)
    sample = packed(target, conversation(1, LONG), conversation(2, LONG[3:]))
    window = draft.denominators(CFG, sample)
    assert window[0] > window[-1] > 0
    assert_dense(draft, target, sample, (CFG, loss))
    alone = packed(target, conversation(1, LONG))
    assert_dense(draft, target, alone, (replace(CFG, num_anchors=1), loss))


def assert_dense(
    draft: DFlash, target: Target, sample: Sample, options: tuple[DFlashConfig, LossConfig]
) -> None:
    window = draft.denominators(options[0], sample)
    total, sums = dense_objective(draft, sample, target.head_weight_VH, options, window)
    total.backward()
    expected = gradients(draft)
    found = draft.objective(sample, target.head, Loss(opd, options[1]), options[0], window)
    found.loss.backward()
    torch.testing.assert_close(found.loss, total.detach().float(), rtol=1e-5, atol=0)
    assert_same(gradients(draft), expected, rel=2e-5)
    for name, value in sums.items():
        torch.testing.assert_close(found.sums[name].float(), value.float(), rtol=1e-5, atol=1e-5)


def logits(draft: DFlash, target: Target, ids: Tensor) -> Tensor:
    """[T - 1, S, V]: the block of every anchor from 1 on."""
    aux, _ = target.features(ids[None])
    return draft.all_logits(CFG, ids[None], aux).unflatten(0, (-1, CFG.block_size or 0))


def test_a_block_sees_nothing_from_its_anchor_on(target: Target) -> None:
    """R7: another token at or after the anchor changes no logit of its block, but the anchor's
    own embedding; one before it does."""
    draft = small_draft(target)
    ids, _ = conversation(4, LONG)
    before = logits(draft, target, ids)
    for at in range(1, len(ids)):
        changed = ids.clone()
        changed[at] = (changed[at] + 7) % 60
        after = logits(draft, target, changed)
        same = (before == after).flatten(1).all(1)  # block r starts at position r + 1
        assert same[: at - 1].all(), at
        assert not same[at - 1 :].any(), at


def test_slots_of_a_block_see_each_other_and_no_other_block(target: Target) -> None:
    """R6 and R8: slot 1 depends on the last slot's input; a block alone is the block among many."""
    draft = small_draft(target)
    ids, turns = conversation(4, LONG)
    sample = packed(target, (ids, turns))
    many = make_blocks(replace(CFG, num_anchors=99), sample)
    together = draft.states(sample.ids_T, sample.aux_TA, many, 5).unflatten(0, (-1, 5))
    one = replace(many, anchor_R=many.anchor_R[2:3], counts_RK=many.counts_RK[2:3])
    alone = draft.states(sample.ids_T, sample.aux_TA, one, 5)
    torch.testing.assert_close(together[2], alone)
    shorter = draft.states(sample.ids_T, sample.aux_TA, one, 4)
    assert (shorter[1] - alone[1]).abs().max() > 1e-4


def test_anchors_and_labels(target: Target) -> None:
    """R10 to R12, R15, R18, R19: anchors lie in a turn, never first; labels stay in the turn."""
    turns = [1, 1, 1, 0, 2, 2, 2, 2, 0, 3, 3]
    sample = packed(target, conversation(1, turns))
    every = make_blocks(replace(CFG, num_anchors=99), sample)
    assert every.anchor_R.tolist() == [1, 4, 5, 6, 9]
    counted = ["".join(map(str, row)) for row in every.counts_RK.int().tolist()]
    assert counted == ["1000", "1110", "1100", "1000", "1000"]
    some = make_blocks(replace(CFG, num_anchors=2), sample)
    assert len(some.anchor_R) == 2
    for least, blocks in ((9, 5), (10, 0), (None, 0)):  # 9 supervised ones; null: 2 * 5
        assert len(make_blocks(replace(CFG, min_loss_tokens=least), sample).anchor_R) == blocks
    few = replace(CFG, num_anchors=2)
    drawn = [make_blocks(few, replace(sample, draw=draw)).anchor_R.tolist() for draw in range(12)]
    assert len(set(map(tuple, drawn))) > 2
    assert make_blocks(few, sample).anchor_R.tolist() == some.anchor_R.tolist() == drawn[0]
    later = replace(packed(target, conversation(2, LONG)), numbers=[1])
    both = packed(target, conversation(1, turns), conversation(2, LONG))
    for cfg in (replace(CFG, num_anchors=99), few):  # packed, each has its own
        alone, apart, together = (make_blocks(cfg, each) for each in (sample, later, both))
        anchor_R = torch.cat([alone.anchor_R, apart.anchor_R + len(turns)])
        assert together.anchor_R.equal(anchor_R)
        assert together.counts_RK.equal(torch.cat([alone.counts_RK, apart.counts_RK]))


def test_decay_starts_at_one() -> None:
    """R13."""
    from specforge_exp.drafts.dflash.training import decays

    found = decays(CFG)
    assert found[0] == 1 and found[3] == pytest.approx(2.718281828 ** (-3 / 3.0))


def test_nothing_to_learn_is_a_loss_of_zero(target: Target) -> None:
    """R17: no supervised token, finite gradients."""
    draft = small_draft(target)
    sample = packed(target, conversation(1, [0] * 9))
    found = outcome(draft, target, sample)
    found.loss.backward()
    assert float(found.loss.detach()) == 0 and float(found.sums["rows"].sum()) == 0
    assert all(p.grad is None or not p.grad.any() for p in draft.parameters())


@pytest.mark.parametrize(
    ("layers", "number", "expected"),
    [(36, 5, [1, 9, 17, 25, 33]), (36, 1, [18]), (8, 3, [1, 3, 5]), (64, 5, [1, 16, 31, 46, 61])],
)
def test_target_layers(layers: int, number: int, expected: list[int]) -> None:
    """R1 and R2."""
    cfg = replace(CFG, num_features=number)
    assert DFlash.target_layers(cfg, layers) == expected
    with pytest.raises(InputError, match=r"too few for draft\.num_features"):
        DFlash.target_layers(cfg, number + 2)


def test_training_and_serving_give_the_same_logits(target: Target) -> None:
    """R5: a decoder that was committed up to an anchor proposes what the training forward says."""
    draft = small_draft(target)
    ids, _ = conversation(4, LONG)
    expected = logits(draft, target, ids)
    aux, _ = target.features(ids[None])
    decoder = draft.decoder()
    decoder.commit(aux[:, :3], ids[1:4].tolist())
    decoder.commit(aux[:, 3:8], ids[4:9].tolist())
    _, found = decoder.propose(4, lambda row: int(row.argmax()))
    torch.testing.assert_close(torch.stack(found), expected[7, 1:], rtol=1e-4, atol=1e-4)


def test_checkpointing_changes_no_number(target: Target) -> None:
    draft = small_draft(target)
    sample = packed(target, conversation(1, LONG))
    plain = outcome(draft, target, sample)
    plain.loss.backward()
    expected = gradients(draft)
    draft.gradient_checkpointing = True
    again = outcome(draft, target, sample)
    again.loss.backward()
    assert again.loss == plain.loss
    assert_same(gradients(draft), expected, rel=0)
