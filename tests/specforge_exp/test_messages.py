"""Laws of what is said: an option has its group before it, a command its script's place."""

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import specforge_exp
from specforge_exp.config import Config
from specforge_exp.config.choices import DraftConfig

HOUSE = Path(specforge_exp.__file__).parent
OTHERS = ("config.json", "verified per token gained")
"""Of a message whose words are keys of another file, or of a table."""


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a file's code, what is put into them as {}."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    within = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    plain = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and id(node) not in within | plain:
            yield node.lineno, str(node.value)


def said() -> Iterator[tuple[str, str]]:
    """Where each text of the trainer stands, and the text."""
    for path in sorted(HOUSE.rglob("*.py")):
        for line, text in texts(path):
            yield f"{path.relative_to(HOUSE)}:{line}", text


def of_groups() -> set[str]:
    """Options that have a group before their name."""
    kinds = [field.type for field in fields(Config) if is_dataclass(field.type)]
    for file in HOUSE.glob("drafts/*/config.py"):
        module = importlib.import_module(f"specforge_exp.drafts.{file.parent.name}.config")
        own = [kind for kind in vars(module).values() if isinstance(kind, type)]
        kinds += [kind for kind in own if issubclass(kind, DraftConfig)]
    return {f.name for kind in kinds for f in fields(kind)} - {f.name for f in fields(Config)}


def test_options_are_named_with_their_group() -> None:
    """`draft_vocab_size=9` could not be typed; `draft.draft_vocab_size=9` can."""
    names = of_groups()
    assert {"draft_vocab_size", "batch_size", "_target_"} <= names
    bare = [
        f"{where}: {name}= in {text[:60]!r}"
        for where, text in said()
        if not any(other in text for other in OTHERS) and not text.startswith("{}: ")
        for name in re.findall(r"(?<![\w.{}%/-])([a-z_]+)=(?!=)", text)
        if name in names
    ]
    assert bare == []


def test_no_command_is_written_out() -> None:
    """`config.machine` knows where the scripts are seen from here, and `specforge <stage>`."""
    assert [where for where, text in said() if re.search(r"python [a-z]+\.py", text)] == []
