"""Every command of README and docs: its options compose, and what it names is there.

So are options, files, tests and messages that sentences and tables name, and the defaults are so.

Those that need an account or a GPU are composed as all others; what they do is tested on the local
Modal and against imitations of the servers.
"""

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import CONF, REPOSITORY, composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from hydra_sweeps.grid.config import ExperimentSweeperConf
from hydra_sweeps.study.config import OptunaAsyncConf
from modal_sweep.cli import parser
from modal_sweep.config import ImageSettings, JobSettings, ModalLauncherConf
from specforge_exp.config import Config, draft_config_class, from_omegaconf
from specforge_exp.config.resolvers import SCRIPTS

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SAID = [
    path
    for path in (*PAGES, REPOSITORY / "CONTRIBUTING.md")
    if path.name not in ("log.md", "seeds.md")
]
"""Pages that describe what is."""
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
    config: Any = composed(*options, whole=True)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    from_omegaconf(config)


def check_stage(stage: str, words: list[str]) -> None:
    """The options of a stage compose; lists of values have -m before them."""
    assert stage in SCRIPTS
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
    if program == "python" and Path(script).stem in SCRIPTS:
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


@pytest.mark.parametrize("group", "model data draft experiment loss engine hparams_search".split())
def test_every_choice_of_a_group_is_on_a_page(group: str) -> None:
    words = {word for page in SAID for word in re.findall(r"[\w.-]*\w", page.read_text())}
    assert {path.stem for path in (CONF / group).rglob("*.yaml")} <= words


def test_tables_of_data_sets_are_those_of_conf() -> None:
    """Hub id, file or configuration, and how many prompts."""
    looked = 0
    for page, heading, pattern in (
        ("data", "data=", "data/*"),
        ("bench", "name", "bench/standard"),
    ):
        rows = {
            row[heading]: row
            for row in tables((REPOSITORY / f"docs/{page}.md").read_text(), heading)
        }
        for file in CONF.glob(f"{pattern}.yaml"):
            config: Any = OmegaConf.to_container(OmegaConf.load(file))
            named = config.get("suite") or {file.stem: next(iter(config.get("train", [{}])))}
            for name, source in named.items():
                path, row = str(source.get("path")), rows.get(name)
                if row is None or not path.startswith("hub:"):
                    assert not path.startswith("hub:"), name
                    continue
                said = " ".join(row.values())
                for part in re.split("[:/]", path.removeprefix("hub:").partition("{")[0]):
                    assert part in said, (name, part)
                assert page != "bench" or row["prompts"] == str(source["limit"]), name
                looked += 1
    assert looked == 18


def test_readme_stays_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 250


DRAFTS = ("dspark.DSpark", "eagle3.Eagle3", "peagle.PEagle", "standalone.Standalone")
"""DSpark has DFlash's options, too."""
OWNERS: dict[str, Sequence[type]] = {
    "draft": [draft_config_class(f"specforge_exp.drafts.{name}") for name in DRAFTS],
    "hydra.sweeper": (ExperimentSweeperConf, OptunaAsyncConf),
    "hydra.launcher": (ModalLauncherConf,),
    "resources": (JobSettings,),
    "image": (ImageSettings,),
}
"""Who has the options below a key, where that is no part of Config."""
A_FILE = re.compile(r"\.(py|json|jsonl|html|md|csv|yaml)$")
FOREIGN = {"Error locating target", "Key '/runs' is not in struct", "401", "gated"}
"""Messages of Hydra and of the hub."""
READERS = {"conf/model/mine.yaml", "conf/hydra/sweeper/sampler/"}
"""Files of their own."""


