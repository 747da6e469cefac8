"""Imports go down only, heavy packages load where they run, and the house stays small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "specforge_exp"
RECORDS = {
    "artifacts", "config", "errors", "paths", "provenance",
    "data.conversations", "data.files", "data.formats", "data.sources", "data.synthetic",
    "data.wheels",
}  # fmt: skip
HEAVY = {"torch", "transformers", "wandb", "datasets", "modal", "hydra"}
SCRIPTS = ["prefetch", "prep", "regen", "preprocess", "train", "export", "bench", "report"]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(dotted: str) -> int:
    """1 records, 2 parts, 3 stages."""
    parts = dotted.split(".")[1:]
    names = {".".join(parts[:1]), ".".join(parts[:2])}
    return 1 if names & RECORDS or not parts else 3 if parts[0] == "stages" else 2


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports(path):
        top = name.split(".")[0]
        fans_out = path.parent.name == "generation" and path.stem.startswith("modal_")
        assert top != "hydra" and (top != "modal" or fans_out), f"{own} imports {name}"
        if top != "specforge_exp" or name == "specforge_exp.paths":
            continue
        assert layer(name) <= layer(own), f"{own} imports {name}, a layer above"
        if layer(own) == 3 and layer(name) == 3:
            pytest.fail(f"stage {own} imports stage {name}")


def test_generation_knows_no_drafts() -> None:
    for path in (PACKAGE / "generation").glob("*.py"):
        assert not any(n.startswith("specforge_exp.drafts") for n in imports(path)), path.name


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent == PACKAGE], ids=lambda p: p.name)
def test_records_load_nothing_heavy(path: Path) -> None:
    if path.stem in RECORDS:
        heavy = {n.split(".")[0] for n in imports(path, top_level_only=True)} & HEAVY
        assert not heavy, f"{path.name} imports {heavy} at the top"


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--help"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_answer_without_heavy_imports(script: str, flag: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', *{flag!r}]\n"
        "try:\n"
        f"    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'modal', 'transformers', 'wandb', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def functions(path: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]


SOURCES = [
    p
    for p in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") or part == "artifacts" for part in p.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_budgets(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= (25 if path.stem in SCRIPTS and path.parent == ROOT else 400)
    for function in functions(path):
        size = (function.end_lineno or 0) - function.lineno + 1
        allowed = 120 if function.name == "fit" and path.parent.name == "training" else 60
        assert size <= allowed, f"{function.name} has {size} lines"
        arguments = function.args
        count = len(arguments.args) + len(arguments.kwonlyargs) + len(arguments.posonlyargs)
        if not path.is_relative_to(ROOT / "tests"):
            assert count - (arguments.args[:1] != [] and arguments.args[0].arg == "self") <= 6


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def code_of(path: Path) -> str:
    """A file without its comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            code = [n for n in node.body if not is_text(n)]
            node.body = code or [ast.Pass()]
    return ast.unparse(tree)


APART = {
    "modal_sweep": 34_000,
    "hydra_sweeps": 24_000,
    "specforge_exp/generation": 26_000,
    "specforge_exp/report": 16_000,
    "specforge_exp/drafts": 18_000,
    "specforge_exp/bench": 12_000,
    "": 64_000,
}


@pytest.mark.parametrize("part", APART)
def test_the_whole_is_small(part: str) -> None:
    """Each part is read by itself: a plugin knows nothing of the package, only stages/regen.py of
    the package knows what is in generation/, only stages/report.py what is in report/, only
    stages/bench.py what is in bench/, and a configuration names the draft.

    What explains the code is free, or it would not be written.
    """
    names = [p.relative_to(ROOT).as_posix() for p in SOURCES]
    outside = ("tests/", "benchmarks/", "assets/", "runs/")
    names = [n for n in names if not n.startswith(outside)]
    home = {n: next(apart for apart in APART if n.startswith(apart)) for n in names}
    tokens = sum(len(code_of(ROOT / n)) for n in names if home[n] == part) / 4
    assert tokens <= APART[part], f"{tokens:.0f} tokens"


@pytest.mark.parametrize(
    ("part", "stage"), [("generation", "regen"), ("report", "report"), ("bench", "bench")]
)
def test_what_stands_apart_is_known_to_its_stage_alone(part: str, stage: str) -> None:
    for path in MODULES:
        own = path.relative_to(PACKAGE).as_posix()
        if own.startswith(f"{part}/") or own == f"stages/{stage}.py":
            continue
        assert not any(name.startswith(f"specforge_exp.{part}") for name in imports(path)), own


def test_plugins_know_no_package_of_ours() -> None:
    for path in sorted((ROOT / "hydra_plugins").rglob("*.py")):
        assert not any(name.startswith("specforge_exp") for name in imports(path))
