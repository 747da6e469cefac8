"""The table at a sweep's end: its rows are its runs, best first."""

import pytest

from hydra_sweeps.record import Outcome, Run, Sweep
from hydra_sweeps.table import table

ENDS = {
    "two": Outcome("completed", [2.0, 5.0]),
    "lost": Outcome("failed", None, "why"),
    "ten": Outcome("completed", [10.0, 1.0]),
    "nothing": Outcome("completed"),
    "half": Outcome("failed", [99.0, None], "returned nan"),
    "three": Outcome("completed", [3.14159, 9.0]),
}


@pytest.mark.parametrize(
    ("direction", "order"), [("maximize", "ten three two"), ("minimize", "two three ten")]
)
def test_the_first_objective_of_what_completed_ranks(direction: str, order: str) -> None:
    objectives = [{"name": "a", "direction": direction}, {"name": "b", "direction": "minimize"}]
    runs = []
    for number, (name, end) in enumerate(ENDS.items()):
        runs.append(Run(number, name, [f"x={number}", "y=1", f"run_name={name}"]))
        runs[-1].end(end)
    runs[0].resolved, runs[0].seconds = ["x=7", "y=1", "run_name=two"], 61.4
    header, *rows = table(Sweep("grid", "s", "c", "/", objectives), runs, "run_name").splitlines()
    assert header.split() == ["rank", "run", "overrides", "a", "b", "status", "time"]
    words = [row.split() for row in rows]
    assert [row[:2] for row in words[:4]] == [
        *([str(rank), name] for rank, name in enumerate(order.split(), 1)), ["-", "nothing"]
    ]  # fmt: skip
    assert sorted(row[:2] for row in words[4:6]) == [["-", "half"], ["-", "lost"]]
    by_name = {row[1]: row[2:] for row in words[:6]}
    assert by_name["two"] == ["x=7", "2", "5", "completed", "0:01:01"]
    assert by_name["three"] == ["x=5", "3.142", "9", "completed"]
    assert by_name["lost"] == ["x=1", "-", "-", "failed"]
    assert rows[6:] == ["#1 lost failed: why", "#4 half failed: returned nan"]
