"""Where every artifact lives: pure functions of the configuration.

Different names give different folders, none of which is another's working folder: config.checks
refuses names that end as those do, and the marks that join two.
"""

from pathlib import Path

from specforge_exp.config import Config


def prompts_dir(cfg: Config) -> Path:
    """Folder that prep writes: train.jsonl and eval.jsonl."""
    return Path(cfg.paths.datasets) / cfg.data.name


def regen_dir(cfg: Config) -> Path:
    """Folder that regen writes: the same conversations with the target's own answers."""
    return Path(cfg.paths.datasets) / f"{cfg.data.name}--{cfg.model.name}"


def tokens_dir(cfg: Config) -> Path:
    """Folder that preprocess writes: token shards and vocab_mapping.pt."""
    return Path(cfg.paths.datasets) / f"{cfg.data.name}--{cfg.model.name}.tokens"


def features_dir(cfg: Config) -> Path:
    """Folder of the target's hidden states that target.cache=disk writes: drafts want others."""
    name = f"{cfg.data.name}--{cfg.model.name}.{cfg.draft.name}.features"
    return Path(cfg.paths.datasets) / name


def run_dir(cfg: Config) -> Path:
    """Folder of a training run."""
    return Path(cfg.paths.checkpoints) / cfg.run_name


def export_dir(cfg: Config) -> Path:
    """Folder that serving engines load."""
    return run_dir(cfg) / "export"


def bench_file(cfg: Config) -> Path:
    """What bench measured; every suite has its own file, and every kind of server."""
    suite = f"-{cfg.bench.name}" if cfg.bench.name else ""
    engine = "" if cfg.bench_engine == "transformers" else f"-{cfg.bench_engine}"
    return run_dir(cfg) / f"bench{suite}{engine}.json"
