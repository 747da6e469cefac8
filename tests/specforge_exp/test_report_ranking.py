"""What a ranking says of accepted lengths that were not measured alike, or not for every seed."""

import json
from pathlib import Path
from typing import Any

import pytest
from sweep_folders import grid, write_sweep

from specforge_exp.report.collect import collect
from specforge_exp.report.ranking import (
    BEST,
    OTHERWISE,
    SAME,
    UNKNOWN,
    WORSE,
    Ranking,
    RankingRow,
    headline,
    rank,
)
from specforge_exp.report.statistics import Spread
from specforge_exp.report.table import markdown

DATA_SETS = ("stories", "arithmetic", "code")


OTHERS: dict[str, dict[str, Any]] = {
    "temperature 1.0": {"temperature": 1.0},
    "dtype bfloat16": {"dtype": "bfloat16"},
    "verify confidence": {"verify": "confidence"},
    "engine vllm": {"engine": {"name": "vllm"}},
    "data set code": {},
}


@pytest.mark.parametrize("way", OTHERS)
def test_what_was_measured_otherwise_is_no_comparison(tmp_path: Path, way: str) -> None:
    """Far apart, and by another temperature, or with a data set less: not worse, but not alike."""
    plans = grid(("baseline", "full-opd"), bench=DATA_SETS)
    sweep_dir = write_sweep(tmp_path, plans)
    file = tmp_path / plans[0].name / "bench.json"
    bench = json.loads(file.read_text())
    for figures in bench["datasets"].values():
        figures["lengths"] = [length / 3 for length in figures["lengths"]]
    if not OTHERS[way]:
        del bench["datasets"]["code"]
    bench["settings"] |= OTHERS[way]
    file.write_text(json.dumps(bench))
    found = rank(collect(sweep_dir), "accepted_length", 300)
    verdicts = {entry.name: entry.verdict for entry in found.ranked}
    assert verdicts.pop(plans[0].name) == OTHERWISE and OTHERWISE not in verdicts.values()
    said = " ".join(headline(found))
    assert "NOT COMPARABLE" in said and way in said
    assert "others are distinguishably worse" not in said
    assert "NOT COMPARABLE" not in " ".join(headline(rank(collect(sweep_dir), "loss", 300)))


def test_runs_of_other_code_are_named(tmp_path: Path) -> None:
    """Of runs of older records, which do not know theirs, nothing is said."""
    plans = grid(("baseline", "full-opd"))
    sweep_dir = write_sweep(tmp_path, plans)

    def said(*makers: str) -> str:
        for plan, maker in zip(plans, makers, strict=False):
            file = tmp_path / plan.name / "run.json"
            own = {"makers": [f"{maker}, torch 1"]}
            file.write_text(json.dumps(json.loads(file.read_text()) | own))
        sentences = headline(rank(collect(sweep_dir), "loss", 300))
        return " ".join(line for line in sentences if "same code" in line)

    assert said() == said("code aa") == said(*["code aa"] * len(plans)) == ""
    told = said("code cc, numpy 2")
    assert told.count("by code aa.") + told.count("by code aa;") == 1
    assert told.count(" by code cc, numpy 2") == 1 and "torch" not in told
    assert f"{len(plans) - 4} more by code aa" in told


@pytest.mark.parametrize("metric", ["simulated_length", "loss", "accepted_length"])
def test_other_held_out_conversations_are_no_comparison(tmp_path: Path, metric: str) -> None:
    """As many of another data set, in a sweep over `data`: not paired, and no run is worse."""
    plans = grid(("baseline", "full-opd"), bench=("held-out",))
    sweep_dir = write_sweep(tmp_path, plans)
    for number, plan in enumerate(plans):
        data = "0123456789ab" if number else "fedcba987654"
        for name, told in (
            ("evaluation.json", {"held_out": data}),
            ("bench.json", {"inputs": {"the file of bench data set held-out": data}}),
        ):
            file = tmp_path / plan.name / name
            file.write_text(json.dumps(json.loads(file.read_text()) | told))
    found = rank(collect(sweep_dir), metric, 100)
    other = next(entry for entry in found.ranked if entry.name == plans[0].name)
    verdicts = [entry.verdict for entry in found.ranked[1:]]
    assert other.verdict == OTHERWISE and verdicts.count(OTHERWISE) == 1
    assert other.against is not None and other.against.interval is None
    said = " ".join(headline(found))
    assert "NOT COMPARABLE" in said and "01234567" in said and "fedcba98" in said
    assert "bench=standard measures all alike" in said


