"""FlexAttention of DFlash blocks: the mask and the values of the path that works everywhere."""

from dataclasses import replace

import pytest
import torch
from conftest import small_target
from test_dflash import CFG, LONG, small_draft
from test_eagle3 import conversation, gradients, packed
from torch import Tensor

from specforge_exp.config import LossConfig
from specforge_exp.drafts.dflash import flex
from specforge_exp.drafts.dflash.blocks import make_blocks
from specforge_exp.drafts.dflash.flex import BUCKET, hide, padded, useful
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, opd
from specforge_exp.target import Head


def test_buckets_bound_the_shapes() -> None:
    """R16: whatever the lengths of a training, few shapes; never less than what is there."""
    shapes = {padded(length) for length in range(3073)}
    assert len(shapes) == 3072 // BUCKET
    assert all(padded(n) >= n and padded(n) - n < BUCKET for n in range(1, 3073))


def test_the_mask_is_the_definition() -> None:
    """Two packed conversations; padding sees nobody else and is seen by none."""
    anchors, slots, positions = torch.tensor([3, 5, 9]), 4, 12
    anchor_Q = anchors.repeat_interleave(slots)
    first_Q = torch.tensor([0, 0, 7]).repeat_interleave(slots)
    hidden = hide(anchor_Q, first_Q, slots, positions)
    row, column = torch.arange(hidden.rows), torch.arange(hidden.positions + hidden.rows)
    assert hidden.mask.shape[2:] == (len(row), len(column))
    seen = hidden.mask.mask_mod(torch.tensor(0), torch.tensor(0), row[:, None], column[None])
    for r in range(len(anchor_Q)):
        context = set(range(int(first_Q[r]), int(anchor_Q[r])))
        own = {hidden.positions + r // slots * slots + slot for slot in range(slots)}
        assert set(seen[r].nonzero()[:, 0].tolist()) == context | own
    others = seen[len(anchor_Q) :]
    assert not others[:, : hidden.positions + len(anchor_Q)].any()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_same_states() -> None:
    """Eagerly on a CPU, where FlexAttention has no backward pass."""
    target = small_target()
    draft = small_draft(target)
    sample = packed(target, conversation(1, LONG), conversation(2, LONG[3:]))
    blocks = make_blocks(CFG, sample)
    with torch.no_grad():
        expected = draft.states(sample.ids_T, sample.aux_TA, blocks, 5)
        draft.attention = "flex"
        found = draft.states(sample.ids_T, sample.aux_TA, blocks, 5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_is_refused_where_it_cannot_be_trained() -> None:
    draft = small_draft(small_target())
    draft.attention = "flex"
    with pytest.raises(InputError, match=r"draft\.attention=flex has gradients on CUDA alone"):
        draft.trains_on(torch.device("cpu"))


def test_what_auto_means() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert useful("auto", cuda, 128) and not useful("auto", cpu, 128)
    assert not useful("auto", cuda, 80) and not useful("merged", cuda, 128)


def test_auto_is_merged_where_nothing_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton needs a C compiler where it runs; a training without one ended at its first step."""
    monkeypatch.setattr(flex, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    cuda = torch.device("cuda")
    for compiler, found in (("", False), ("/opt/cc", True)):
        flex.compiler_is_there.cache_clear()
        monkeypatch.setenv("CC", compiler)
        assert useful("auto", cuda, 128) == found
        assert useful("flex", cuda, 128)
    assert caplog.text.count("no gcc or clang is here") == 1
    flex.compiler_is_there.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_gradients_on_cuda(dtype: torch.dtype) -> None:
    """In fp32 to rounding, in bfloat16 the same direction."""
    target = small_target(head_dim=16)
    draft = small_draft(target)
    sample = packed(target, conversation(1, LONG), conversation(2, LONG[3:]))
    window, loss = draft.denominators(CFG, sample), Loss(opd, LossConfig(name="m", lambda_ce=1.0))
    first = draft.objective(sample, target.head, loss, CFG, window)
    first.loss.backward()
    expected = gradients(draft)
    draft.to("cuda").compute_dtype = dtype
    tensors = {n: v.cuda() for n, v in vars(sample).items() if isinstance(v, Tensor)}
    head = Head(target.head_weight_VH.to("cuda", dtype))
    assert useful(draft.attention, torch.device("cuda"), 16)
    second = draft.objective(replace(sample, **tensors), head, loss, CFG, window)
    second.loss.backward()
    near = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(second.loss.cpu(), first.loss, rtol=near, atol=0)
    for name, gradient in gradients(draft).items():
        flat, wanted = gradient.cpu().flatten(), expected[name].flatten()
        assert torch.cosine_similarity(flat, wanted, 0) > 0.99, name
