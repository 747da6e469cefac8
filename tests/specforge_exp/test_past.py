"""What a target has read: tokens go in and out, and the states are those of plain forwards."""

from typing import Any

import pytest
import torch
from conftest import small_target
from families import FAMILIES, build, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_exp.errors import InputError
from specforge_exp.target import Past, Target, check_decoding
from specforge_exp.target.anatomy import CACHE

TEXT = tokens(60)
OTHER = tokens(60, 1)


@pytest.fixture(scope="module", params=["Llama 3.x", "Gemma 4", "DeepSeek-V3.2", "Qwen3.5", "LFM2"])
def target(request: pytest.FixtureRequest) -> Target:
    """Keys and values; windows and shared ones; an indexer's; recurrent states; convolutions."""
    return Target(build(FAMILIES[request.param]()).eval().requires_grad_(False), [1, 5])


def assert_whole(past: Past) -> None:
    """It has the auxiliary states of its tokens."""
    aux_1TA, _ = past.target.features(torch.tensor([past.ids]))
    torch.testing.assert_close(torch.cat(past.aux, 1), aux_1TA, rtol=1e-4, atol=1e-4)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_read_and_forgotten(target: Target, data: st.DataObject) -> None:
    """As in verifications: some tokens, of which the last are taken back, once or twice."""
    past = Past(target)
    past.read(TEXT[: data.draw(st.integers(1, 20))].tolist())
    for _ in range(4):
        at = len(past.ids)
        good, bad = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        new = [*TEXT[at : at + good].tolist(), *OTHER[at : at + max(bad, not good)].tolist()]
        last_1TH = past.read(new)
        expected_1TH = target.features(torch.tensor([past.ids]))[1][:, -len(new) :]
        torch.testing.assert_close(last_1TH, expected_1TH, rtol=1e-4, atol=1e-4)
        part = data.draw(st.integers(0, len(new) - good))
        past.forget(part)
        past.forget(len(new) - good - part)
    assert past.ids == TEXT[: len(past.ids)].tolist()
    assert_whole(past)


def test_the_next_prompt_begins_like_the_last(target: Target) -> None:
    """It goes back behind the last tokens that were read, also behind all but one."""
    past = Past(target)
    for prompt in (TEXT[:20], torch.cat([TEXT[:12], OTHER[:9]]), TEXT[:4], TEXT[:30]):
        last_1TH = past.begin(prompt.tolist())
        assert past.ids == prompt.tolist()
        expected_1TH = target.features(prompt[None])[1][:, -last_1TH.shape[1] :]
        torch.testing.assert_close(last_1TH, expected_1TH, rtol=1e-4, atol=1e-4)
        past.read(OTHER[40:43].tolist())
    assert_whole(past)


def test_a_past_that_is_kept_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one per cent, in fp32."""
    target = small_target()
    check_decoding(target)
    own = target.decoder.forward

    def off(ids: Any, **rest: Any) -> Any:
        out = own(ids, **rest)
        if rest.get(CACHE) is not None:
            out.last_hidden_state = out.last_hidden_state * 1.01
        return out

    monkeypatch.setattr(target.decoder, "forward", off)
    with pytest.raises(InputError, match=r"with its past kept its states differ by 1%"):
        check_decoding(target)
