"""The law of values: what is typed is what a job gets, as with Hydra's basic sweeper; and names."""

import shlex
from collections.abc import Iterator, Sequence

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_sweeps.command import run_command
from hydra_sweeps.errors import SweepError
from hydra_sweeps.grid.points import points
from hydra_sweeps.overrides import bounded, parse
from hydra_sweeps.study.space import first_point, read_space


@pytest.fixture(scope="module")
def app() -> Iterator[tuple[ConfigLoaderImpl, DictConfig]]:
    """A loader and what a sweeper gets, of an app with the keys x, y and z."""
    ConfigStore.instance().store(name="values", node={"x": 0, "y": 1, "z": {"a": 1}})
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("values", create_config_search_path(None))
    master = hydra.compose_config("values", [], RunMode.MULTIRUN, with_log_configuration=False)
    yield hydra.config_loader, master  # type: ignore[misc]
    GlobalHydra.instance().clear()


COMPOSED: dict[tuple[str, ...], str] = {}
"""By overrides: several ways lead to the same ones."""


def configs(app: tuple[ConfigLoaderImpl, DictConfig], runs: Sequence[Sequence[str]]) -> list[str]:
    """What each run's x, y and z are, types and all; each configuration once."""
    loader, master = app
    for key in {tuple(overrides) for overrides in runs} - COMPOSED.keys():
        config = loader.load_sweep_config(master, list(key))
        content = OmegaConf.to_container(OmegaConf.masked_copy(config, ["x", "y", "z"]))
        COMPOSED[key] = repr(content)
    return list(dict.fromkeys(COMPOSED[tuple(overrides)] for overrides in runs))


def of_hydra(app: tuple[ConfigLoaderImpl, DictConfig], *arguments: str) -> list[str]:
    """The same of Hydra's basic sweeper."""
    [runs] = BasicSweeper.split_arguments(parse(app[0], arguments), None)
    return configs(app, runs)


def of_ours(app: tuple[ConfigLoaderImpl, DictConfig], *arguments: str) -> dict[str, list[str]]:
    """Of a grid, a case of a grid, the commands behind its rows, and a study's grid."""
    loader, master = app
    grid = points(loader, arguments, {}, [])
    alone = [shlex.split(run_command(run)) for run in grid]
    space = read_space(loader, master, {}, {}, arguments)
    study = [[*space.overrides, *space.texts_of(point)] for point in space.points()]
    return {
        "grid": configs(app, grid),
        "case": configs(app, points(loader, [], {}, [shlex.join(arguments)])),
        "command": configs(app, [words[2:] for words in alone]),
        "study": configs(app, study),
    }


def quoted(text: str, quote: Quote) -> str:
    return QuotedString(text, quote).with_quotes()


LETTERS = "ab1 .,:=()[]{}'\"\\$#!&;~ä漢\t-_@/+*?|%"
STRINGS = st.builds(quoted, st.text(LETTERS, max_size=6), st.sampled_from(Quote))
WORDS = st.sampled_from(
    ["a", "b-c", "1", "01", "1.0", "-2", "1e-3", "0.1", "null", "NULL", "true", "False", "nan",
     "inf", "a b", r"a\,b", "$x", "${y}", "${oc.decode:'5'}", "a/b", "1:2", "'null'", "'1'",
     "'true'", "'[1,2]'", "'${y}'", "''", "'a b'"]
)  # fmt: skip
KEYS = st.sampled_from(["a", "b", "1", "'a'"])


def nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A list or a dictionary."""
    items = st.lists(inner, max_size=3).map(lambda values: f"[{','.join(values)}]")
    pairs = st.dictionaries(KEYS, inner, max_size=2)
    return items | pairs.map(lambda d: "{" + ",".join(f"{k}:{v}" for k, v in d.items()) + "}")


VALUES = st.recursive(STRINGS | WORDS, nested, max_leaves=4)
NUMBERS = st.sampled_from(["0", "1", "5", "0.1", "0.3", "1.0", "0.25"])
LISTS = st.lists(VALUES, min_size=1, max_size=2).map(",".join)
SWEEPS = LISTS | LISTS.map(lambda values: f"choice({values})")
ARGUMENTS = st.builds(
    lambda x, y, key: [f"x={x}", f"{key}={y}"],
    SWEEPS, SWEEPS, st.sampled_from(["y", "+new", "++y", "z.a"]),
)  # fmt: skip


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arguments=ARGUMENTS)
@example(arguments=["x='1','a b'", "y='null',null,'[1,2]',[1,2],1,true,1.0"])
@example(arguments=["x=choice('1','2')", "~z"])
@example(arguments=["~z", "x=1,2", "+z=3"])
@example(arguments=["~x", "+x=1,2"])
@example(arguments=["x=range(1,4),", "y=range(0.0,1.0,0.25)"])
@example(arguments=["x=nan,'nan'", "y={a:[1,'2']},{}"])
def test_what_is_typed_is_what_a_job_gets(
    app: tuple[ConfigLoaderImpl, DictConfig], arguments: list[str]
) -> None:
    try:
        expected = of_hydra(app, *arguments)
    except (HydraException, OmegaConfBaseException, AssertionError, TypeError):
        assume(False)
    for way, configurations in of_ours(app, *arguments).items():
        assert configurations == expected, way


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("x=choice('ä','b')", ["ä", "b"]),
        ("x=choice('a!','~')", ["a!", "~"]),
        ("x=choice(\"it's\",'#')", ["it's", "#"]),
        ("x=choice('a,b','')", ["a,b", ""]),
    ],
)
def test_what_hydra_cannot_read_again_is_quoted(
    app: tuple[ConfigLoaderImpl, DictConfig], argument: str, values: list[str]
) -> None:
    for way, configurations in of_ours(app, argument).items():
        assert [eval(c)["x"] for c in configurations] == values, way


def test_float_ranges_keep_their_last_value(app: tuple[ConfigLoaderImpl, DictConfig]) -> None:
    """A grid has what Hydra's has; a study, where the end counts, that and the end."""
    for low, high, step in [(0, 1, 0.3), (0.1, 0.5, 0.1), (0, 1, 0.1), (0, 0.9, 0.3), (1, 2, 0.7)]:
        argument = f"x=range({low},{high},{step})"
        ours, hydra = of_ours(app, argument), of_hydra(app, argument)
        assert ours["grid"] == hydra
        assert ours["study"][: len(hydra)] == hydra and len(ours["study"]) - len(hydra) <= 1
        values = [eval(configuration)["x"] for configuration in ours["study"]]
        count = round((high - low) / step - 0.5 + 1e-9)
        assert values == pytest.approx([low + index * step for index in range(count + 1)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["x=1,2", "x=3,4"],
        ["x=1,2", "++x=3,4"],
        ["+a={x:1}", "+a={y:10}"],
        ["+a={x:1},{x:2}", "+a={y:10},{y:20}"],
    ],
)
def test_one_key_given_twice(
    app: tuple[ConfigLoaderImpl, DictConfig], arguments: list[str]
) -> None:
    loader, master = app
    message = "is given twice, as .* and as .*; leave it in one place"
    with pytest.raises(SweepError, match=message):
        points(loader, arguments, {}, [])
    with pytest.raises(SweepError, match=message):
        points(loader, [], {}, [shlex.join(arguments)])
    with pytest.raises(SweepError, match=message):
        read_space(loader, master, {}, {}, arguments)


def test_the_last_plain_value_counts(app: tuple[ConfigLoaderImpl, DictConfig]) -> None:
    assert points(app[0], ["x=1", "x=2", "y=3,4"], {"++y": "5,6"}, []) == [
        ["y=3", "x=2"], ["y=4", "x=2"]
    ]  # fmt: skip
    assert points(app[0], ["x=1,2", "x=3"], {}, []) == [["x=3"]]


def test_jobs_come_in_hydras_order(app: tuple[ConfigLoaderImpl, DictConfig]) -> None:
    """What is typed stands where the params of a file have its key."""
    params = {"x": "1,2", "y": "3,4", "z.a": "5"}
    typed = ["+new=1,2", "y=6,7", "x=0", "x=8,9"]
    [runs] = BasicSweeper.split_arguments(
        parse(app[0], [*(f"{key}={value}" for key, value in params.items()), *typed]), None
    )
    assert points(app[0], typed, params, []) == [[*run] for run in runs]


def test_points_that_are_tried_first_are_read_alike(
    app: tuple[ConfigLoaderImpl, DictConfig],
) -> None:
    loader, master = app
    arguments = ["x='1',1,'null',null,true", "y=choice('1','2')"]
    space = read_space(loader, master, {}, {"\"x='1'\"": {"z.a": "'5',5"}}, arguments)

    def job(point: str) -> list[str]:
        values = first_point(loader, space, "first", point, strict=True)
        return space.texts_of(values)

    assert job("\"x='1'\" y=1 \"z.a='5'\"") == ["x='1'", "y=1", "z.a='5'"]
    assert job("x=1 y=2") == ["x=1", "y=2"]
    assert job("x=null") == ["x=null"] and job("x=true") == ["x=True"]
    assert job("\"x='null'\"") == ["x='null'"]
    with pytest.raises(SweepError, match=r"exists only with .x='1'"):
        job("x=1 z.a=5")


def test_names_are_bounded() -> None:
    assert bounded("a" * 200) == "a" * 200
    long = [bounded("ä" * 150 + end) for end in ("", "x", "y")]
    assert len(set(long)) == 3 and all(190 < len(name.encode()) <= 200 for name in long)
