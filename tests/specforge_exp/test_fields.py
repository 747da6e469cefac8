"""Every option is in the fingerprint of what a stage keeps, or is refused there, or stands in
field_laws with the reason why the stage's numbers do not depend on it.

An option that is new fails here until its author has decided: made of it (the stage's settings),
or not (field_laws).
"""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import REPOSITORY, make_config
from field_laws import EVERYWHERE, LAWS, OF_A_KIND

from specforge_exp import artifacts, paths
from specforge_exp.artifacts import Fingerprint, content_of, model_digest
from specforge_exp.causal import export as model_export
from specforge_exp.config import Config, Source
from specforge_exp.config.settings import training_settings
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dspark.config import DSparkConfig
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.peagle.config import PEagleConfig
from specforge_exp.drafts.standalone.config import StandaloneConfig
from specforge_exp.errors import InputError
from specforge_exp.inputs import OPTIONS
from specforge_exp.stages import bench, export, prep, preprocess, pretrain, regen, sft, train
from specforge_exp.target import DTYPES
from specforge_exp.target.loading import aux_layer_ids
from specforge_exp.training.checkpoint import Snapshot, save_checkpoint

OTHER: dict[str, list[Any]] = {
    "loss._target_": ["specforge_exp.losses.opd_closed"], "device": ["cuda"],
    "model.dtype": ["bfloat16"],
    "draft._target_": ["specforge_exp.drafts.peagle.PEagle", "specforge_exp.drafts.eagle3.Eagle3"],
    "export.source": ["a/draft"], "bench.suite": [{"other": Source(path="synthetic:bench")}],
}  # fmt: skip
"""Values that CANDIDATES have none of."""
CANDIDATES: list[Any] = [
    True, False, 1, 2, 3, 5, 9, 32, 64, 0.25, 0.5, "synthetic:bench", "other", *
    "float32 bfloat16 random weights target high cpu drop join humaneval dflash specforge "
    "speculators off sum vllm modal retry prep out leave_out disk memory ray sweep trainer "
    "workers mooncake sglang linear constant cosine eager shipped all responses dpace decay "
    "labels block merged gated confidence replay rollout none wandb http://other x/y x/z".split(),
    [1], [1, 2], [1, 2, 4], [1, 2, 4, 6, 7], ["one"], ["loss"], ["http://other/v1"], {"extra": 1},
]  # fmt: skip
"""Of the option's own type the first that it takes is its other value."""
FIXED = {
    ("PEagleConfig", "draft.norm_output"),
    *(("", name) for name in "data.path data.format export.private export.dry_run".split()),
}
"""Options that have one valid value: of a kind of draft, or while what is made of them stays."""


def leaves(node: Any, at: str = "") -> Iterator[str]:
    """Dotted names of all options, also of the sources in lists and mappings."""
    if is_dataclass(node):
        parts = {each.name: getattr(node, each.name) for each in fields(node)}
    else:
        parts = {str(n): part for n, part in enumerate(node)} if isinstance(node, list) else node
        if not (isinstance(parts, dict) and any(map(is_dataclass, parts.values()))):
            yield at.removeprefix(".")
            return
    for name, part in parts.items():
        yield from leaves(part, f"{at}.{name}")


def at(node: Any, name: str) -> Any:
    """The value of an option."""
    for part in name.split("."):
        node = node[int(part)] if isinstance(node, list) else (
            node[part] if isinstance(node, dict) else getattr(node, part)
        )  # fmt: skip
    return node


def with_value(node: Any, name: str, value: Any) -> Any:
    """The same with another value, checked as a configuration is."""
    first, _, rest = name.partition(".")
    inside = with_value(at(node, first), rest, value) if rest else value
    if isinstance(node, list):
        return [inside if str(number) == first else part for number, part in enumerate(node)]
    return {**node, first: inside} if isinstance(node, dict) else replace(node, **{first: inside})


