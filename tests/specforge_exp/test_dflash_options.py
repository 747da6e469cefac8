"""DFlash's windows, weights and slots: training, serving and export are the same draft."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_target
from dense_dflash import dense_objective
from test_dflash import CFG, LONG, LOSS, logits, outcome, small_draft
from test_eagle3 import assert_same, conversation, gradients, packed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from specforge_exp.config import LossConfig
from specforge_exp.drafts import chain_attention, head_loss
from specforge_exp.drafts.dflash import config as options
from specforge_exp.drafts.dflash import model
from specforge_exp.drafts.dflash.blocks import make_blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.drafts.dflash.export import kinds_of
from specforge_exp.drafts.dflash.training import as_chains, dpace, needed_flops
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, RowLoss, TeacherRows, opd
from specforge_exp.target import Head, Target

LAYOUTS: dict[str, dict[str, Any]] = {
    "slot": {"sliding_window": 6},
    "block": {"sliding_window": 6, "window": "block", "full_attention_indices": [1]},
    "both ways": {"sliding_window": 6, "sliding_window_non_causal": True},
    "from anchor": {"sample_from_anchor": True},
    "from anchor, slot": {"sample_from_anchor": True, "sliding_window": 7},
    "mask": {"mask_token_id": 5},
}


@pytest.fixture
def target() -> Target:
    return small_target()


@pytest.fixture(params=LAYOUTS, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def cfg(request: pytest.FixtureRequest) -> DFlashConfig:
    return replace(CFG, **LAYOUTS[request.param])


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        ({}, [0, 0, 0]),
        ({"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}, [0, 0, 0]),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, [0, 1, 1]),
    ],
)
def test_layers_that_config_json_does_not_list(given: dict[str, Any], windows: list[int]) -> None:
    """Other makers' drafts: their windows are those that transformers reads, not none."""
    kinds = kinds_of({"num_hidden_layers": 3, **given})
    assert [kind == "sliding_attention" for kind in kinds] == [bool(each) for each in windows]


def test_the_fast_path_is_the_dense_one(
    target: Target, cfg: DFlashConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every layout: loss and gradients of two packed conversations, where scores of a part of
    a block exist together; and by FlexAttention."""
    monkeypatch.setitem(chain_attention.BLOCK_ROWS, "cpu", 7)
    sample = packed(target, conversation(1, LONG), conversation(2, LONG))
    draft = small_draft(target, cfg)
    window = draft.denominators(cfg, sample)
    total, _ = dense_objective(draft, sample, target.head_weight_VH, (cfg, LOSS), window)
    total.backward()
    expected = gradients(draft)
    found = draft.objective(sample, target.head, Loss(opd, LOSS), cfg, window)
    found.loss.backward()
    torch.testing.assert_close(found.loss, total.detach().float(), rtol=1e-5, atol=0)
    assert_same(gradients(draft), expected, rel=2e-5)
    draft.attention = "flex"
    with torch.no_grad():  # FlexAttention has no backward pass on a CPU
        again = outcome(draft, target, sample, cfg=cfg)
    torch.testing.assert_close(again.loss, found.loss, rtol=1e-5, atol=0)


def test_serving_is_training_and_an_export_is_the_draft(
    target: Target, cfg: DFlashConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A decoder says what the training forward says, after a round trip through the folder, which
    says what vLLM does not read."""
    draft = small_draft(target, cfg)
    ids, _ = conversation(4, LONG)
    expected = draft.all_logits(cfg, ids[None], target.features(ids[None])[0])
    expected = expected.unflatten(0, (-1, cfg.block_size))
    draft.write(tmp_path, target, "nowhere", torch.float32)
    assert ("vLLM 0.32 has no DFlash with" in caplog.text) == cfg.sample_from_anchor
    loaded = DFlash.load(tmp_path, target)
    decoder = loaded.decoder()
    aux, _ = target.features(ids[None])
    decoder.commit(aux[:, :3], ids[1:4].tolist())
    decoder.commit(aux[:, 3:11], ids[4:12].tolist())
    _, found = decoder.propose(cfg.steps, lambda row: int(row.argmax()))
    assert len(found) == cfg.steps
    assert len(decoder.propose(2, lambda row: int(row.argmax()))[0]) == 2
    wanted = expected[10, draft.first_slot :]
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-4, atol=1e-4)


def test_a_window_hides(target: Target) -> None:
    """A context before the first slot's window changes no logit of the block, one in it does."""
    cfg = replace(CFG, sliding_window=6)
    draft = small_draft(target, cfg)
    ids, _ = conversation(4, LONG)
    aux, _ = target.features(ids[None])
    before = draft.all_logits(cfg, ids[None], aux).unflatten(0, (-1, cfg.block_size))
    changed = aux.clone()
    changed[:, 3] += 1
    after = draft.all_logits(cfg, ids[None], changed).unflatten(0, (-1, cfg.block_size))
    for row, anchor in enumerate(range(1, len(ids))):
        hidden = anchor <= 3 or anchor - 3 >= cfg.sliding_window
        assert torch.equal(before[row], after[row]) == hidden, anchor


def test_dpace_weighs_by_the_expected_length() -> None:
    """Without smoothing a weight is the slope of the block's expected length in log q."""
    q = torch.rand(5, 4, dtype=torch.float64).clamp(min=0.05)
    q[1, 0] = 1.0
    log_q = q.log().requires_grad_()
    log_q.exp().cumprod(0).sum().backward()
    torch.testing.assert_close(dpace(-q.log(), 0.0), log_q.grad)
    assert dpace(-q.log(), 1.0)[:, 0].tolist() == [5, 4, 3, 2, 1]
    text = -q.log()
    text[3:] = -1  # labels that do not count
    found = dpace(text, 0.5)
    assert not found[3:].any()
    torch.testing.assert_close(found[:3], dpace(-q.log()[:3], 0.5))


