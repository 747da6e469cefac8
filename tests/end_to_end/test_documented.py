"""Every command of README and docs: its options compose, and what it names is there.

Those that need an account or a GPU are composed as all others; what they do is tested on the local
Modal and against imitations of the servers.
"""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from modal_sweep.cli import parser
from specforge_exp.__main__ import STAGES
from specforge_exp.config import Config, from_omegaconf

CONF = REPOSITORY / "conf"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = ("python ", "bash ", "make ", "modal-sweep ", "specforge ", "torchrun ", "DRY=1 ")
HISTORY = "log.md"
"""What was run with the code of its day."""
FILLED = {
    "model=mine": "model=tiny", "bench.only=[gsm8k,math500]": "bench.only=[gsm8k]",
}  # fmt: skip
"""What a reader's own files make valid."""


def commands() -> Iterator[tuple[str, str]]:
    """Page and command of every line of an indented or fenced block that begins with a program."""
    for page in PAGES:
        if page.name == HISTORY:
            continue
        fenced = False
        for line in page.read_text().replace("\\\n", " ").splitlines():
            fenced ^= line.startswith("```")
            if (fenced or line.startswith("    ")) and line.strip().startswith(PROGRAMS):
                yield page.name, re.split(r" {2,}(?=#|[a-z]+[ ;,])|\s#\s", line.strip())[0]


TYPED = list(dict.fromkeys(commands()))
"""As a reader comes to them."""
COMMANDS = sorted(TYPED)


def words_of(line: str) -> list[str]:
    """A command's words; a reader's own names stand for what is in angle brackets."""
    filled = re.sub(r"<owner>/<name>", "me/draft", line)
    filled = re.sub(r"<[^>]*>", "mine", filled)
    return [FILLED.get(word, word) for word in shlex.split(filled) if word not in ("...", "\\")]


@cache
def check_options(options: tuple[str, ...]) -> None:
    """They compose, for whichever stages they are written."""
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = compose("config", list(options), return_hydra_config=True)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    from_omegaconf(config)


def check_stage(stage: str, words: list[str]) -> None:
    """The options of a stage compose; lists of values have -m before them."""
    assert stage in STAGES
    words = [re.sub(r"^from=", "export.source=", word) for word in words]
    if words[:1] == ["status"]:
        words = words[1:]
    options = [word for word in words if not word.startswith("-") and "=" in word]
    extra = [word for word in words if "=" not in word and not word.startswith("-")]
    flags = {word for word in words if word.startswith("-")}
    assert not extra or flags & {"--cfg", "--config-dir"}, extra
    single = []
    for override in OverridesParser.create().parse_overrides(options):
        text = override.input_line or ""
        if override.is_sweep_override() and not text.startswith("hydra.sweeper"):
            studied = any(word.startswith("hparams_search=") for word in words)  # an interval
            assert "-m" in flags, f"{text} is a list and there is no -m"
            if studied:
                continue
            values = ["baseline"] if "glob" in text else override.sweep_string_iterator()
            text = f"{override.get_key_element()}={next(iter(values))}"
        single.append(text)
    check_options(tuple(single))


def check(words: list[str]) -> None:
    """What a command names exists, and takes what it is given."""
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]  # a variable of the environment
    program, *rest = words
    if program == "python" and rest[:2] == ["-m", "tests.modal_local"]:
        return check(rest[rest.index("--") + 1 :])
    if program == "torchrun":
        rest = rest[next(i for i, word in enumerate(rest) if word.endswith(".py")) :]
    if program == "specforge":
        return check_stage(rest[0], rest[1:])
    if program == "make":
        targets = re.findall(r"^([a-z0-9%-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
        named = [word for word in rest if "=" not in word]
        return _assert(named[0] in targets or named[0].startswith("test-"), named)
    if program == "modal-sweep":
        [known] = [action.choices for action in parser()._actions if action.choices]
        return _assert({*rest[0].split("|")} <= {*known}, rest)
    script = next(word for word in rest if not word.startswith("-"))
    if program == "python" and Path(script).stem in STAGES:
        return check_stage(Path(script).stem, rest[rest.index(script) + 1 :])
    return _assert((REPOSITORY / script).exists(), script)


def _assert(true: bool, what: object) -> None:
    assert true, what


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{p}:{c[:60]}" for p, c in COMMANDS])
def test_a_documented_command_is_valid(page: str, line: str) -> None:
    check(words_of(line))


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 90 and {page for page, _ in COMMANDS} > {"README.md", "gpu.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_readme_stays_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 250
