"""What `warm` imports before it forks, by kind of what is started."""

import gc
import importlib
from contextlib import suppress
from pathlib import Path

import yaml

CONF = Path(__file__).resolve().parent.parent / "conf"
STAGES = "prep regen preprocess train export bench bench_sweep pretrain sft".split()
OVERRIDES = [
    "a=b", "a.b=1", "a.b=1e-5", "a/b=c", "+a.b=null", "++a=true", "~a", "a=/x/y-z_1.b", "a=-1.5",
    "a=[1,'b',c d]", "a={b:1,c:[x]}", "a=x,y", "a=range(1,4)", "a=interval(0.0,6.0)", "a=b:c",
    "a=choice(a,b)", "a='b c'", "a=${b.c}", r"a=\${b}", "a=", "a=glob(*)", "a=tag(x,interval(0,1))",
]  # fmt: skip
HYDRA = ["hydra", "hydra._internal.hydra", "hydra._internal.config_loader_impl"]
MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3")]
OURS = ["hydra_sweeps.grid.run", "hydra_sweeps.study.run", "specforge_exp.cli"]
REPORT = ["specforge_exp.report.page", "bokeh.plotting", "bokeh.embed", "jinja2"]
STUDY = ["optuna.storages._rdb.storage", "alembic.command", "cmaes", "scipy.stats", "pandas"]
OF_MODAL = ["modal_sweep.client.launch", "modal_sweep.client.session"]
DRAFTS = ["specforge_exp.drafts.eagle3", "specforge_exp.drafts.dflash"]
CONTAINER = [*HYDRA, "hydra.core.plugins", "cloudpickle", "numpy", "orjson", "aiohttp", "modal"]
CONTAINER += ["modal._cluster", "modal._runtime.task_lifecycle_manager"]
IMPORTED = {
    "apps": [*HYDRA, *OURS, *REPORT, *STUDY],
    "modal": [*HYDRA, *OURS, *REPORT, "modal", "rich.table", *OF_MODAL],
    "stages": [
        *HYDRA, *OURS, *REPORT, *MODELS, *DRAFTS,
        *(f"specforge_exp.stages.{name}" for name in STAGES),
    ],
    "containers": CONTAINER,  # which have the code that was sent to them
    "containers of stages": [*CONTAINER, *MODELS, "safetensors.torch", "tqdm", "torch.optim"],
}  # fmt: skip


def texts_of(node: object) -> list[str]:
    """All texts in what a YAML file holds."""
    if isinstance(node, str):
        return [node]
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return [text for part in parts for text in texts_of(part)]


def fill_parsers() -> None:
    """Let ANTLR see what interpolations and overrides look like: it remembers, and the first time
    takes ten times as long."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf.errors import GrammarParseError
    from omegaconf.grammar_parser import parse

    OverridesParser.create().parse_overrides(OVERRIDES)
    for file in CONF.rglob("*.yaml"):
        for text in texts_of(yaml.safe_load(file.read_text())):
            if "${" in text:
                with suppress(GrammarParseError):
                    parse(text)


def preload(kind: str) -> None:
    """Import what everything of this kind imports."""
    for name in IMPORTED[kind]:
        importlib.import_module(name)
    fill_parsers()
    gc.collect()
    gc.freeze()  # no fork looks through what is imported, or copies its pages by that
