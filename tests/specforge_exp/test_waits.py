"""A step asks a GPU for nothing that it has to wait for, and gives no operator tensors of two
devices. No GPU is needed: see named_gpu."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import test_dflash as dflash
import test_dspark as dspark
import test_eagle3 as eagle3
import test_onpolicy as onpolicy
import test_peagle as peagle
import torch
from conftest import small_target
from named_gpu import GPU, There, named_gpu
from test_onpolicy import K
from test_standalone import OPTIONS
from torch import Tensor

from specforge_exp.causal.model import Causal
from specforge_exp.config import LossConfig
from specforge_exp.config.causal import CausalConfig
from specforge_exp.drafts.outcome import RowSums
from specforge_exp.drafts.replay import replay_outcome
from specforge_exp.drafts.standalone import Standalone
from specforge_exp.losses import Loss, ProposedLoss, opd
from specforge_exp.onpolicy.judges import Elsewhere
from specforge_exp.target import Head
from specforge_exp.training.batches import Batch

LOSS = Loss(opd, LossConfig(name="m", lambda_ce=0.4, lambda_rkl=0.5, beta=0.1))


def standalone(target: Any) -> Any:
    return Standalone.new(target, OPTIONS, {}, 0)


DRAFTS = {
    "eagle3": (eagle3.small_draft, eagle3.CFG),
    "dflash": (dflash.small_draft, dflash.CFG),
    "dpace": (dflash.small_draft, replace(dflash.CFG, position_weights="dpace")),
    "dspark": (dspark.small_draft, dspark.CFG),
    "peagle": (peagle.small_draft, peagle.CFG),
    "standalone": (standalone, OPTIONS),
}


POSITIONS = {
    "_local_scalar_dense: out = decoder(", "_local_scalar_dense: out = causal.decoder(",
    "a copy to the GPU: out = causal.decoder(",
}  # fmt: skip
"""Waits of transformers, by the lines that run it."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DRAFTS)
def test_a_step_waits_for_no_gpu(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plain products, as where Triton is missing; the gradients are a CPU's."""
    (make, cfg), target = DRAFTS[name], small_target()
    draft: Any = make(target)
    draft.attention = "merged"  # FlexAttention is another matter
    chats = [eagle3.conversation(1, dflash.LONG), eagle3.conversation(2, dflash.LONG[3:])]
    sample = eagle3.packed(target, *chats)
    window = draft.denominators(cfg, sample)
    far = copy.deepcopy(draft)
    draft(sample, target.head, LOSS, cfg, window)[1].loss.backward()
    there = {n: There(x) for n, x in vars(sample).items() if isinstance(x, Tensor)}
    sample = replace(sample, **{**there, "turns_T": sample.turns_T})
    with named_gpu(monkeypatch) as waits:
        far.to(GPU).compute_dtype = dtype
        head = Head(There(target.head_weight_VH.to(dtype)))
        _ = far.host_ids_D  # once for a training
        waits.clear()
        far(sample, head, LOSS, cfg, There(window))[1].loss.backward()
        # transformers' layers look at the positions that they are given.
        assert [what for what in waits if name != "standalone" or what not in POSITIONS] == []
    for (label, weight), mine in zip(draft.named_parameters(), far.parameters(), strict=True):
        wanted, found = weight.grad.flatten(), mine.grad.here.flatten()
        assert torch.cosine_similarity(found, wanted, 0) > 0.99 or not wanted.any(), label


@pytest.mark.parametrize(("kind", "cfg"), [*onpolicy.KINDS, (Standalone, OPTIONS)])
def test_the_loss_of_a_replay_waits_for_no_gpu(
    kind: Any, cfg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is proposed has been waited for, and judged, when the sample was made."""
    target = small_target()
    draft = onpolicy.small(target, kind, cfg)
    sample = onpolicy.forced_sample(target, [torch.tensor([6, 9, 20]), torch.tensor([5, 17])])
    both, window_K = replace(LOSS, proposed=ProposedLoss(LOSS, LOSS, 0.8)), torch.full((K,), 5.0)
    here = replay_outcome(draft, sample, target.head, both, cfg, window_K)
    replay = replace(sample.replay, last_PH=There(sample.replay.last_PH))
    there = {n: There(x) for n, x in vars(sample).items() if isinstance(x, Tensor)}
    sample = replace(sample, **{**there, "turns_T": sample.turns_T, "replay": replay})
    with named_gpu(monkeypatch) as waits:
        far, head = draft.to(GPU), Head(There(target.head_weight_VH))
        _ = far.host_ids_D
        waits.clear()
        found = replay_outcome(far, sample, head, both, cfg, There(window_K))
        found.loss.backward()
        assert [what for what in waits if what not in POSITIONS] == []
    torch.testing.assert_close(found.loss.here, here.loss)
    for name, value in here.sums.items():
        torch.testing.assert_close(getattr(found.sums[name], "here", found.sums[name]), value)


def test_a_causal_step_waits_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where transformers looks at the positions that it is given."""
    causal = Causal(small_target().model.requires_grad_(True), CausalConfig(packing=True))
    causal.take_attention("documents")
    ids_T = torch.arange(21)
    batch = Batch(There(ids_T), torch.ones_like(ids_T), [0, 1], [12, 9], 0)
    with named_gpu(monkeypatch) as waits:
        causal.to(GPU)
        waits.clear()
        outcome = causal(batch, There(torch.tensor([19.0])))[1]
        outcome.loss.backward()
        assert [what for what in waits if not what.startswith("_local_scalar_dense")] == []
    assert outcome.sums["rows"].here.tolist() == [19.0]


def test_states_are_asked_for_by_tokens_that_lie_on_a_gpu() -> None:
    """Replay asks workers about a batch, whose tokens are where the draft is trained."""
    asked: list[Any] = []
    ends = SimpleNamespace(
        text=SimpleNamespace(hidden_size=2), model=SimpleNamespace(dtype=torch.float32)
    )
    stream: Any = SimpleNamespace(ends=ends, device=torch.device("cpu"))
    judge = Elsewhere(stream, 0)
    states = torch.zeros(3, 8).view(torch.uint8).numpy()
    judge.asked = lambda method, arguments: asked.extend(arguments) or [states]  # type: ignore[method-assign]
    judge.read([There(torch.tensor([5, 6, 7]))], True)
    assert asked[0][0].tolist() == [5, 6, 7]


@pytest.mark.usefixtures("by_kernels")
def test_sums_of_steps_do_not_depend_on_the_order_of_threads() -> None:
    """On a GPU addition by index does, so that no loss was logged twice the same."""
    step_N, row_N = torch.tensor([0, 2, 0, 2, 2]), torch.tensor([0, 1, 2, 0, 3])
    value_N = torch.tensor([0.5, 1.0, 0.25, 3.0, 0.125])
    sums = RowSums(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool))
    with torch.profiler.profile() as profiler:
        sums.add(step_N[:2], row_N[:2], {"alpha": value_N[:2], "ce": 2 * value_N[:2]})
        sums.add(step_N[2:], row_N[2:], {"alpha": value_N[2:], "ce": 2 * value_N[2:]})
        sums.add_up()
    assert sums.values["alpha"].tolist() == [0.75, 0.0, 4.125]
    assert sums.values["ce"].tolist() == [1.5, 0.0, 8.25]
    assert sums.alpha_KR[step_N, row_N].equal(value_N)
    assert not any("index_add" in event.key for event in profiler.key_averages())
