"""Code of one's own that options name: the files that a loss or a draft outside of this package is
made of. They are read, never imported."""

import ast
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.name
INSTALLED = {"site-packages", "dist-packages"}


def own_files(target: str) -> list[Path]:
    """The files of `module.name` and of what they import that lies in the folder where it is found;
    of an installed package its own alone. [] of this package's, and of what cannot be found.

    Files that the code opens by itself are not seen.
    """
    module = target.rpartition(".")[0]
    top = module.partition(".")[0]
    root = folder_of(top) if top not in ("", PACKAGE) else None
    if root is None:
        return []
    alone = bool(INSTALLED & {*root.parts})
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        for name in accumulate(waiting.pop().split("."), "{}.{}".format):
            own = name.partition(".")[0]
            file = file_of(root, name)
            if file and name not in files and own != PACKAGE and (own == top or not alone):
                files[name] = file
                waiting += imported(file, name)
    return [files[name] for name in sorted(files)]


def folder_of(top: str) -> Path | None:
    """Where a module or a package is imported from; None: nowhere, or it is no file."""
    with suppress(ImportError, ValueError):
        spec = find_spec(top)
        if spec and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0]).parent
        if spec and spec.origin and spec.has_location:
            return Path(spec.origin).parent
    return None


def file_of(root: Path, name: str) -> Path | None:
    """The file of a dotted name below a folder; None: there is none."""
    place = root.joinpath(*name.split("."))
    files = Path(f"{place}.py"), place / "__init__.py"
    return next((file for file in files if file.is_file()), None)


def imported(file: Path, name: str) -> Iterator[str]:
    """Dotted names that the import statements of a module mention."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # said where it is imported
        return
    above = name.split(".")[: None if file.name == "__init__.py" else -1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = above[: len(above) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{stem}.{alias.name}".lstrip(".") for alias in node.names)
