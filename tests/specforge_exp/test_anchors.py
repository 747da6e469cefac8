"""Where the draft proposes: as many as asked for, drawn evenly, by seed and conversation."""

from collections import Counter

import torch
from torch import Tensor

from specforge_exp.config.onpolicy import OnPolicyConfig
from specforge_exp.onpolicy.anchors import Draw, draw, missed

POSSIBLE = torch.tensor([3, 4, 7, 8, 9, 12, 20, 21])


def drawn(seed: int, most: int) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), POSSIBLE, most)


def evenly(found: list[Tensor], among: list[int]) -> bool:
    """Whether each is there about as often: within four standard deviations of its count."""
    counts = Counter(at for anchors in found for at in anchors.tolist() if at in among)
    mean = sum(counts.values()) / len(among)
    return set(counts) == set(among) and max(abs(c - mean) for c in counts.values()) < 4 * mean**0.5


def test_uniform_anchors() -> None:
    found = [drawn(seed, 3).uniform() for seed in range(200)]
    assert all(len(anchors) == 3 and anchors.tolist() == sorted({*anchors.tolist()})
               for anchors in found)  # fmt: skip
    assert evenly(found, POSSIBLE.tolist())
    assert drawn(0, 99).uniform().tolist() == POSSIBLE.tolist()


def test_anchors_at_errors() -> None:
    """Up to their share, of those that may be anchors; the rest is drawn from the others."""
    errors = torch.tensor([2, 7, 8, 9, 12, 30])
    found = [drawn(seed, 4).with_errors(errors, 0.5) for seed in range(200)]
    for anchors in found:
        assert len(anchors) == 4 and anchors.tolist() == sorted({*anchors.tolist()})
        assert {*anchors.tolist()} <= {*POSSIBLE.tolist()}
        assert len({*anchors.tolist()} & {7, 8, 9, 12}) >= 2
    assert evenly(found, [7, 8, 9, 12]) and evenly(found, [3, 4, 20, 21])
    none = [drawn(seed, 4).with_errors(errors, 0.0) for seed in range(200)]
    assert evenly(none, POSSIBLE.tolist())
    few = drawn(0, 4).with_errors(torch.tensor([8]), 1.0)
    assert 8 in few.tolist() and len(few) == 4


def test_a_draw_is_of_its_seed_and_conversation() -> None:
    possible_T = torch.zeros(60, dtype=torch.bool).index_fill_(0, POSSIBLE, True)

    def anchors(seed: int, number: int, **options: float) -> list[int]:
        own = OnPolicyConfig(name="replay", **{"anchors": 4, **options})  # type: ignore[arg-type]
        one = draw(own, seed, number, possible_T, 4)
        found: list[int] = one.uniform().tolist()
        assert len(found) == min(one.most, len(POSSIBLE))
        return found

    assert anchors(1, 2) == anchors(1, 2)
    assert len({str(anchors(seed, number)) for seed in (1, 2) for number in range(4)}) > 6
    assert [len(anchors(1, 2, budget=b)) for b in (0.04, 0.11, 0.16, 9.0)] == [0, 2, 3, 4]
    one = draw(OnPolicyConfig(name="replay"), 1, 2, possible_T, 4)
    accept, choose = one.numbers(3, 5)
    assert accept.shape == choose.shape == (3, 5) and len({*accept.flatten().tolist()}) == 15
    assert not accept.equal(choose)


def test_a_chain_misses_nothing_after_its_turn() -> None:
    """The text of two turns, and what stands between them or behind them."""
    ids_T, turns_T = torch.arange(10, 22), torch.tensor([0] + [1] * 4 + [0] + [2] * 6)
    for anchor, chain, before in [
        (2, [13, 14, 99, 99], []), (2, [13, 14, 15, 16], []), (2, [13, 99, 15, 16], [3]),
        (2, [99, 14, 15, 16], [2]), (10, [21, 99, 99, 99], []), (10, [99] * 4, [10]),
        (6, [17, 18, 19, 20], []), (6, [17, 18, 19, 99], [9]), (4, [15, 16, 17, 18], []),
    ]:  # fmt: skip
        found = missed(torch.tensor([anchor]), torch.tensor(chain)[:, None], ids_T, turns_T)
        assert found.tolist() == before, (anchor, chain)
    chains = torch.tensor([[12, 99], [99, 14], [0, 0], [0, 0]])  # both miss what follows 2
    assert missed(torch.tensor([1, 2]), chains, ids_T, turns_T).tolist() == [2]
