"""Imports go down only and never in circles, houses stay apart, heavy packages load where they run,
and every house keeps within its budget."""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "wandb", "datasets", "modal", "hydra"}
MADE = r"Auto\w+\.from_\w+"
"""Calls that make something of a checkpoint of whatever kind."""
SCRIPTS = [
    "prefetch", "prep", "regen", "preprocess", "train", "export", "bench", "report", "chat",
    "pretrain", "sft",
]  # fmt: skip
HOUSES = ["specforge_exp", "modal_sweep", "hydra_sweeps", "hydra_plugins"]
MODAL_USER = "specforge_exp/generation/modal_"
"""The files that fan regeneration out."""
TOP = [path for path in ROOT.iterdir() if path.name[0] != "." and path.name != "artifacts"]
SOURCES = sorted(
    path
    for top in TOP
    for path in (top.rglob("*.py") if top.is_dir() else [top])
    if path.suffix == ".py" and not any(part[0] == "." for part in path.relative_to(ROOT).parts)
)
NAMES = {path: path.relative_to(ROOT).as_posix() for path in SOURCES}
FLOORS = {
    "specforge_exp": [
        # Records: what torch is not needed for.
        "config errors offline records paths lease provenance artifacts inputs "
        "data.conversations data.files data.formats data.sources data.synthetic",
        # Rooms, and what stands on the square.
        "losses target sharding interrupt data causal drafts training onpolicy inference serving "
        "generation bench report chat",
        "stages",
        "cli __main__",
    ],
    "modal_sweep": ["errors config", "protocol", "container", "client", "cli __main__"],
    "hydra_sweeps": [
        "errors config records overrides",
        "jobs processes reading record runner table command",
        "grid study",
    ],
    "hydra_plugins": ["modal_launcher experiment_sweeper"],
}
"""Every house from its floor upwards; the longer name of a file counts."""
BUDGETS = {
    "modal_sweep": 33_470,
    "hydra_sweeps": 32_270,
    "hydra_plugins": 940,
    "specforge_exp": 261_180,
    "specforge_exp/data": 24_580,
    "specforge_exp/target": 13_550,
    "specforge_exp/drafts": 57_570,
    "specforge_exp/training": 21_620,
    "specforge_exp/inference": 16_800,
    "specforge_exp/generation": 25_060,
    "specforge_exp/bench": 11_720,
    "specforge_exp/report": 18_260,
    "specforge_exp/chat": 4_220,
    "": 328_440,
    "specforge_exp/causal": 6_020,
}
"""Tokens of code in a house or a room of it; what explains the code is free, or it would not be
written."""


@cache
def tree(path: Path) -> ast.Module:
    """A file's syntax."""
    return ast.parse(path.read_text())


def module(path: Path) -> str:
    """Its dotted name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES if path.relative_to(ROOT).parts[0] in HOUSES}


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names that import statements mention."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(path: Path) -> set[str]:
    """Everything that a file imports, anywhere and for whatever reason."""
    return imported(ast.walk(tree(path)))


def at_start(path: Path) -> set[str]:
    """Packages that a file loads when it is imported."""
    return {name.split(".")[0] for name in imported(iter(tree(path).body))}


def of_ours(path: Path) -> set[str]:
    """Modules of the houses that a file imports."""
    modules = set()
    for name in imports(path):
        owner = name if name in MODULES else name.rpartition(".")[0]
        if owner in MODULES:
            modules.add(owner)
    return modules - {module(path)}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; [] when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("house", HOUSES)
def test_no_circles(house: str) -> None:
    graph = {name: of_ours(path) for name, path in MODULES.items() if name.startswith(house)}
    assert circle(graph) == []


def test_a_circle_is_seen() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def floor(name: str) -> int:
    """How high a module stands in its house; 0 for the house itself."""
    house, *parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        for number, names in enumerate(FLOORS[house], 1):
            if ".".join(parts[:depth]) in names.split():
                return number
    assert not parts, f"{name} stands on no floor of FLOORS"
    return 0


@pytest.mark.parametrize("house", HOUSES)
def test_imports_go_down(house: str) -> None:
    for name, path in MODULES.items():
        if not name.startswith(house):
            continue
        for other in of_ours(path):
            if other.startswith(house):
                assert floor(other) <= floor(name), f"{name} imports {other}, a floor above"


def test_houses_stay_apart() -> None:
    """Only the fronts, and regeneration on Modal, know another house."""
    for name, path in MODULES.items():
        house = name.split(".")[0]
        others = {other.split(".")[0] for other in of_ours(path)} - {house}
        if house == "hydra_plugins":
            assert others <= {"modal_sweep", "hydra_sweeps"}, f"{name} imports {others}"
        elif NAMES[path].startswith(MODAL_USER):
            assert others <= {"modal_sweep"}, f"{name} imports {others}"
        else:
            assert not others, f"{name} imports {others}"


def test_the_trainer_knows_neither_hydra_nor_modal() -> None:
    for name, path in MODULES.items():
        if name.startswith("specforge_exp"):
            packages = {other.split(".")[0] for other in imports(path)}
            assert "hydra" not in packages or name == "specforge_exp.cli", name
            assert "modal" not in packages or NAMES[path].startswith(MODAL_USER), name


def test_no_code_of_a_checkpoint_is_run() -> None:
    """transformers would ask at a terminal, and run it on a "y"."""
    for name, path in MODULES.items():
        for call in ast.walk(tree(path)):
            if isinstance(call, ast.Call) and re.fullmatch(MADE, ast.unparse(call.func)):
                options = [f"{word.arg}={ast.unparse(word.value)}" for word in call.keywords]
                assert "trust_remote_code=False" in options, f"{name}: {ast.unparse(call)}"


def test_stages_never_import_one_another() -> None:
    """But for the one that benches a whole sweep: it exports and benches every run."""
    for name, path in MODULES.items():
        if name.startswith("specforge_exp.stages.") and not name.endswith(".bench_sweep"):
            assert not any(n.startswith("specforge_exp.stages.") for n in of_ours(path)), name


@pytest.mark.parametrize(
    ("room", "users"),
    [
        ("generation", ["stages.regen"]),
        ("chat", ["stages.chat"]),
        ("report", ["stages.report", "stages.bench_sweep"]),
        # Published figures stand beside ours; chat decodes and reads streams as bench does.
        (
            "bench",
            ["stages.bench", "report.collect", "chat.local", "chat.remote", "onpolicy.rollout"],
        ),
    ],
)
def test_a_room_is_known_to_its_stage_alone(room: str, users: list[str]) -> None:
    for name, path in MODULES.items():
        inside = name.startswith(f"specforge_exp.{room}")
        if inside or name in [f"specforge_exp.{user}" for user in users]:
            continue
        assert not any(n.startswith(f"specforge_exp.{room}") for n in of_ours(path)), name


def test_generation_knows_no_drafts() -> None:
    for name, path in MODULES.items():
        if name.startswith("specforge_exp.generation"):
            assert not any(n.startswith("specforge_exp.drafts") for n in of_ours(path)), name


def test_records_load_nothing_heavy() -> None:
    for name, path in MODULES.items():
        if name.startswith("specforge_exp.") and floor(name) == 1:
            assert not at_start(path) & HEAVY, f"{name} imports {at_start(path) & HEAVY}"


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: NAMES[path])
def test_sizes(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= (15 if path.stem in SCRIPTS and path.parent == ROOT else 400)
    for function in functions(path):
        size = (function.end_lineno or 0) - function.lineno + 1
        allowed = 120 if function.name == "fit" and path.parent.name == "training" else 60
        assert size <= allowed, f"{function.name} has {size} lines"
        arguments = function.args
        count = len(arguments.args) + len(arguments.kwonlyargs) + len(arguments.posonlyargs)
        kernel = any("triton.jit" in ast.unparse(by) for by in function.decorator_list)
        if not NAMES[path].startswith("tests/") and not kernel:
            own = arguments.args[:1] != [] and arguments.args[0].arg in ("self", "cls")
            assert count - own <= 6, f"{function.name} has {count} parameters"


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def code_of(path: Path) -> str:
    """A file without its comments and docstrings."""
    bare = ast.parse(path.read_text())
    for node in ast.walk(bare):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [n for n in node.body if not is_text(n)] or [ast.Pass()]
    return ast.unparse(bare)


@cache
def tokens(path: Path) -> float:
    """Tokens of a file's code: characters / 4."""
    return len(code_of(path)) / 4


