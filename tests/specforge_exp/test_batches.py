"""A window is its conversations, however they are laid on processes and forwards."""

import pytest
import torch
from conftest import conversation_set
from hypothesis import given
from hypothesis import strategies as st

from specforge_exp.config import Config, TrainerConfig
from specforge_exp.training.batches import (
    draw_of,
    largest_share,
    lay_out,
    make_batch,
    numbers_of,
    parts_of,
    share,
    window_of,
)
from specforge_exp.training.loop import planned, total_steps
from specforge_exp.training.ranks import Ranks

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 3))
def test_every_conversation_once_an_epoch(conversations: int, size: int, epoch: int) -> None:
    whole = range(-(-conversations // size))
    windows = [window_of(conversations, size, 4, epoch, index) for index in whole]
    assert sorted(n for window in windows for n in window) == list(range(conversations))
    assert windows[-1] == window_of(conversations, size, 4, epoch, len(whole) - 1)
    assert all(len(window) == size for window in windows[:-1])
    for seed, other in ((4, epoch + 1), (5, epoch), (4, epoch)):
        again = [window_of(conversations, size, seed, other, index) for index in whole]
        assert (again == windows) == ((seed, other) == (4, epoch)) or conversations < 20


@given(LENGTHS, st.integers(1, 5))
def test_processes_share_a_window_evenly(lengths: list[int], world: int) -> None:
    numbers = list(range(len(lengths)))
    parts = [share(numbers, lengths, rank, world) for rank in range(world)]
    assert sorted(n for part in parts for n in part) == numbers
    loads = [sum(lengths[n] for n in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)
    assert max(loads) <= largest_share(lengths, len(lengths), world)
    assert share([0, 1, 2], [6, 3, 3], 1, 2) == [1, 2]  # by tokens
    assert world > 1 or largest_share(lengths, 2, 1) == sum(sorted(lengths)[-2:])


@given(LENGTHS, st.integers(1, 5), st.none() | st.integers(1, 80))
def test_forwards_hold_every_conversation_once(
    lengths: list[int], accumulate: int, pack_tokens: int | None
) -> None:
    cfg = TrainerConfig(accumulate=accumulate, pack_tokens=pack_tokens)
    forwards = lay_out(list(range(len(lengths))), lengths, cfg)
    assert sorted(n for part in forwards for n in part) == list(range(len(lengths)))
    assert all(forwards)
    if pack_tokens is None:
        assert len(forwards) <= accumulate
    else:
        assert all(len(p) == 1 or sum(lengths[n] for n in p) <= pack_tokens for p in forwards)


def test_a_batch_has_no_padding() -> None:
    tokens = conversation_set([[1] * 3, [1] * 5])
    batch = make_batch(tokens, [1, 0], torch.device("cpu"))
    assert batch.ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.lengths == [5, 3]
    assert (batch.numbers, batch.draw) == ([-2, -1], 0)
    drawn = make_batch(tokens, [1, 0], torch.device("cpu"), 7)
    assert (drawn.numbers, drawn.draw) == ([1, 0], 7)
    parts = [(p.ids_T.tolist(), p.numbers, p.lengths, p.draw) for p in parts_of(drawn)]
    assert parts == [([0, 1, 2, 3, 4], [1], [5], 7), ([0, 1, 2], [0], [3], 7)]


def test_every_epoch_draws_anew() -> None:
    """And has its conversations in another order, in windows whose last may be smaller."""
    tokens, ranks = conversation_set([[1] * size for size in range(2, 11)]), Ranks()
    cfg = Config(trainer=TrainerConfig(batch_size=2, accumulate=2))
    plans = [window for window, _ in planned(cfg, tokens, range(6), ranks, torch.device("cpu"))]
    assert [(w.step, w.epoch, len(w.numbers)) for w in plans] == [
        (0, 0, 4), (1, 0, 4), (2, 0, 1), (3, 1, 4), (4, 1, 4), (5, 1, 1)
    ]  # fmt: skip
    orders = [[n for w in plans[at : at + 3] for n in w.numbers] for at in (0, 3)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(9))
    for window in plans:
        assert sorted(n for b in window.batches for n in b.numbers) == sorted(window.numbers)
        assert {(b.step, b.draw) for b in window.batches} == {(window.step, window.epoch)}
    assert draw_of(1, 0) not in (draw_of(0, epoch) for epoch in range(1000))


def test_what_is_drawn_follows_from_epoch_and_conversation() -> None:
    places = [(draw_of(seed, epoch), n) for seed in (0, 1) for epoch in (0, 1) for n in (-1, 0, 1)]
    first, again = (
        [torch.rand(2, generator=numbers_of(*place)).tolist() for place in order]
        for order in (places, reversed(places))
    )
    assert first == again[::-1] and len({tuple(pair) for pair in first}) == len(places)


@pytest.mark.parametrize(
    ("epochs", "conversations", "most", "steps"),
    [(1, 8, None, 2), (3, 7, None, 6), (3, 9, None, 9), (2, 9, 5, 5), (2, 9, 6, 6), (2, 9, 7, 6)],
)
def test_steps_are_those_of_the_epochs_or_fewer(
    cfg: Config, epochs: int, conversations: int, most: int | None, steps: int
) -> None:
    """Every epoch has all conversations; its last window may be a smaller one."""
    cfg.epochs, cfg.max_steps = epochs, most
    cfg.trainer.batch_size, cfg.trainer.accumulate = 2, 2
    assert total_steps(cfg, conversation_set([[1, 1]] * conversations)) == steps
