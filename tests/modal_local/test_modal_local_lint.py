"""Imports that an image does not install."""

import pytest

from modal_local.client import LocalModal
from modal_local.programs import Program

pytest_plugins = ["modal_local.fixtures"]
pytestmark = pytest.mark.usefixtures("needs_modal")


def test_lint_finds_a_package_the_image_lacks(
    run_program: Program, local_modal: LocalModal
) -> None:
    app = """
        import json
        import modal

        app = modal.App("lint")
        bare = modal.Image.debian_slim()
        good = bare.uv_pip_install("numpy>=2", "tqdm")

        @app.function(image=bare)
        def lacking():
            import numpy
            from tqdm.auto import tqdm

        @app.function(image=good)
        def complete():
            pass
        """
    main = """
        with app.run():
            print(json.dumps([lacking.object_id, complete.object_id]))
        """
    lacking, complete = run_program(app, main)
    found = local_modal.lint()
    assert found[lacking]["missing_imports"] == {
        "numpy": ["/root/program.py"],
        "tqdm": ["/root/program.py"],
    }
    assert found[complete]["missing_imports"] == {}


def test_installed_by_reads_the_commands_of_the_client() -> None:
    from modal_local.image_lint import installed_by

    assert installed_by("RUN python -m pip install 'torch>=2' Foo_Bar[x]==1") == {
        "torch",
        "foo-bar",
    }
    assert installed_by(
        "RUN /.uv/uv pip install --python $(command -v python) --compile-bytecode a b"
    ) == {"a", "b"}
    assert installed_by("RUN apt-get install -y git && pip install --index-url https://x y") == {
        "y"
    }
    assert installed_by("ENV A=pip install b") == set()


def test_imported_leaves_out_what_is_optional() -> None:
    from modal_local.image_lint import imported

    source = """
import a.b
from c import d
from . import e
try:
    import f
except ImportError:
    import g
if TYPE_CHECKING:
    import h
def late():
    import i
"""
    assert imported(source) == {"a", "c", "g", "i"}
