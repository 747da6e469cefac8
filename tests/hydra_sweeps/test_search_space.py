"""The search space: Hydra's grammar, conditions, first points, grids."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext
from omegaconf import DictConfig

from hydra_sweeps.errors import SweepError
from hydra_sweeps.study.params import Param
from hydra_sweeps.study.space import Space, first_point, read_space
from tests.study_app.here import composed


@pytest.fixture(autouse=True)
def fresh_hydra(hydra_restore_singletons: Any) -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


@cache
def plain() -> tuple[HydraContext, DictConfig]:
    """Without a sweep, to be read only."""
    return composed(Path("/nowhere"))


def space_of(
    *arguments: str,
    params: dict[str, str] | None = None,
    conditional: dict[str, Any] | None = None,
) -> Space:
    context, master = plain()
    loader = context.config_loader
    return read_space(loader, master, params or {}, conditional or {}, arguments)


def point_of(space: Space, text: str, strict: bool = False) -> dict[str, Any]:
    loader = plain()[0].config_loader
    return first_point(loader, space, "warm_start[0]", text, strict)


def param(text: str) -> Param:
    [searched] = space_of(text).params
    return searched


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("x=interval(0.0,1.0)", "float 0.0 to 1.0"),
        ("x=interval(1,8)", "float 1.0 to 8.0"),
        ("x=int(interval(1,8))", "int 1 to 8"),
        ("x=tag(log,interval(1e-5,1e-3))", "float 1e-05 to 0.001, log"),
        ("x=tag(log,int(interval(1,100)))", "int 1 to 100, log"),
        ("x=range(1,8)", "int 1 to 8"),
        ("x=range(1,8,3)", "int 1 to 7 by 3"),
        ("x=range(0.0,1.0,0.25)", "float 0.0 to 1.0 by 0.25"),
        ("x=range(0,1,0.3)", "float 0 to 0.9 by 0.3"),
        ("x=choice(3,2.5,true)", "3, 2.5, True"),
        ("kind=a,b,c", "a, b, c"),
        ("kind=choice('a b',c)", "a b, c"),
        ("kind=a,'a',b", "a, b"),
        ("x=choice([1,2],{a:3})", "[1,2], {a:3}"),
        ("x=shuffle(range(3,0,-1))", "1, 2, 3"),
        ("+new=choice(a,b)", "a, b"),
    ],
)
def test_the_grammar_of_overrides(text: str, described: str) -> None:
    assert param(text).described() == described


def test_values_of_a_range() -> None:
    """Its end too; what is suggested is a number as Hydra writes it."""
    tenths, odd = param("x=range(0.0,1.0,0.1)"), param("x=range(1,8,3)")
    assert odd.values() == [1, 4, 7] and len(tenths.values()) == 11 and tenths.values()[-1] == 1
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    suggested = {tenths.suggest(study.ask()) for _ in range(60)}
    assert suggested <= {*tenths.values()} and len(suggested) > 6
    assert [value for value in (0, 1, 2, 4.5, 7, 8, True, "4") if odd.holds(value)] == [1, 7]
    assert all(map(param("x=interval(0.0,6.0)").holds, (0.0, 6.0, 3))) and tenths.holds(1.0)


@pytest.mark.parametrize(
    "text",
    ["x=tag(log,interval(0.0,1.0))", "x=interval(2.0,1.0)", "x=range(3,1,-1)"],
)
def test_bounds_that_make_no_sense(text: str) -> None:
    with pytest.raises(SweepError, match="bounds must grow"):
        space_of(text)


def test_the_same_distributions_as_the_stock_sweeper() -> None:
    """A database of the one opens with the other."""
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    text = [
        "a=interval(0.0,1.0)", "b=int(interval(1,8))", "c=tag(log,interval(1e-5,1e-3))",
        "d=tag(log,int(interval(1,100)))", "e=range(1,8)", "f=range(1,9,2)",
        "g=choice(3,2.5,true,no)", "h=range(0.0,1.0,0.25)", "i=x,y", "j=choice('a b',c)",
    ]  # fmt: skip
    theirs = create_params_from_overrides(text)[0]
    trial = optuna.create_study().ask()
    space_of(*text).fill(lambda param: param.suggest(trial))
    assert trial.distributions == theirs


def test_the_command_line_wins_over_params() -> None:
    params = {"x": "interval(0.0,1.0)", "kind": "a,b", "beta": "0.5"}
    space = space_of("x=interval(2.0,3.0)", "kind=c", "gamma=1", params=params)
    assert [param.text for param in space.params] == ["x=interval(2.0,3.0)"]
    assert space.overrides == ["kind=c", "beta=0.5", "gamma=1"]
    assert space.typed == {"x", "kind", "gamma"}


CONDITIONAL = {
    "kind=b,c": {"beta": "interval(0.0,1.0)"},
    "kind=c": {"gamma": "interval(0.0,9.0)"},
    "beta=0.0": {"x": "1,2"},
}


def test_conditional_keys_exist_beside_their_value_only() -> None:
    space = space_of("kind=a,b,c", conditional=CONDITIONAL)

    def keys(kind: str, beta: float) -> list[str]:
        given = {"kind": kind, "beta": beta}
        return list(space.fill(lambda param: given.get(param.key, 1)))

    assert keys("a", 0.0) == ["kind"]
    assert keys("b", 0.5) == ["kind", "beta"]
    assert keys("b", 0.0) == ["kind", "beta", "x"]
    assert keys("c", 0.5) == ["kind", "beta", "gamma"]
    covered = {key for point in space.examples() for key in point}
    assert covered == {"kind", "beta", "gamma", "x"}


def test_a_fixed_or_configured_value_decides_a_condition_for_all() -> None:
    fixed = space_of("kind=b", conditional=CONDITIONAL)
    assert list(fixed.fill(lambda param: 0.5)) == ["beta"]
    for condition in ("kind=a", "hydra/launcher=basic"):  # a value, and the choice of a group
        configured = space_of("x=1,2", conditional={condition: {"beta": "interval(0.0,1.0)"}})
        assert list(configured.fill(lambda param: 0.5)) == ["x", "beta"]
    typed = space_of("kind=a,b", "beta=interval(0.0,0.1)", conditional=CONDITIONAL)
    assert "beta" in typed.fill(lambda param: param.values()[0] if param.kind == "choice" else 0.05)


@pytest.mark.parametrize(
    ("conditional", "message"),
    [
        ({"kind=z": {"beta": "1,2"}}, "kind is never z; it is searched in a, b"),
        ({"kid=a": {"beta": "1,2"}}, "the configuration has no kid"),
        ({"kind": {"beta": "1,2"}}, "cannot be read"),
        ({"kind=a": "beta"}, "needs keys and what is searched"),
        (
            {"kind=a": {"x": "interval(0.0,1.0)"}, "kind=b": {"x": "1,2"}},
            "must be of one kind",
        ),
    ],
)
def test_conditions_that_cannot_be(conditional: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        space_of(params={"kind": "a,b"}, conditional=conditional)


def test_a_condition_that_the_command_line_rules_out() -> None:
    space = space_of("kind=a,b", conditional={"kind=z": {"beta": "interval(0.0,1.0)"}})
    assert list(space.fill(lambda param: param.choices[0])) == ["kind"]


def test_a_key_in_params_and_under_a_condition_is_refused() -> None:
    params = {"kind": "a,b", "beta": "interval(0.0,1.0)"}
    with pytest.raises(SweepError, match="leave it in one place"):
        space_of(params=params, conditional={"kind=a": {"beta": "interval(0.0,0.5)"}})


def test_one_key_with_a_range_for_each_value() -> None:
    space = space_of(
        "kind=a,b",
        conditional={"kind=a": {"x": "interval(0.0,1.0)"}, "kind=b": {"x": "interval(5.0,6.0)"}},
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = {}
    for _ in range(20):
        trial = study.ask()
        values = space.fill(lambda param, trial=trial: param.suggest(trial))  # type: ignore[misc]
        seen[values["kind"]] = values["x"]
        study.tell(trial, 1.0)
    assert 0 <= seen["a"] <= 1 and 5 <= seen["b"] <= 6


def test_of_two_conditions_that_hold_the_first_counts() -> None:
    twice = {"kind=a,b": {"x": "range(0,1)"}, "kind=b": {"x": "range(5,6)"}}
    points = list(space_of("kind=b,c", conditional=twice).points())
    assert points == [{"kind": "b", "x": 0}, {"kind": "b", "x": 1}, {"kind": "c"}]


def test_first_points() -> None:
    space = space_of("kind=a,b", "x=interval(0.0,9.0)", "gamma=2", conditional=CONDITIONAL)
    assert point_of(space, "kind=b x=3 beta=0.25 gamma=2") == {"kind": "b", "x": 3.0, "beta": 0.25}
    assert point_of(space, "x=1e-3") == {"x": 0.001}


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("kind=z", "kind=z lies outside a, b"),
        ("x=11", "x=11 lies outside float 0.0 to 9.0"),
        ("gamma=0.3", "gamma=0.3 lies outside float 0.0 to 1.0 by 0.25"),
        ("kind=a beta=0.1", "beta exists only with kind=b"),
        ("gama=1", "gama is not searched; searched: kind, x, gamma, beta"),
        ("steps=3", "steps is 2 in all jobs"),
        ("x=1,2", "a point has one value for each key"),
        ("x=(", "cannot be read"),
    ],
)
def test_first_points_outside_the_space(point: str, message: str) -> None:
    params = {"kind": "a,b", "x": "interval(0.0,9.0)", "steps": "2"}
    params |= {"gamma": "range(0.0,1.0,0.25)"}
    space = space_of(params=params, conditional={"kind=b": {"beta": "interval(0.0,1.0)"}})
    with pytest.raises(SweepError, match=message.replace("(", r"\(")):
        point_of(space, point)


def test_the_command_line_wins_over_first_points_too() -> None:
    params = {"kind": "a,b", "x": "interval(0.0,9.0)"}
    space = space_of("x=interval(20.0,30.0)", params=params)
    assert point_of(space, "kind=a x=1") == {"kind": "a"}
    assert point_of(space_of("x=5", params=params), "kind=a x=1") == {"kind": "a"}
    beta = {"kind=b": {"beta": "interval(0.0,1.0)"}}
    fixed = space_of("kind=b", params=params, conditional=beta)
    assert point_of(fixed, "x=1 beta=0.25") == {"x": 1.0, "beta": 0.25}
    with pytest.raises(SweepError, match="lies outside"):
        point_of(space, "kind=a x=1", strict=True)


def test_grids_with_conditions() -> None:
    space = space_of(
        "kind=a,b", "x=range(0,4,2)", conditional={"kind=b": {"beta": "range(0.0,0.2,0.1)"}}
    )
    points = list(space.points())
    assert [point for point in points if point["kind"] == "a"] == [
        {"kind": "a", "x": 0}, {"kind": "a", "x": 2}, {"kind": "a", "x": 4},
    ]  # fmt: skip
    assert len(points) == 3 + 3 * 3
    assert {point["beta"] for point in points if point["kind"] == "b"} == {0.0, 0.1, 0.2}
    with pytest.raises(SweepError, match="has no end"):
        list(space_of("x=interval(0.0,1.0)").points())
