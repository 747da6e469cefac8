"""regen: the target answers the prompts itself.

Reads datasets/<data>/; writes datasets/<data>--<model>/: train.jsonl and eval.jsonl in the same
order with the same ids, and failed.jsonl. Every answer is kept as it comes, so an interrupted
run continues.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from specforge_exp import paths
from specforge_exp.artifacts import (
    Fingerprint,
    model_digest,
    reusable,
    sha256,
    writing,
)
from specforge_exp.config import Config
from specforge_exp.config.machine import command
from specforge_exp.config.settings import chosen, values_of
from specforge_exp.drafts.engines import unserved
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Engine
from specforge_exp.generation.openai_engine import OpenAIEngine
from specforge_exp.generation.plan import make_plan
from specforge_exp.generation.progress import Progress
from specforge_exp.generation.rules import (
    OF_THE_MODEL,
    revision,
    rules_of,
    sampling_of,
    warn_of_end,
)
from specforge_exp.generation.run import RateLimit, Regeneration, answer_missing
from specforge_exp.generation.server_engine import ServerEngine, layout
from specforge_exp.generation.store import Store
from specforge_exp.inputs import require, unchanged
from specforge_exp.interrupt import Interrupt
from specforge_exp.serving.command import answering
from specforge_exp.serving.gpus import tp_size_of
from specforge_exp.target import check_gpus
from specforge_exp.target.loading import fed_by

log = logging.getLogger(__name__)

SETTINGS = (
    "regen.temperature regen.top_p regen.top_k regen.max_tokens regen.thinking regen.truncated "
    "regen.num_samples regen.samples_per_prompt seed max_length model.chat_template_kwargs"
)
"""Options that the answers depend on, whatever they are."""
STALE = 30
"""Seconds without a sign of life after which a run counts as ended."""


def regen(cfg: Config) -> Path:
    """Regenerate a data set with its target; returns the folder."""
    folder = paths.regen_dir(cfg)
    if cfg.regen.status:
        log.info("regen: %s: %s", folder.name, status(folder))
        return folder
    if cfg.engine.name in ("transformers", "sglang", "vllm"):
        check_gpus(cfg, "regen")
    files = [paths.prompts_dir(cfg) / name for name in ("train.jsonl", "eval.jsonl")]
    lacking = unmet(lambda: require(cfg, "prep", *(path.name for path in files)))
    if lacking:
        return hindered(cfg, files, lacking + unready(cfg))
    source, digests = files[0].parent, {path: sha256(path) for path in files}
    inputs = {f"{source.name}/{path.name}": digest for path, digest in digests.items()}
    inputs["the target"] = model_digest(cfg.model.path)
    settings = values_of(cfg, SETTINGS)
    settings |= chosen(cfg, "regen.repetition_penalty device model.dtype")
    settings |= {f"engine.{name}": value for name, value in answering(cfg.engine).items()}
    fingerprint = Fingerprint(inputs, settings)
    if reusable(folder / "run.json", fingerprint, cfg.regen.force, "regen"):
        return folder
    lacking = unready(cfg)
    warn_of_end(cfg)
    if cfg.regen.dry_run or lacking:
        return hindered(cfg, files, lacking)
    opened = writing(folder, fingerprint, cfg, "regen", "shards/* calls.jsonl")
    with opened as partial, Interrupt() as interrupt:
        own = cfg.regen
        store = Store(partial, digests, own.chunk_size, own.num_samples, own.samples_per_prompt)
        unchanged(digests)
        if store.counts.done + store.counts.failed:
            log.info("regen: %d of %d are answered already", store.counts.done, store.total)
        try:
            asyncio.run(answer_all(cfg, store, interrupt))
        finally:
            store.close()
        if interrupt.number:
            interrupt.reraise()
        finish(store, partial)
    return folder


def unmet(check: Callable[[], object]) -> list[str]:
    """What a check says against a run; [] when it says nothing."""
    try:
        check()
    except InputError as error:
        return [str(error)]
    return []


def unready(cfg: Config) -> list[str]:
    """What a run of these prompts would be refused for; []: nothing."""
    lacking = unmet(lambda: check_engine(cfg))
    if lacking and cfg.engine.name == "transformers":  # the rest is about the same model
        return lacking
    return lacking + unmet(lambda: sampling_of(cfg))


def check_layers(cfg: Config) -> None:
    """Refuse a target that has too few layers for the draft, where its files are here or have to
    be."""
    # What is on a hub alone is not fetched for this.
    if revision(cfg.model.path) or cfg.engine.name == "transformers":
        fed_by(cfg)
        if warning := unserved(cfg):
            log.warning("regen: warning: %s", warning)


def check_engine(cfg: Config) -> None:
    """Refuse what a run, or train after it, would find out late: a target that has too few layers
    for the draft, the servers' size, an account; InputError."""
    check_layers(cfg)
    if cfg.engine.name not in ("modal", "sglang"):
        return
    tp_size_of(cfg)
    if cfg.engine.name == "modal":
        from specforge_exp.generation.modal_engine import unknown_machine

        if why := unknown_machine():
            raise InputError(why)