def mixture(logits_ND: Tensor, teacher: TeacherRows, cfg: LossConfig) -> RowLoss:
    """`opd` as a loss of the user's own."""
    return opd(logits_ND, teacher, cfg)


@pytest.mark.parametrize("function", [opd, mixture])
def test_dpace_weighs_the_whole_loss_of_a_label(target: Target, function: Any) -> None:
    """Whatever it is made of, on labels of blocks that end with their turn."""
    cfg = replace(CFG, position_weights="dpace", dpace_alpha=0.3)
    draft, sample = (
        small_draft(target, cfg),
        packed(target, conversation(1, LONG), conversation(2, LONG[3:])),
    )
    window = draft.denominators(cfg, sample)
    total, _ = dense_objective(draft, sample, target.head_weight_VH, (cfg, LOSS), window)
    total.backward()
    expected = gradients(draft)
    found = draft.objective(sample, target.head, Loss(function, LOSS), cfg, window)
    found.loss.backward()
    torch.testing.assert_close(found.loss, total.detach().float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.step_loss_K.sum(), found.loss.detach())
    assert "loss" not in found.sums  # a line of metrics has the window's by this name
    assert_same(gradients(draft), expected, rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_for_logits_is_held_where_they_go_there(
    target: Target, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Those of narrow states are made anew in fp32: beside them it would be as much for nothing."""
    cfg, seen, made = replace(CFG, position_weights="dpace"), [], head_loss.head_logits

    def watched(normed_NH: Tensor, weight_DH: Tensor, buffer_ND: Tensor) -> Tensor:
        seen.append((normed_NH.dtype, len(buffer_ND) > 0))
        return made(normed_NH, weight_DH, buffer_ND)

    monkeypatch.setattr(head_loss, "head_logits", watched)
    draft, sample = small_draft(target, cfg), packed(target, conversation(1, LONG))
    draft.compute_dtype = dtype
    head = Head(target.head_weight_VH.to(dtype))
    draft(sample, head, Loss(opd, LOSS), cfg, draft.denominators(cfg, sample))
    assert set(seen) == {(dtype, dtype == torch.float32)}
    assert len(seen) == 2  # the text's, and the loss's


def test_flops_are_those_of_the_products(
    target: Target, cfg: DFlashConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of them in the forward pass; attention's own are left out. Of the target's head, two
    for the draft's logits, two for their gradient and, once for a position, two for the target's.
    """
    draft, sample = small_draft(target, cfg), packed(target, conversation(1, LONG))
    drawn = make_blocks(cfg, sample)
    monkeypatch.setattr(model, "block_attention", lambda layout, norms, q_QNE, *rest: q_QNE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        draft.states(sample.ids_T, sample.aux_TA, drawn, cfg.block_size)
    below = needed_flops(draft, drawn, len(LONG))
    assert below == 3 * counter.get_total_flops()
    found = outcome(draft, target, sample, cfg=cfg)
    positions = as_chains(drawn, sample.lengths).rows.position_P
    uses = 4 * int(drawn.counts_RK.sum()) + 2 * len(positions)
    assert found.flops - below == uses * draft.head_VH.numel()


def test_a_divisor_of_labels(target: Target) -> None:
    """speculators' divisor changes the size of a step alone."""
    sample, draft = packed(target, conversation(1, LONG)), small_draft(target)
    count = float(draft.denominators(CFG, sample).sum())
    decays = torch.exp(-torch.arange(4) / CFG.loss_gamma)
    weight = float((draft.denominators(CFG, sample) * decays).sum())
    one = outcome(draft, target, sample)
    other = outcome(draft, target, sample, cfg=replace(CFG, divisor="labels"))
    assert float(other.loss.detach()) == pytest.approx(
        float(one.loss.detach()) * weight / count, rel=1e-5
    )


def test_older_runs_are_the_same_trainings() -> None:
    """Options that were not there say nothing at their defaults, and something elsewhere."""
    assert not set(options.ADDED) & set(CFG.matters())
    assert replace(CFG, window="block", sliding_window=9).matters()["window"] == "block"
    fresh = vars(DFlashConfig(name="dflash"))
    assert all(fresh[name] == value for name, value in options.ADDED.items())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sliding_window": 5}, "must be above draft.block_size=5"),
        ({"full_attention_indices": [0]}, "needs draft.sliding_window"),
        ({"sliding_window": 9, "full_attention_indices": [2]}, "no layer 2"),
        ({"sliding_window": 9, "full_attention_indices": [1, 0]}, "=.1,0. names all layers"),
        ({"window": "block"}, "window=block needs draft.sliding_window"),
        ({"sliding_window_non_causal": True}, "non_causal=true needs draft.sliding_window"),
        ({"dpace_alpha": 0.4}, "dpace_alpha=0.4 needs draft.position_weights=dpace"),
        ({"dpace_alpha": 1.5}, "from 0 to 1"),
        ({"position_weights": "fixed"}, "draft.position_weights"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(CFG, **wrong)


def test_the_default_logits_are_those_of_every_slot(target: Target) -> None:
    ids, _ = conversation(4, LONG)
    assert logits(small_draft(target), target, ids).shape[1] == CFG.block_size