def kinds(cfg: Config, name: str) -> tuple[type, ...]:
    """The types that an option may have."""
    owner, _, last = name.rpartition(".")
    node = at(cfg, owner) if owner else cfg
    found = get_type_hints(type(node))[last] if is_dataclass(node) else type(at(cfg, name))
    parts = get_args(found) if isinstance(found, UnionType) else (found,)
    plain = tuple(get_origin(part) or part for part in parts if part is not type(None))
    return (str, *plain) if Any in plain else plain


def otherwise(cfg: Config, name: str) -> Config | None:
    """The configuration with another valid value of an option; None: it has none here."""
    before, types = at(cfg, name), kinds(cfg, name)
    given = OTHER.get(name, CANDIDATES)
    for value in [each for each in given if type(each) in types]:
        with suppress(InputError, AttributeError, TypeError, KeyError):
            changed: Config = with_value(cfg, name, value)
            if at(changed, name) != before:
                return changed
    return None


def plain(folder: Path) -> Config:
    """EAGLE-3; what an option needs to be valid is there."""
    cfg, draft = make_config(folder), Eagle3Config(name="eagle3", draft_vocab_size=512)
    return replace(
        cfg, device="auto", max_steps=3, trainer=replace(cfg.trainer, batch_size=2, schedule="wsd"),
        draft=replace(draft, num_layers=2, sliding_window=16),
        bench=replace(cfg.bench, datasets={"stories": Source(path="synthetic:bench/stories")}),
        export=replace(cfg.export, push="x/y", format="speculators"),
    )  # fmt: skip


def bases(folder: Path) -> dict[str, tuple[Config, str]]:
    """Configurations, and which of their options are changed; some options need others."""
    cfg = plain(folder)
    plainly = replace(cfg, export=replace(cfg.export, format="auto"))
    workers = replace(cfg.target, placement="ray")
    suite = replace(
        cfg.bench, suite={"one": Source(path="synthetic:bench/stories")}, verify="confidence"
    )
    urls = ["http://127.0.0.1:1/v1"]
    own_loss = replace(cfg.loss, _target_="specforge_exp.losses.opd_closed")
    return {
        "plain": (cfg, ""),
        "a loss of one's own": (replace(cfg, loss=own_loss, lr=2e-4), "loss.options lr_point"),
        "held out of it": (replace(cfg, data=replace(cfg.data, eval=[])), "data.split_eval"),
        "rollout": (replace(cfg, onpolicy=replace(cfg.onpolicy, name="rollout")), "onpolicy."),
        "workers": (replace(cfg, target=workers), "target."),
        "vllm": (replace(cfg, target=replace(workers, engine="vllm")), "target."),
        "openai": (
            replace(cfg, engine=replace(cfg.engine, name="openai", urls=urls)), "engine. bench."
        ),
        "server": (replace(cfg, engine=replace(cfg.engine, name="sglang")), "engine. bench.alone"),
        "suite": (replace(cfg, draft=DSparkConfig(name="dspark"), bench=suite), "bench."),
        **{
            f"{draft}": (replace(plainly, draft=draft), "draft.")
            for draft in (
                DFlashConfig(name="dflash", sliding_window=32, position_weights="dpace"),
                DSparkConfig(name="dspark", sliding_window=32, position_weights="dpace"),
                PEagleConfig(name="peagle", sliding_window=16),
                StandaloneConfig(name="standalone", path="a/model"),
                StandaloneConfig(name="standalone"),
            )
        },
    }  # fmt: skip


class Found(Exception):
    """The fingerprint that a stage has come to."""


def found(*arguments: Any, **options: Any) -> None:
    """In the place of what compares a fingerprint with what is there."""
    raise Found(next(each for each in arguments if isinstance(each, Fingerprint)))


def settled(cfg: Config, stage: str, run: Any) -> None:
    """Likewise, of a training."""
    raise Found(run.fingerprint)