def hindered(cfg: Config, files: list[Path], lacking: list[str]) -> Path:
    """Refuse a run with everything that it lacks, in order; a dry run only says so."""
    if not cfg.regen.dry_run:
        raise InputError("\n".join(lacking))
    why = [f"a run would be refused: {text.partition('. Without')[0]}" for text in lacking]
    log.info("regen: %s", "\n".join([describe(cfg, files), *why]))
    return paths.regen_dir(cfg)


def make_engine(cfg: Config) -> Engine:
    """An engine whose servers this process asks itself."""
    if cfg.engine.name == "openai":
        return OpenAIEngine(cfg, cfg.engine.urls)
    if cfg.engine.name in ("sglang", "vllm"):
        return ServerEngine(cfg)
    from specforge_exp.generation.local.transformers_engine import TransformersEngine  # loads torch

    return TransformersEngine(cfg)


async def answer_all(cfg: Config, store: Store, interrupt: Interrupt) -> None:
    """Answer everything that the store lacks, or as much as there is time for after a signal."""
    if cfg.engine.name == "modal":
        from specforge_exp.generation.modal_engine import answer_on_modal

        await answer_on_modal(cfg, store, interrupt)
        return
    engine = make_engine(cfg)
    rules, rate = rules_of(cfg), RateLimit(cfg.engine.rate_limit)
    own = None if cfg.engine.name == "transformers" else rules.count
    progress = Progress(store, interrupt, count=own if revision(cfg.model.path) else None)
    run = Regeneration(store, engine, rules, rate, progress)
    await answer_missing(run, cfg.engine.concurrency, cfg.regen.drain)


def finish(store: Store, partial: Path) -> None:
    """Put the results in order, say where every conversation went, and clear away the rest."""
    with (partial / "failed.jsonl").open("wb") as failed:
        for plan in store.plans:
            with (partial / plan.source.name).open("wb") as done:
                store.merge(plan, done, failed)
    skipped = sum(plan.total - len(plan.order) for plan in store.plans) * store.samples
    counts = store.counts
    log.info(
        "regen: input %d = done %d + failed %d + skipped %d; %d cut at max_tokens; %d tokens",
        store.total + skipped, counts.done, counts.failed, skipped, counts.cut, counts.tokens,
    )  # fmt: skip
    if counts.failed:
        log.warning("regen: %d conversations with their reasons in failed.jsonl", counts.failed)
    if not (partial / "train.jsonl").stat().st_size:
        raise InputError(
            f"{store.plans[0].source}: the target answered none of its conversations; the reasons "
            f"are in {partial / 'failed.jsonl'}"
        )
    store.remove()


def status(folder: Path) -> str:
    """How far a regeneration is, in one line."""
    try:
        progress = json.loads(Path(f"{folder}.partial/progress.json").read_text())
    except (OSError, ValueError):
        if (folder / "run.json").exists():
            return f"complete: {folder}"
        if (begun := Path(f"{folder}.partial")).exists():
            return f"at its beginning or its end; the same command continues: {begun}"
        return f"nothing yet; start it with: {command('regen', away=False)}"
    age = time.time() - datetime.fromisoformat(progress["time"]).timestamp()
    parts = [
        f"{progress['done']} of {progress['total']} done, {progress['failed']} failed",
        f"{progress['conversations_per_second']} conversations/s, "
        f"{progress['tokens_per_second']} tokens/s",
    ]
    if age < STALE:
        left = progress["seconds_left"]
        parts.insert(1, f"{progress['in_flight']} in flight")
        parts.append("time left unknown" if left is None else f"about {left / 60:.0f} min left")
    else:
        parts.append(f"no sign of life for {age / 60:.0f} min; the same command continues")
    if progress["usd"]:
        parts.append(f"${progress['usd']:.2f}")
    return "; ".join(parts)


def describe(cfg: Config, files: list[Path]) -> str:
    """What a run would do, for regen.dry_run."""
    lines = []
    for file in files:
        if not file.exists():
            lines.append(f"{file}: not there yet")
            continue
        plan = make_plan(file, "", cfg.regen.chunk_size, cfg.regen.num_samples)
        lines.append(
            f"{file}: {len(plan.order)} of {plan.total} conversations in {len(plan)} chunks"
        )
    try:
        known = [(name, f"{vars(sampling_of(cfg))[name]:g}") for name in OF_THE_MODEL]
    except InputError:
        given = [(name, vars(cfg.regen)[name]) for name in OF_THE_MODEL]
        known = [(name, "unknown" if value is None else f"{value:g}") for name, value in given]
    chosen = ", ".join(f"{name} {value}" for name, value in known)
    answers = f"{cfg.regen.samples_per_prompt} answers each"
    lines.append(f"{chosen}, at most {cfg.regen.max_tokens} tokens, {answers}")
    return "\n  ".join([*lines, layout(cfg)])