def spans(page: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def default_of(key: str) -> Any:
    """The default of an option by its whole key; MISSING where any key may stand.

    Raises:
        KeyError: there is no such option.
    """
    prefix = next((name for name in OWNERS if key.startswith(f"{name}.")), "")
    parts = key.removeprefix(f"{prefix}.").split(".")
    owners = OWNERS.get(prefix, (Config,))
    owner = next((one for one in owners if parts[0] in {f.name for f in fields(one)}), owners[0])
    while True:
        field = {field.name: field for field in fields(owner)}[parts.pop(0)]
        if not parts:
            return default_in(field)
        if not is_dataclass(field.type):
            return MISSING
        owner = field.type


def default_in(field: Any) -> Any:
    """Of a field."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def options_in(span: str) -> Iterator[str]:
    """Keys of options of groups that are ours in what stands in backticks."""
    groups = {field.name for field in fields(Config) if is_dataclass(field.type)}
    for word in span.split():
        key = word.strip("'").lstrip("+~").partition("=")[0]
        known = key.startswith(tuple(f"{name}." for name in (*groups, *OWNERS)))
        if known and re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) and not A_FILE.search(key):
            yield key


@pytest.mark.parametrize("page", SAID, ids=lambda page: page.name)
def test_what_stands_in_backticks_is_there(page: Path) -> None:
    tops = {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    defined = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    for span in spans(page):
        for word in span.split():
            if re.fullmatch(r"test_\w+", word):
                assert f"def {word}(" in defined, word
            elif word.partition("/")[0] in tops and "=" not in word and word not in READERS:
                pattern = re.sub("<[^>]*>", "*", word).rstrip("/")
                assert [*REPOSITORY.glob(pattern)], word
        for key in options_in(span) if page.name != "structure.md" else ():  # which names modules
            default_of(key)


def tables(text: str, first: str) -> Iterator[dict[str, str]]:
    """The rows, by heading, of tables whose first heading is this."""
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if not cells or cells[0] == first:
            head = cells
        elif head and not set(line) <= set("|- "):
            yield dict(zip(head, cells, strict=False))


def written(value: Any) -> str:
    """A default as tables have it."""
    words = {True: "true", False: "false", None: "null"}
    if isinstance(value, bool) or value is None:
        return words[value]
    return "none" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def test_tables_name_the_defaults() -> None:
    compared = 0
    for page in SAID:
        for row in tables(page.read_text(), "option") if page.name != "modal.md" else ():
            if not row.get("default"):
                continue
            names = [name.strip("` ") for name in row["option"].split(",")]
            values = row["default"].split(", ")
            prefix = names[0].rpartition(".")[0]
            for place, name in enumerate(names):
                key = name if "." in name or not prefix else f"{prefix}.{name}"
                said = values[place if len(values) == len(names) else 0]
                assert re.split(" [(]|;", said)[0] == written(default_of(key)), (page.name, key)
                compared += 1
    assert compared > 60


def documented(owner: type) -> dict[str, str]:
    """The docstring of each field of a class of modal_sweep/config.py, in one line."""
    tree = ast.parse((REPOSITORY / "modal_sweep" / "config.py").read_text())
    [body] = [node.body for node in tree.body
              if isinstance(node, ast.ClassDef) and node.name == owner.__name__]  # fmt: skip
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }  # fmt: skip


def test_the_launchers_options_are_said_as_in_its_code() -> None:
    rows = [*tables((REPOSITORY / "docs" / "modal.md").read_text(), "option")]
    expected = [
        [f"`{name}`", "see below" if name == "image" else str(default_in(field)), text]
        for owner in (JobSettings, ImageSettings, ModalLauncherConf)
        for name, text in documented(owner).items()
        for field in fields(owner) if field.name == name
    ]  # fmt: skip
    said = [[row["option"], row["default"], row["meaning"]] for row in rows]
    words = {"None": "null", "False": "false", "True": "true"}
    assert said == [[name, words.get(default, default), text] for name, default, text in expected]


def messages() -> set[str]:
    """All texts of our code; of those with values in them, the parts."""
    return {
        node.value
        for house in ("specforge_exp", "modal_sweep", "hydra_sweeps")
        for path in (REPOSITORY / house).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_messages_of_troubleshooting_are_ours() -> None:
    """Three words of each are found in one piece; the rest may be values."""
    texts, looked = messages(), 0
    for page in (page for page in SAID if "## Troubleshooting" in page.read_text()):
        for row in tables(page.read_text(), "you see"):
            for message in set(re.findall("`([^`]*)`", row["you see"])) - FOREIGN:
                words = [word for word in message.split() if "<" not in word and word.strip(".")]
                pieces = [" ".join(words[n : n + 3]) for n in range(max(1, len(words) - 2))]
                assert any(piece.strip(" .") in text for piece in pieces for text in texts), message
                looked += 1
    assert looked > 20