def feature_cache(cfg: Config) -> None:
    """What a training does for target.cache=disk."""
    train.require(cfg, "preprocess", "index.json")
    kind = train.locate(cfg.draft._target_)
    model = SimpleNamespace(dtype=DTYPES.get(cfg.model.dtype, torch.float32))
    layers = aux_layer_ids(9, cfg.model.aux_layers, partial(kind.target_layers, cfg.draft))
    target: Any = SimpleNamespace(
        states=print,
        aux_layers=layers,
        model=model,
        take_packing=lambda: None,
        compile_layers=lambda: None,
    )
    run: Any = SimpleNamespace(
        fingerprint=train.fingerprint_of(cfg, paths.tokens_dir(cfg)), ranks=SimpleNamespace(world=1)
    )
    splits: Any = SimpleNamespace(train=None, eval=None)
    train.states_of(replace(cfg, target=replace(cfg.target, cache="disk")), target, splits, run)


STAGES: dict[str, Callable[[Config], object]] = {
    "prep": prep.prep,
    "regen": regen.regen,
    "preprocess": preprocess.preprocess,
    "train": lambda cfg: train.begin(cfg, 1),
    "cache": feature_cache,
    "pretrain": lambda cfg: pretrain.begin(cfg, 1),
    "sft": lambda cfg: sft.begin(cfg, 1),
    "model's export": lambda cfg: model_export.export_model(cfg, "sft"),
    "export": export.exported,
    "bench": bench.bench,
}
"""As far as the fingerprint."""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the stages read; they end as soon as they have a fingerprint."""
    for stage in (prep, regen, preprocess, export, bench):
        monkeypatch.setattr(stage, "reusable", found)
    for training in (train, sft, pretrain):
        monkeypatch.setattr(training, "settled", settled)
    monkeypatch.setattr(train, "make_cache", found)
    monkeypatch.setattr(model_export, "writing", found)
    for module in (train, sft):
        monkeypatch.setattr(module, "check_length", lambda *_: None)
    monkeypatch.setattr(artifacts, "content_of", cache(content_of))
    cfg = plain(tmp_path)
    for folder in (paths.prompts_dir(cfg), paths.regen_dir(cfg)):
        folder.mkdir(parents=True)
        for name in ("train", "eval"):
            (folder / f"{name}.jsonl").write_text("{}\n")
    return tmp_path


def furnish(cfg: Config) -> None:
    """Tokens, a checkpoint and an export of this configuration."""
    tokens, run, step = paths.tokens_dir(cfg), paths.run_dir(cfg), 3
    inputs = {"the target": model_digest(cfg.model.path)}
    tokens.mkdir(exist_ok=True)
    (tokens / "index.json").write_text("{}")
    wanted = {"max_length": cfg.max_length, "draft.draft_vocab_size": cfg.draft.draft_vocab_size}
    (tokens / "run.json").write_text(json.dumps({"inputs": inputs, "settings": wanted}))
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    lines = [{"step": n, "eval/loss": n, "eval/simulated_length": -n} for n in (1, step)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made_of = Fingerprint(inputs, training_settings(cfg))
    for number in (step, 1):
        weights = {"weight": torch.full((1,), float(number))}
        save_checkpoint(run, Snapshot(number, weights, {}, {}), made_of)
    draft = {"the checkpoint": artifacts.sha256(run / "step-000003" / "draft.safetensors")}
    exported = paths.export_dir(cfg)
    exported.mkdir()
    (exported / "run.json").write_text(json.dumps({"inputs": draft, "settings": {"step": step}}))
    other = run.parent / "other"
    other.mkdir(exist_ok=True)
    (other / "model.safetensors").write_text("weights")


def outcome(stage: str, cfg: Config, name: str = "") -> Any:
    """A stage's fingerprint; None: it keeps nothing, or wants what is not there; "refused": by the
    name of the option."""
    try:
        STAGES[stage](cfg)
    except Found as error:
        return json.dumps(vars(error.args[0]), sort_keys=True)
    except InputError as error:
        return "refused" if name and re.search(rf"{re.escape(name)}\b", str(error)) else None
    return None


def without_drafts_own(cfg: Config) -> Config:
    """The same without what the trainings of models refuse, as it is for drafts alone."""
    of_export = replace(cfg.export, push=None, format="auto")
    return replace(cfg, export=of_export, onpolicy=replace(cfg.onpolicy, name="none"))


def outcomes(stage: str, folder: Path) -> dict[tuple[str, str], set[Any]]:
    """By the draft's kind (of its own options) and option, what another value leads to."""
    results: dict[tuple[str, str], set[Any]] = {}
    for base, prefixes in bases(folder).values():
        furnish(base)
        cfg = without_drafts_own(base) if stage in ("pretrain", "sft") else base
        before, kind = outcome(stage, cfg), type(cfg.draft).__name__
        # Only states of a target in this process are kept on disk.
        nothing = stage == "cache" and before is None and prefixes
        assert before or nothing, stage
        for name in leaves(cfg):
            if not name.startswith(tuple(prefixes.split()) or ""):
                continue
            own = results.setdefault((kind if name.startswith("draft.") else "", name), set())
            if (other := otherwise(cfg, name)) is not None:
                after = outcome(stage, other, name)
                own.add("same" if nothing or after in (None, before) else after[:7])
    return results


