"""Triton's kernels beside plain formulas in fp64, by Triton's interpreter: every program runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_eagle3 as eagle3
import torch
from conftest import small_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specforge_exp.drafts.chain_attention import shared_backward, shared_forward, visible
from specforge_exp.drafts.kernels import USED, attention, check, losses, own
from specforge_exp.losses import TeacherRows, opd_closed

CPU = torch.device("cpu")


def dense(q_RMGE: Tensor, k_TME: Tensor, v_TME: Tensor, seen_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and logsumexp with every score at once."""
    scores = torch.einsum("rmge,tme->rmgt", q_RMGE, k_TME)
    scores = scores.masked_fill(~seen_RT[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = (scores - lse).exp().nan_to_num()
    return torch.einsum("rmgt,tme->rmge", weights, v_TME), lse


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within what the dtype can say."""
    rel = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=rel, atol=rel * 4)


@pytest.mark.usefixtures("by_kernels")
@settings(
    max_examples=8, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([8, 24])),
    window=st.one_of(st.none(), st.integers(1, 20)),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_shared_attention_and_its_gradients(
    lengths: list[int], heads: tuple[int, int, int], window: int | None, wide: bool, seed: int
) -> None:
    """Packed documents, some rows of each in any order, some of them more than once, windows that
    may end before their slot, and at times a row that sees nothing."""
    (M, G, E), T = heads, sum(lengths)
    dtype = torch.float32 if wide else torch.bfloat16
    generator = torch.Generator().manual_seed(seed)
    start_T = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    slot_R = torch.randint(T, (max(1, T // 2),), generator=generator)
    start_R = start_T[slot_R]
    slot_R = slot_R - (seed % 2)  # as DFlash: strictly before
    first_R = None if window is None else slot_R - window + torch.arange(len(slot_R)) % 3
    R = len(slot_R)
    q, k, v, outer = (
        (random(*shape, seed=seed + i) / 2).to(dtype)
        for i, shape in enumerate([(R, M, G, E), (T, M, E), (T, M, E), (R, M, G, E)])
    )
    seen = visible(slot_R, start_R, k, first_R)
    low_R = start_R if first_R is None else first_R.maximum(start_R)
    seen_RT = (torch.arange(T) >= low_R[:, None]) & (torch.arange(T) <= slot_R[:, None])
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, lse = dense(*leaves, seen_RT)
    out, found_lse = shared_forward(seen, q, k, v)
    near(out, expected.detach(), dtype)
    torch.testing.assert_close(found_lse.double(), lse.detach(), rtol=1e-5, atol=1e-5)

    finite = torch.where(lse == float("-inf"), 0, lse).detach().float()
    delta = own.row_dots(outer, out)
    near(delta, (outer.double() * out.double()).sum(-1, keepdim=True), torch.float32)
    gradients = torch.autograd.grad(expected, leaves, outer.double())
    back = torch.ones_like(k), torch.full_like(v, 2)
    dq = shared_backward(seen, (q, k, v), outer, (finite, delta), back)
    for mine, theirs in zip((dq, back[0] - 1, back[1] - 2), gradients, strict=True):
        near(mine, theirs.nan_to_num(), dtype)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 99), st.integers(0, 40)), min_size=1, max_size=30))
def test_every_key_that_a_row_sees_is_in_its_blocks_rows(rows: list[tuple[int, int]]) -> None:
    """Windows may differ within a slot: the first positions seen need not rise."""
    slots, firsts = (
        torch.tensor(x) for x in zip(*[(s, s - w) for s, w in sorted(rows)], strict=True)
    )
    bounds = attention.key_rows(slots, firsts, 100).tolist()
    assert len(bounds) == 4
    for row, (slot, first) in enumerate(zip(slots.tolist(), firsts.tolist(), strict=True)):
        for key in range(max(first, 0), slot + 1):
            begin, end = bounds[key // attention.GRAIN]
            assert begin <= row < end
    assert all(0 <= begin <= end <= len(rows) for begin, end in bounds)


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_keys_and_their_gradients(dtype: torch.dtype) -> None:
    """As if each own key were one more of the shared ones; gradients are added to what is there."""
    R, J, M, G, E, T = 19, 3, 2, 3, 24, 30
    shapes = [(R, M, G, E), (T, M, E), (T, M, E), (R, M, G, E), (J, R, M, E), (J, R, M, E)]
    q, k, v, outer, more_k, more_v = (
        (random(*shape, seed=i) / 2).to(dtype) for i, shape in enumerate(shapes)
    )
    slot_R = torch.randint(T, (R,), generator=torch.Generator().manual_seed(1))
    leaves = [x.double().requires_grad_() for x in (q, more_k, more_v)]
    seen_RT = torch.arange(T) <= slot_R[:, None]
    shared = torch.einsum("rmge,tme->rmgt", leaves[0], k.double())
    shared = shared.masked_fill(~seen_RT[:, None, None], float("-inf"))
    scores = torch.cat([shared, torch.einsum("rmge,jrme->rmgj", *leaves[:2])], -1)
    weights = torch.softmax(scores, -1)
    expected = torch.einsum("rmgt,tme->rmge", weights[..., :T], v.double())
    expected = expected + torch.einsum("rmgj,jrme->rmge", weights[..., T:], leaves[2])
    out, lse = shared_forward(visible(slot_R, torch.zeros_like(slot_R), k), q, k, v)
    own.own_attention(out, lse, q, more_k, more_v)
    near(out, expected.detach(), dtype)
    near(lse, torch.logsumexp(scores, -1, keepdim=True).detach(), torch.float32)

    # The part of the queries' gradient that comes through the shared keys is another kernel's.
    (slope,) = torch.autograd.grad(expected, shared, outer.double(), retain_graph=True)
    (through_shared,) = torch.autograd.grad(shared, leaves[0], slope, retain_graph=True)
    dq, dk, dv = torch.autograd.grad(expected, leaves, outer.double())
    back = [torch.ones_like(x) for x in (q, more_k, more_v)]
    sums = [lse, own.row_dots(outer, expected.detach().float().contiguous())]
    own.own_gradients([q, more_k, more_v], outer, sums, *back)
    for mine, theirs in zip(back, (dq - through_shared, dk, dv), strict=True):
        near(mine - 1, theirs, dtype)


@pytest.mark.usefixtures("by_kernels")
@settings(
    max_examples=12, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    names=st.sets(st.sampled_from(losses.TERMS), min_size=1),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(2, 5000)),
    heat=st.sampled_from([0.5, 1.0, 2.0]),
    floor=st.sampled_from([0.0, 0.3]),
    spread=st.sampled_from([1.0, 30.0]),
)
def test_the_loss_and_its_gradient(
    names: set[str], sizes: tuple[int, int, int], heat: float, floor: float, spread: float
) -> None:
    """As `opd_closed` in fp64, also where distributions hardly meet."""
    N, P, D = sizes
    logits, known = random(N, D, seed=0) * spread, random(P, D, seed=1) * spread
    at, text = torch.arange(N) % P, torch.arange(N) % D
    log_z, mass = torch.logsumexp(known / heat, -1), -random(P, seed=2).abs()
    weights = {name: random(N, seed=3 + i).abs() for i, name in enumerate(sorted(names))}
    teacher = TeacherRows((known / heat - log_z[:, None])[at], mass[at], text)
    expected = logits.clone()
    values = opd_closed(expected, teacher, weights, floor)
    each = [x.float() for x in (known, log_z[at], mass[at])]
    found = logits.float()
    narrow = {name: weight.float() for name, weight in weights.items()}
    shared = losses.Known(each[0], at, *each[1:], heat, text)
    mine = losses.opd_rows(found, shared, narrow, floor)
    assert set(mine) == set(values)
    for name, value in values.items():
        torch.testing.assert_close(mine[name].double(), value, rtol=2e-4, atol=2e-4)
    eps = torch.finfo(torch.float32).eps
    rounding = 64 * eps * (spread + spread / heat) * len(names)  # of log-ratios
    error = float((found - expected).abs().max())
    assert error <= 2e-5 * float(expected.abs().max()) + rounding
    only = losses.opd_rows(logits.float(), shared, narrow, floor, gradient=False)
    assert all(torch.equal(only[name], value) for name, value in mine.items())


@pytest.mark.usefixtures("by_kernels")
def test_a_token_that_the_target_rules_out_spoils_no_loss() -> None:
    logits, known = random(2, 40, seed=0).float(), random(2, 40, seed=1).float()
    known[:, 3] = float("-inf")
    at, log_z, mass = torch.arange(2), torch.logsumexp(known, -1), torch.full((2,), -0.1)
    teacher = TeacherRows(known - log_z[:, None], mass, at)
    for name in ("ce", "hard_ce", "tv", "lk_alpha"):
        expected, found, weights = logits.clone(), logits.clone(), {name: torch.ones(2)}
        opd_closed(expected, teacher, weights)
        values = losses.opd_rows(found, losses.Known(known, at, log_z, mass, 1.0, at), weights)
        assert found.isfinite().all() and values[name].isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("apart", [95.0, 130.0])
def test_an_acceptance_rate_below_all_numbers_has_a_gradient(apart: float) -> None:
    """As `opd_closed`, which tests/specforge_exp/test_losses.py holds beside autograd."""
    logits, known = random(3, 11, seed=0).float(), random(3, 11, seed=1).float()
    known[:, :4] += apart
    logits[:, 4:] += apart
    at, log_z, mass = torch.arange(3), torch.logsumexp(known, -1), torch.zeros(3)
    expected, found, weights = logits.clone(), logits.clone(), {"lk_alpha": torch.ones(3)}
    opd_closed(expected, TeacherRows(known - log_z[:, None], mass, at), weights)
    losses.opd_rows(found, losses.Known(known, at, log_z, mass, 1.0, at), weights)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_term_that_the_kernel_lacks_is_refused() -> None:
    """And every term that there is, is tried before kernels are used."""
    assert set(check.TERMS) == set(losses.TERMS)
    one = torch.ones(1)
    known = losses.Known(one[None], one.long() * 0, one, one, 1.0, one.long() * 0)
    with pytest.raises(ValueError, match="the kernel of the loss has no entropy"):
        losses.opd_rows(one[None].clone(), known, {"ce": one, "entropy": one})


def test_what_a_kernel_cannot_read_is_refused() -> None:
    turned = torch.zeros(4, 3).T
    with pytest.raises(ValueError, match=r"cannot read shape \[3, 4\] by \(1, 3\)"):
        own.row_dots(turned, turned)


HEADS = (2, 3, 16)
"""Of a trial."""


def refuse_wide(tiles: Callable[[Tensor], dict[str, Any]]) -> Callable[[Tensor], dict[str, Any]]:
    def refusing(q_RMGE: Tensor) -> dict[str, Any]:
        if q_RMGE.shape[-1] > 16:
            raise RuntimeError("out of resource: shared memory")
        return tiles(q_RMGE)

    return refusing


@pytest.fixture
def small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LENGTHS", [20, 1, 13])
    monkeypatch.setattr(check, "D", 300)


def test_kernels_are_tried(small_trial: None, by_kernels: Callable[[bool], None]) -> None:
    by_kernels(False)
    assert check.unusable(CPU, HEADS) is None
    assert check.unusable(CPU, None) is None
    assert "cpu" not in USED


@pytest.mark.parametrize(
    "broken", ["shared_queries", "own_attention", "loss_rows", "missing", "raises", "wide"]
)
def test_wrong_kernels_are_found(
    small_trial: None, by_kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:  # fmt: skip
    by_kernels(False)
    if broken == "missing":
        monkeypatch.setattr(check, "find_spec", lambda name: None)
    elif broken == "shared_queries":
        right = attention.shared_queries
        monkeypatch.setattr(attention, broken, lambda *arguments: right(*arguments) * 1.1)
    elif broken == "own_attention":
        monkeypatch.setattr(own, broken, lambda *arguments: None)
    elif broken == "loss_rows":
        monkeypatch.setattr(losses, "TERMS", losses.TERMS[::-1])
    elif broken == "wide":  # a card with too little shared memory for this draft's heads
        monkeypatch.setattr(attention, "tiles", refuse_wide(attention.tiles))
    elif broken == "raises":
        monkeypatch.delattr(own, "own_gradients")
    reason = check.unusable(CPU, (1, 2, 32) if broken == "wide" else HEADS)
    expected = {
        "wide": "RuntimeError: out of resource", "missing": "Triton is not installed",
        "raises": "ImportError: cannot import name",
        "shared_queries": "the gradient of step 0 is wrong by",
        "own_attention": "the output of step 1 is wrong by",
        "loss_rows": "the loss of kl: its gradient is wrong by",
    }[broken]  # fmt: skip
    assert reason is not None and reason.startswith(expected)
    assert "cpu" not in USED


def test_kernels_are_used_where_they_are_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU never asks; a GPU is asked once for heads as a draft has them, and the log says why
    not."""
    asked: list[Any] = []

    def unusable(device: torch.device, heads: Any) -> str | None:
        asked.append((device.type, heads))
        return "too wide" if heads and heads[2] > 128 else None

    monkeypatch.setattr(check, "unusable", unusable)
    monkeypatch.setattr(check, "TRIED", {})
    draft, meta = eagle3.small_draft(small_target()), torch.device("meta")
    try:
        draft.trains_on(CPU)
        draft.trains_on(meta)
        own = draft.config.num_key_value_heads, 2, draft.config.head_dim
        assert asked == [("meta", own)] and "meta" in USED
        for heads, right in ((own, True), ((1, 1, 256), False), (None, True), ((1, 1, 256), False)):
            check.use_kernels(meta, heads)
            assert ("meta" in USED) == right
        assert [heads for _, heads in asked] == [own, (1, 1, 256), None]
        assert "without Triton's kernels: too wide" in caplog.text
    finally:
        USED.discard("meta")


COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specforge_exp.drafts.kernels import attention, losses, own
types = {"order": "*i64", "slot": "*i64", "first": "*i64", "bounds": "*i64",
         "lse": "*fp32", "delta": "*fp32", "out": "*bf16"}
types |= dict.fromkeys(["logits", "known", "log_z", "log_mass", "weights", "sums"], "*fp32")
types |= {"at": "*i64", "heat": "fp32", "floor": "fp32"}
sizes = {"SIDE": 64, "GRAIN": 32, "WIDTH": 128, "WIDE": False, "ROWS": 16, "BLOCK": 16}
sizes |= {"GRADIENT": True}
options = {"num_stages": attention.STAGES}
found, moving = {}, []
for room in (attention, losses, own):
    for name, kernel in vars(room).items():
        if not name.endswith("_kernel"):
            continue
        moving += [
            (name, one.name) for one in kernel.params
            if types.get(one.name) == "*i64" and not one.do_not_specialize_on_alignment
        ]
        signature, constants, aligned = {}, {}, {}
        for index, argument in enumerate(kernel.arg_names):
            if argument in sizes:
                signature[argument], constants[(index,)] = "constexpr", sizes[argument]
                if room is losses and argument == "BLOCK":
                    constants[(index,)] = losses.BLOCK
                continue
            whole = argument.isupper() or argument[1:2] == "_"
            signature[argument] = types.get(argument, "i32" if whole else "*bf16")
            if signature[argument] not in ("*i64", "fp32") and argument not in "RTMGN":
                aligned[(index,)] = [["tt.divisibility", 16]]
        for arch in (89, 90):
            source = ASTSource(kernel, signature, constants, aligned)
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            found[f"{name} {arch}"] = [made.metadata.shared, len(made.asm["cubin"])]
print(json.dumps([found, moving]))
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To the machine code of an RTX 4090 and an H100, without either, for heads of 128 numbers.
    What a program holds fits the smaller one, and where a batch's numbers lie in their copy makes
    no other kernel."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env={**os.environ, **environment}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    found, moving = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 14
    assert all(shared <= 99 * 1024 and code for shared, code in found.values()), found
    assert not moving


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu() -> None:
    assert check.unusable(torch.device("cuda"), (8, 4, 128)) is None