@pytest.mark.parametrize("other", [{"skip": 40}, {"shuffle": 1}])
def test_other_prompts_of_one_file_are_no_comparison(tmp_path: Path, other: dict[str, int]) -> None:
    plans = grid(("baseline",), bench=("code",))
    sweep_dir = write_sweep(tmp_path, plans)
    for plan in plans:
        file = tmp_path / plan.name / "bench.json"
        bench = json.loads(file.read_text())
        own = other if plan is plans[0] else {}
        bench["settings"]["datasets"] = {"code": {"skip": 0, "shuffle": 0} | own}
        file.write_text(json.dumps(bench))
    found = rank(collect(sweep_dir), "accepted_length", 100)
    ways = {entry.name: entry.measured for entry in found.ranked}
    assert ways[plans[0].name] != ways[plans[1].name] == ways[plans[2].name]


def test_a_prompt_that_needed_no_verification_is_left_out(tmp_path: Path) -> None:
    plan = grid(("baseline",), bench=("stories",))[0]
    sweep_dir = write_sweep(tmp_path, [plan])
    file = tmp_path / plan.name / "bench.json"
    bench = json.loads(file.read_text())
    bench["datasets"]["stories"] |= {"lengths": [2.0, None, 4.0], "accepted_length": 3.0}
    file.write_text(json.dumps(bench | {"average": 3.0}))
    found = rank(collect(sweep_dir), "accepted_length", 200)
    [entry] = found.ranked
    assert entry.value == 3.0 and entry.interval == (2.0, 4.0)
    assert "It is the only finished one" in " ".join(headline(found))


def test_a_seed_without_the_metric_does_not_count(tmp_path: Path) -> None:
    """One of three was benched: its value is that of one seed, and so is what is said of it."""
    plans = grid(("baseline",), seeds=3, bench=DATA_SETS)
    sweep_dir = write_sweep(tmp_path, plans)
    for plan in plans:
        if plan.record["seed"]:
            (tmp_path / plan.name / "bench.json").unlink()
    sweep = collect(sweep_dir)
    found = rank(sweep, "accepted_length", 300)
    assert [entry.seeds for entry in found.ranked] == [1, 1, 1]
    assert "1 of 3" in markdown(sweep, found, rank(sweep, "accepted_length", 300, by_seed=True))
    assert "Training noise is not in the intervals" in " ".join(headline(found))


def test_a_seed_that_has_not_ended_does_not_count(tmp_path: Path) -> None:
    plans = grid(("baseline",), seeds=2)
    for plan in plans:
        if plan.record["seed"]:
            plan.status, plan.tau = "running", plan.tau + 1
    sweep = collect(write_sweep(tmp_path, plans))
    found = rank(sweep, "simulated_length", 100)
    ended = [run.metric("simulated_length") for run in sweep.runs if run.status == "completed"]
    values = [entry.value for entry in found.ranked]
    assert values == pytest.approx(sorted(filter(None, ended), reverse=True))
    assert [(entry.seeds, entry.status) for entry in found.ranked] == [(1, "completed")] * 3


def test_all_others_are_worse_where_all_were_compared() -> None:
    def said(*verdicts: str) -> str:
        rows = [
            RankingRow(f"{place}", "x", [], "completed", Spread(3.0), place, verdict=verdict)
            for place, verdict in enumerate(verdicts, 1)
        ]
        return " ".join(headline(Ranking("loss", True, rows)))

    assert "The other is distinguishably worse." in said(BEST, WORSE)
    assert "All 2 others are distinguishably worse." in said(BEST, WORSE, WORSE)
    for another in (SAME, UNKNOWN, OTHERWISE):
        assert "distinguishably worse" not in said(BEST, WORSE, another)