def covers(names: str, name: str) -> bool:
    """Whether a list of names has one: `a.*` is all below a, `-a.b` is not meant."""
    matches = [each for each in names.split() if fnmatch(name, each.lstrip("-"))]
    return bool(matches) and not any(each[0] == "-" for each in matches)


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_is_part_of_it_or_said_not_to_matter(stage: str, made: Path) -> None:
    seen, faults, used = outcomes(stage, made), [], set()
    for (kind, name), ways in seen.items():
        laws = LAWS[stage] | OF_A_KIND.get((stage, kind), {})
        used |= {each for names in laws.values() for each in names.split() if fnmatch(name, each)}
        common = [reason for reason, names in EVERYWHERE.items() if covers(names, name)]
        said = common or [reason for reason, names in laws.items() if covers(names, name)]
        if not ways and (kind, name) not in FIXED:
            faults.append(f"{kind} {name}: no other valid value is known here: see CANDIDATES")
        elif ways == {"same"} and not said:
            faults.append(f"{kind} {name}: it is not in the fingerprint; make it so, or say why")
        elif ways - {"same", "refused"} and said:
            faults.append(f"{kind} {name}: in the fingerprint, and said not to matter: {said}")
        elif len(said) > 1:
            faults.append(f"{kind} {name}: said twice: {said}")
    ours = [LAWS[stage], *(own for key, own in OF_A_KIND.items() if key[0] == stage)]
    stale = {e for law in ours for names in law.values() for e in names.split()} - used
    faults += [f"{each} is no option" for each in stale if each[0] != "-"]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("stage", OPTIONS)
def test_later_stages_compare_all_that_a_stage_depends_on(stage: str, made: Path) -> None:
    cfg = plain(made)
    cfg.data.system, cfg.regen.repetition_penalty = "join", 1.5  # which are settings if chosen
    settings = json.loads(outcome(stage, cfg))["settings"]
    group = "data." if stage == "prep" else f"{stage}."
    own = {name for name in settings if name.startswith(group)}
    assert own == set(OPTIONS[stage].split()) - {"model.chat_template_kwargs"}


def test_every_field_has_a_docstring() -> None:
    nodes = {field.type.__name__ for field in fields(Config) if is_dataclass(field.type)}
    for path in sorted((REPOSITORY / "specforge_exp" / "config").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            following = dict(zip(node.body, [*node.body[1:], None], strict=True))
            for field, doc in following.items():
                if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation) in nodes:
                    continue
                said = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
                assert said, f"{path.name}: {node.name}.{ast.unparse(field.target)}"
