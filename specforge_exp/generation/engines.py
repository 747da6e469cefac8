"""The engine that the configuration names, and a run with it."""

from pathlib import Path

from specforge_exp.config import Config
from specforge_exp.generation.engine import Engine
from specforge_exp.generation.openai_engine import OpenAIEngine
from specforge_exp.generation.plan import make_plan
from specforge_exp.generation.progress import Progress
from specforge_exp.generation.rules import rules_of, sampling_of
from specforge_exp.generation.run import Pace, Run, run
from specforge_exp.generation.sglang_engine import SGLangEngine, layout
from specforge_exp.generation.store import Store
from specforge_exp.interrupt import Interrupt


def make_engine(cfg: Config) -> Engine:
    """An engine whose servers this process asks itself."""
    if cfg.engine.name == "openai":
        return OpenAIEngine(cfg, cfg.engine.urls)
    if cfg.engine.name == "sglang":
        return SGLangEngine(cfg)
    from specforge_exp.generation.local.transformers_engine import TransformersEngine  # loads torch

    return TransformersEngine(cfg)


async def answer_all(cfg: Config, store: Store, interrupt: Interrupt) -> None:
    """Answer everything that the store lacks, or as much as there is time for after a signal."""
    if cfg.engine.name == "modal":
        from specforge_exp.generation.modal_engine import answer_on_modal

        await answer_on_modal(cfg, store, interrupt)
        return
    engine = make_engine(cfg)
    progress = Progress(store, interrupt)
    pace = Pace(cfg.engine.rate_limit)
    await run(
        Run(store, engine, rules_of(cfg), pace, progress), cfg.engine.concurrency, cfg.regen.drain
    )


def describe(cfg: Config, files: list[Path]) -> str:
    """What a run would do, for regen.dry_run."""
    sampling = sampling_of(cfg)
    lines = []
    for file in files:
        plan = make_plan(file, "", cfg.regen.chunk_size, cfg.regen.num_samples)
        lines.append(
            f"{file}: {len(plan.order)} of {plan.total} conversations in {len(plan)} chunks"
        )
    lines.append(
        f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}, "
        f"at most {sampling.max_tokens} tokens, {cfg.regen.samples_per_prompt} answers each"
    )
    return "\n  ".join([*lines, layout(cfg)])
