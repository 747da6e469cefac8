"""bench: what an exported draft earns.

Reads checkpoints/<run_name>/export/ and the target; writes checkpoints/<run_name>/bench.json, or
bench-<suite>.json, and with a server bench[-<suite>]-<engine>.json.
Every prompt is answered twice, with the draft and by the target alone.
"""

import logging
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from specforge_exp import paths
from specforge_exp.artifacts import (
    Fingerprint,
    describe,
    disk_errors,
    model_digest,
    read_record,
    reusable,
    sha256,
)
from specforge_exp.bench import in_process, served
from specforge_exp.bench.acceptance import summarise, training_ngrams
from specforge_exp.bench.asking import Asking, BenchEngine, Talk, asking_of
from specforge_exp.bench.published import same_setting
from specforge_exp.bench.sets import BenchSets, bench_sets, prompt_digests
from specforge_exp.bench.table import table
from specforge_exp.config import Config
from specforge_exp.config.machine import command
from specforge_exp.config.settings import chosen, values_of
from specforge_exp.data.conversations import asks_of
from specforge_exp.data.tokens import read_split
from specforge_exp.errors import InputError
from specforge_exp.inputs import require, unchanged
from specforge_exp.lease import lease
from specforge_exp.provenance import own_code
from specforge_exp.records import write_record
from specforge_exp.target import check_gpus, load_tokenizer
from specforge_exp.training.checkpoint import last_step, step_folders
from specforge_exp.training.tracking import best_step

log = logging.getLogger(__name__)

AGAIN = "make it again with bench.force=true"


def bench(cfg: Config) -> float:
    """Measure the accepted length; returns its average over the data sets."""
    check_gpus(cfg, "bench")
    file, folder = paths.bench_file(cfg), paths.export_dir(cfg)
    require(cfg, "export", "run.json")
    inputs = {
        "the export": sha256(folder / "run.json"),
        "the target": model_digest(cfg.model.path),
        **own_code(cfg, "draft"),
    }
    settings = settings_of(cfg)
    inputs["the draft"] = exported_draft(cfg)
    before = {} if cfg.bench.force or not file.exists() else read_record(file, AGAIN)["inputs"]
    inputs |= prompt_digests(cfg, before)
    fingerprint = Fingerprint(inputs, settings)
    if reusable(file, fingerprint, cfg.bench.force, "bench"):
        result = read_record(file)
    else:
        with disk_errors(file), lease(file):
            figures = measure(cfg)
            unchanged({folder / "run.json": inputs["the export"]})
            result = describe(cfg, inputs, settings) | figures  # it says when it was finished
            write_record(file, result)
    print(table(result, same_setting(result)))
    return float(result["average"])


def exported_draft(cfg: Config) -> str:
    """Digest of the checkpoint that the export was made of.

    Raises:
        InputError: the run's checkpoints are others by now, or it has ended since with another
            last (or best) step than the one that was exported as such.
    """
    folder, run = paths.export_dir(cfg), paths.run_dir(cfg)
    record = read_record(folder / "run.json")
    digest, step = record["inputs"].get("the checkpoint"), record["settings"].get("step")
    asked = record.get("config", {}).get("export", {})
    more = ["export.best=true"] * bool(asked.get("best"))
    again = f"export again: {command('export', 'export.force=true', *more, away=False)}"
    files = [path / "draft.safetensors" for path in step_folders(run)]
    if files and digest not in [sha256(file) for file in files if file.exists()]:
        raise InputError(f"{folder} is of a checkpoint that is gone or has changed since; {again}")
    if (run / "run.json").exists():
        wanted = asked.get("step") or (best_step if more else last_step)(run)
        if step != wanted and None not in (step, wanted):
            raise InputError(f"{folder} is of step {step}, but {run} has {wanted} by now; {again}")
    return str(digest)


def settings_of(cfg: Config) -> dict[str, Any]:
    """The options that the figures depend on."""
    settings = asdict(cfg.bench)
    del settings["force"]
    if cfg.bench.verify == "all":
        del settings["verify"], settings["verify_cost"]
    settings["max_length"] = cfg.bench.max_length or cfg.max_length
    settings |= values_of(cfg, "chain_length seed")
    settings |= chosen(cfg, "model.chat_template_kwargs")
    if cfg.bench_engine == "transformers":
        settings |= chosen(cfg, "device threads")
    else:
        names = ("urls", "served_name", "tp_size", "command", "args", "python")
        settings["engine"] = {name: vars(cfg.engine)[name] for name in ("name", *names)}
    return settings


def measure(cfg: Config) -> dict[str, Any]:
    """Answer all prompts and summarise; the parts of bench.json that are results."""
    own = cfg.bench
    sets = bench_sets(cfg)
    asking = asking_of(cfg, load_tokenizer(cfg.model), training_answers(cfg))
    conversations = fitting(sets, asking, cfg)
    engine: BenchEngine = (in_process if cfg.bench_engine == "transformers" else served).answer
    answered = engine(cfg, asking, conversations)
    figures: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    for name, records in sets.records.items():
        left_out[name] = len(records) - len(conversations.get(name, []))
        if name not in conversations:
            continue
        answers = answered[name]
        figures[name] = {"source": sets.origins[name]} | summarise(
            answers.requests, cfg.chain_length, own.bootstrap, own.temperature == 0, own.average,
            (answers.seconds, answers.seconds_alone),
        )  # fmt: skip
        turns = sum(len(talk.asks) for talk in conversations[name])
        left_out[f"{name} (later turns)"] += turns - len(answers.requests)
    average = sum(d["accepted_length"] for d in figures.values()) / len(figures)
    return {
        "target": cfg.model.path, "draft": str(paths.export_dir(cfg)), "datasets": figures,
        "left_out": dict(+left_out), "samples_because": sets.why, "average": average,
    }  # fmt: skip


def fitting(sets: BenchSets, asking: Asking, cfg: Config) -> dict[str, list[Talk]]:
    """What is asked, by data set: prompts of a suite that are too long are left out, and those that
    the chat template refuses.

    Raises:
        InputError: one of another data set is too long, or none is left.
    """
    own, conversations = cfg.bench, dict[str, list[Talk]]()
    limit = f"max_length={asking.room + own.max_tokens} with bench.max_tokens={own.max_tokens}"
    for name, records in sets.records.items():
        turns = 1 if own.turns == "first" else None
        talks = [Talk(asks_of(record)[:turns], record.get("tools")) for record in records]
        lengths = [len(asking.encode(talk.asks[0], talk.tools)) for talk in talks]
        long = [number for number, length in enumerate(lengths) if length > asking.room]
        if long and not own.suite:
            raise InputError(
                f"bench data set {name}: the prompt {records[long[0]]['id']} has "
                f"{lengths[long[0]]} tokens, too many for {limit}"
            )
        fit = [talk for talk, size in zip(talks, lengths, strict=True) if 0 < size <= asking.room]
        if fit:
            conversations[name] = fit
    if not conversations:
        raise InputError(f"bench: no prompt fits {limit}")
    return conversations


def training_answers(cfg: Config) -> torch.Tensor | None:
    """Keys of the training answers' 8-grams; None where the shards that the draft was trained on
    are not at hand."""
    folder, record = paths.tokens_dir(cfg), paths.tokens_dir(cfg) / "run.json"
    inputs = read_record(paths.export_dir(cfg) / "run.json")["inputs"]
    if not record.exists() or inputs.get(folder.name) != sha256(record):
        log.info("bench: %s is not what it was trained on: nothing tells new answers", folder)
        return None
    return training_ngrams(read_split(folder, "train"))
