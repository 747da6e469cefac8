"""docs/seeds.md has every row once, and all that it names is there."""

import re

from conftest import REPOSITORY

TEXT = (REPOSITORY / "docs" / "seeds.md").read_text()
ROWS = {"A": 138, "B": 50, "D": 98}
WAITING = {f"D{number}" for number in (39, 42, 56, 61, 81, 93, 94, 98)}
"""Rows that need a GPU."""


def cells() -> list[list[str]]:
    lines = [line for line in TEXT.splitlines() if re.match(r"\| [ABD]\d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_row_stands_there_once() -> None:
    named = [row for ids, *_ in cells() for row in ids.split()]
    assert sorted(named) == sorted(
        f"{g}{n}" for g, most in ROWS.items() for n in range(1, most + 1)
    )


def test_every_row_has_a_place_and_a_proof() -> None:
    for ids, what, where, proof in cells():
        assert what and where
        if "*GPU*" in proof:
            assert {*ids.split()} <= WAITING
        else:
            assert "::test_" in proof, ids


def test_what_is_named_is_there() -> None:
    for name in re.findall(r"`([^`]+)`", TEXT):
        path, _, test = name.partition("::")
        if test:
            assert f"def {test}(" in (REPOSITORY / path).read_text(), name
        elif "/" in path and " " not in path and "=" not in path:
            assert (REPOSITORY / path).exists(), name