@pytest.mark.parametrize("part", BUDGETS)
def test_budgets(part: str) -> None:
    outside = ("tests/", "benchmarks/", "assets/", "runs/")
    paths = [path for path, name in NAMES.items() if not name.startswith(outside)]
    total = sum(
        tokens(path) for path in paths if NAMES[path].startswith(f"{part}/" if part else "")
    )
    assert total <= BUDGETS[part], f"{total:.0f} tokens"


OF_MODELS = [
    "specforge_exp/causal/", "specforge_exp/stages/pretrain.py", "specforge_exp/stages/sft.py",
    "specforge_exp/config/causal.py", "specforge_exp/data/stream.py", "pretrain.py", "sft.py",
]  # fmt: skip
"""All that pretrain and sft have of their own; chat and the stand-alone draft come on top."""
WITH_THEM = ["specforge_exp/chat/", "specforge_exp/stages/chat.py", "specforge_exp/config/chat.py",
             "specforge_exp/drafts/standalone/", "chat.py"]  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "most"), [(OF_MODELS, 10_540), ([*OF_MODELS, *WITH_THEM], 20_440)]
)
def test_causal_models_are_little_code(parts: list[str], most: int) -> None:
    total = sum(tokens(path) for path, name in NAMES.items() if name.startswith(tuple(parts)))
    assert total <= most, f"{total:.0f} tokens"
    for stage in ("pretrain", "sft"):
        text = (ROOT / "specforge_exp" / "stages" / f"{stage}.py").read_text()
        assert len(text.splitlines()) < 150


def class_names(house: str) -> Iterator[tuple[str, str]]:
    """The classes of a house with the file of each."""
    for name, path in MODULES.items():
        if name.startswith(house):
            for node in tree(path).body:
                if isinstance(node, ast.ClassDef):
                    yield node.name, NAMES[path]


@pytest.mark.parametrize("house", HOUSES)
def test_no_class_name_stands_twice(house: str) -> None:
    places: dict[str, str] = {}
    for name, place in class_names(house):
        assert name not in places, f"{name} in {places[name]} and {place}"
        places[name] = place


def test_no_module_hides() -> None:
    """Only Hydra's scan has a use for underscores, and it sees the fronts alone."""
    hidden = [name for name in MODULES if any(part[0] == "_" for part in name.split(".")[1:])]
    assert [name for name in hidden if not name.endswith("__main__")] == []


def test_python_is_new_enough() -> None:
    assert sys.version_info >= (3, 11)


def test_properties_are_tried_alike_everywhere(pytestconfig: pytest.Config) -> None:
    """The same examples every time, however slow a machine is; another profile can be asked for."""
    assert "--hypothesis-profile=ci" in pytestconfig.getini("addopts")
