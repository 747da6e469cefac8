"""What a line of metrics says, and which evaluation is the best."""

import json
from pathlib import Path

import pytest
import torch

from specforge_exp.causal.objective import CAUSAL
from specforge_exp.training.objective import Outcome
from specforge_exp.training.progress import WindowLog
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
    sums = {"rows": torch.tensor([2.0]), "nll": torch.ones(1), "top1": torch.ones(1)}
    outcome = Outcome(torch.zeros(()), torch.zeros(1), sums, None, 30.0)
    first = WindowLog(torch.device("cpu"), 2.0)
    first.add(outcome, 60)
    first.waited, now = 3.0, 10.0
    state, now = first.state(Ranks()), 100.0
    second = WindowLog(torch.device("cpu"), 2.0)
    second.restore(state, 0)
    second.add(outcome, 60)
    second.waited, now = second.waited + 3.0, 105.0
    line = second.metrics(Ranks(), CAUSAL.means)
    assert {k: line[k] for k in ("seconds", "tokens_per_s", "mfu", "data_wait")} == {
        "seconds": 15.0, "tokens_per_s": 8.0, "mfu": 2.0, "data_wait": 0.4,
    }  # fmt: skip
    assert second.next().past == 0
