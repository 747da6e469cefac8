"""What a line of metrics says, and which evaluation is the best."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_exp.causal.objective import CAUSAL
from specforge_exp.training.objective import Outcome
from specforge_exp.training.progress import DRAFTS, WindowLog, means
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.tracking import best_step


def test_the_best_evaluation_is_a_number(tmp_path: Path) -> None:
    """One that is none would be the best of all that follow it."""
    assert best_step(tmp_path, CAUSAL) is None
    losses = (float("nan"), 0.5, 0.4, float("nan"), 0.6)
    lines = [{"step": step, "eval/loss": loss} for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert best_step(tmp_path, CAUSAL) == 2


def test_a_line_in_two_has_the_time_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before an interruption was counted in the seconds after it alone."""
    now = 0.0
    monkeypatch.setattr("specforge_exp.training.progress.time.monotonic", lambda: now)
    numbers = {"rows": [2.0], "alpha": [1.0], "length": 3.0, "length_slots": 2.0}
    numbers |= {"onpolicy/loss": 4.0}
    sums = {name: torch.tensor(value) for name, value in numbers.items()}
    outcome = Outcome(torch.zeros(()), torch.zeros(1), sums, None, 30.0)
    first = WindowLog(torch.device("cpu"), 2.0)
    first.add(outcome, 60)
    first.end_window(1.0)
    first.waited, now = 3.0, 10.0
    state, now = first.state(Ranks()), 100.0
    second = WindowLog(torch.device("cpu"), 2.0)
    second.restore(state, 0)
    second.add(outcome, 60)
    second.end_window(4.0)
    second.waited, now = second.waited + 3.0, 105.0
    line = second.metrics(Ranks(), DRAFTS.means)
    expected = {
        "seconds": 15.0, "tokens_per_s": 8.0, "mfu": 2.0, "data_wait": 0.4, "loss": 2.5,
        "alpha": 0.5, "simulated_length": 1.5, "supervised": 4.0, "onpolicy/loss": 4.0,
        "supervised_tokens_per_s": 4 / 15,
    }  # fmt: skip
    assert {k: line[k] for k in expected} == pytest.approx(expected)
    assert second.next().past == 0


def test_a_drafts_means_are_of_rows_and_of_slots() -> None:
    """Per step and over all rows; lengths over slots that are supervised at every step."""
    sums = {"rows": [4.0, 2.0], "alpha": [2.0, 0.5], "length": 9.0, "length_slots": 4.0}
    found = DRAFTS.means({name: torch.tensor(value) for name, value in sums.items()})
    text = {"alpha/0": 0.5, "alpha/1": 0.25, "alpha": 2.5 / 6, "supervised": 6.0}
    assert found == pytest.approx(text | {"simulated_length": 2.25})
    sums |= {"rows": [4.0, 0.0], "alpha": [2.0, 0.0], "length": 0.0, "length_slots": 0.0}
    sums |= {"onpolicy/anchors": 4.0, "onpolicy/accepted": 6.0, "onpolicy/loss": 3.0}
    # A step without rows has no part in the mean over all.
    found = DRAFTS.means({name: torch.tensor(value) for name, value in sums.items()})
    text = {"alpha/0": 0.5, "alpha/1": 0.0, "alpha": 0.5, "supervised": 4.0}
    replay = {"onpolicy/anchors": 4.0, "onpolicy/loss": 3.0}
    length = {"simulated_length": 1.0, "onpolicy/accepted_length": 2.5}
    assert found == pytest.approx(text | replay | length)
    replayed = ("onpolicy/anchors", "onpolicy/accepted", "onpolicy/loss")
    sums |= {"onpolicy/verifications": 5.0, "onpolicy/gained": 16.0}
    found = DRAFTS.means({name: torch.tensor(value) for name, value in sums.items()})
    assert found["onpolicy/accepted_length"] == pytest.approx(3.2)
    assert found["onpolicy/replayed_length"] == pytest.approx(2.5)
    own = {name: value for name, value in sums.items() if name not in replayed}
    found = DRAFTS.means({name: torch.tensor(value) for name, value in own.items()})
    lengths = found["onpolicy/accepted_length"], found["onpolicy/replayed_length"]
    assert lengths == pytest.approx((3.2, 1.0))


class Two(Ranks):
    """The first of two processes, the other of which says `other`."""

    def gather(self, thing: Any) -> list[Any]:
        return [thing, other(thing)]


def other(own: Any) -> Any:
    """Three times the tokens, FLOP, waiting and sums of the first process."""
    tokens, flops, waited, sums = own
    return 3 * tokens, 3 * flops, 3 * waited, {name: 3 * value for name, value in sums.items()}


def test_a_line_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of two processes in four seconds; a resumed run writes the same line."""
    now = 0.0
    monkeypatch.setattr("specforge_exp.training.progress.time.monotonic", lambda: now)
    sums = {
        "rows": torch.tensor([4.0, 0.0]), "alpha": torch.tensor([3.0, 0.0]),
        "length": torch.tensor(9.0), "length_slots": torch.tensor(4),
        "onpolicy/loss": torch.tensor(0.5), "onpolicy/anchors": torch.tensor(2),
        "onpolicy/accepted": torch.tensor(3),
    }  # fmt: skip
    expected = {
        "loss": 1.5, "alpha": 0.75, "alpha/0": 0.75, "alpha/1": 0.0, "simulated_length": 9 / 4,
        "supervised": 32.0, "onpolicy/loss": 0.5 * 8 / 2, "onpolicy/anchors": 16.0,
        "onpolicy/accepted_length": 1 + 3 / 2, "tokens_per_s": 60 * 8 / 4,
        "supervised_tokens_per_s": 32 / 4, "mfu": 5.0 * 8 / 4 / 10, "data_wait": 0.25 * 4 / 2 / 4,
        "seconds": 4.0,
    }  # fmt: skip
    log, ranks = WindowLog(torch.device("cpu"), 10.0), Two(0, 2)
    for loss in (1.0, 2.0):
        log.add(Outcome(torch.zeros(()), torch.zeros(2), sums, None, 5.0), 60)
        log.end_window(loss)
    log.waited, now = 0.25, 4.0
    line = log.metrics(ranks, means)
    line.pop("peak_memory_mb")
    assert line == expected and log.metrics(ranks, means)["loss"] == 1.5
    resumed = WindowLog(torch.device("cpu"), 10.0)
    resumed.restore(log.state(ranks), 0)
    again = resumed.metrics(Ranks(), means)
    again.pop("peak_memory_mb")
    assert again == expected
    second = WindowLog(torch.device("cpu"), 10.0)
    second.restore(log.state(ranks), 1)
    assert (second.tokens, second.flops, second.sums, second.windows) == (0.0, 0.0, {}, 2)
