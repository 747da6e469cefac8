"""train: tokens + target -> draft.

Reads datasets/<data>--<model>.tokens/; writes checkpoints/<run_name>/: metrics.jsonl, step-*/ and,
at the end, run.json. Run the same command again to continue.

Whether a run is complete, refused or started over is decided once, before any of its processes
trains: by the process that starts the others, or by torchrun's first one for all of them.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_exp import paths
from specforge_exp.artifacts import Fingerprint, model_digest, sha256
from specforge_exp.config import Config, LossConfig, locate
from specforge_exp.config.checks import shared_evenly
from specforge_exp.config.onpolicy import ProposedTerms
from specforge_exp.config.settings import OF_STATES, chosen, training_settings
from specforge_exp.drafts.engines import unserved
from specforge_exp.errors import InputError
from specforge_exp.inference.alone import RandomStates, trainer_alone, workers_alone
from specforge_exp.inference.cluster import Fleet, fleet_of, given
from specforge_exp.inference.shared import SharedStream, joined
from specforge_exp.inference.split import joins, split_of
from specforge_exp.inputs import require
from specforge_exp.losses import Loss, ProposedLoss, check_function, opd
from specforge_exp.onpolicy.cost import cost_lines
from specforge_exp.onpolicy.judges import Elsewhere
from specforge_exp.onpolicy.replay import Replayer, replayer_of
from specforge_exp.onpolicy.rollout import Rollouts
from specforge_exp.provenance import own_code
from specforge_exp.sharding import shard_draft, without_numbers
from specforge_exp.target import (
    Target,
    check_decoding,
    check_gpus,
    check_length,
    load_target,
    take_what_is_there,
)
from specforge_exp.training.batches import Batch
from specforge_exp.training.feature_cache import from_disk, make_cache
from specforge_exp.training.features import Features, computed, computed_together, remembered
from specforge_exp.training.initial import begin_with, initial_weights
from specforge_exp.training.learnable import listed, nothing_to_learn, refuse_nothing
from specforge_exp.training.loop import Splits, TrainingRun, fit
from specforge_exp.training.objective import Objective, Outcome, Sample, samples_of
from specforge_exp.training.progress import DRAFTS, ONPOLICY, summary
from specforge_exp.training.ranks import Ranks, by_torchrun, started
from specforge_exp.training.running import (
    Record,
    check_held_out,
    check_tokens,
    count,
    ended,
    in_processes,
    joined_run,
    read_tokens,
    settled,
)
from specforge_exp.training.streamed import Stream

log = logging.getLogger(__name__)


def train(cfg: Config) -> float | tuple[float, ...]:
    """Train one draft; returns what `objectives` names, of the last evaluation.

    With `trainer.gpus` above 1 it starts that many processes, each of which comes back here.
    """
    if not started() and (cfg.target.dry_run or cfg.onpolicy.dry_run):
        return show_split(take_what_is_there(cfg))
    parts = begin, train_here, workers_of(cfg), cfg.target.alone == "none"
    return objectives(cfg, in_processes("train", cfg, *parts))


def workers_of(cfg: Config) -> Callable[[Config], AbstractContextManager[Any]] | None:
    """What the trainers share and outlives each of them; None: nothing."""
    if cfg.target.placement != "ray" or cfg.target.alone == "trainer":
        return None
    if cfg.target.share == "sweep":
        return joined
    return lambda cfg: fleet_of(cfg, split_of(cfg))


def train_here(cfg: Config, device: torch.device, ranks: Ranks) -> Record:
    """This process's part of a training that has not ended; the run's record."""
    with ExitStack() as stack:
        stream: Stream | None = None
        if cfg.target.alone == "trainer":
            stream = RandomStates(cfg, device, ranks)
        elif cfg.target.share == "sweep":
            stream = SharedStream(given(), device, cfg, ranks)
        elif cfg.target.placement == "ray":
            stream = Stream(fleet_in(cfg, ranks, stack), device)
        return train_on(cfg, device, ranks, stream)


def train_on(cfg: Config, device: torch.device, ranks: Ranks, stream: Stream | None) -> Record:
    """`train_here`, with the target's states from the workers' stream if there is one."""
    folder, tokens = paths.run_dir(cfg), paths.tokens_dir(cfg)
    run = joined_run(cfg, fingerprint_of(cfg, tokens), ranks)
    mapping, splits = read_tokens(tokens)
    reasons = ranks.decided(partial(check_learnable, cfg, splits))
    if stream and cfg.target.alone == "workers":
        log.info("train: %s", workers_alone(cfg, splits, stream, ranks))
        return {"evaluation": no_values(cfg)}
    target = stream.ends if stream else whole_target(cfg, device, ranks)
    draft = fresh_draft(cfg, target, device, ranks, mapping)
    log.info(
        "train: %s: %d conversations, %d held out, %.1fM trained parameters, on %d x %s",
        cfg.run_name, len(splits.train), len(splits.eval), count(draft) / 1e6,
        ranks.world, device,
    )  # fmt: skip
    if stream and cfg.target.alone == "trainer":
        objective = make_objective(cfg, draft, target, stream.features({}))
        log.info("train: %s", trainer_alone(cfg, draft, objective, splits, ranks))
        return {"evaluation": no_values(cfg)}
    folder.mkdir(parents=True, exist_ok=True)
    states = states_of(cfg, target, splits, run, stream)
    objective = make_objective(cfg, draft, target, states)
    if cfg.onpolicy.replays:
        judge = Elsewhere(stream, ranks.rank) if stream else None
        replayer = replayer_of(cfg, draft, target, judge)
        objective = replaying(cfg, replayer, objective, splits, run)
    evaluation = fit(cfg, draft, objective, splits, run)
    if text := objective.features.summary(ranks):
        log.info("train: %s", text)
    record = ended(cfg, run, evaluation, nothing_to_learn=reasons, workers=cfg.target.own_gpus)
    if ranks.rank == 0:
        log.info("train: complete: %s: %s%s", folder, summary(evaluation), of_no_use(reasons))
    return record


def begin(cfg: Config, world: int) -> Record | None:
    """What is settled before a training: the record of a complete run, or None: it is to be made.

    Raises:
        InputError: as `settled` and `given`, or tokens are missing, or the loss is none.
    """
    shared_evenly(cfg.trainer.batch_size, world, "WORLD_SIZE")
    loss_of(cfg)
    if cfg.onpolicy.rolls and cfg.bench_engine != "transformers":
        raise InputError(
            f"onpolicy=rollout answers in this process with the draft of now; engine.name="
            f"{cfg.engine.name} does not serve it: leave engine= out for train"
        )
    tokens = require(cfg, "preprocess", "index.json")
    check_tokens(cfg, tokens, wanted_of(cfg))
    run = TrainingRun(paths.run_dir(cfg), fingerprint_of(cfg, tokens), Ranks(0, world))
    if cfg.target.alone == "none" and (record := settled(cfg, "train", run)):
        return record
    if cfg.target.share == "sweep":
        given()
    for warning in filter(None, (check_length(cfg.model, cfg.max_length), unserved(cfg))):
        log.warning("train: warning: %s", warning)
    return None


def show_split(cfg: Config) -> float | tuple[float, ...]:
    """What target.dry_run=true and onpolicy.dry_run=true print; there are no values to return.

    Raises:
        InputError: tokens are missing, or were made for another training.
    """
    check_gpus(cfg, "train", int(cfg.trainer.gpus))
    check_tokens(cfg, require(cfg, "preprocess", "index.json"), wanted_of(cfg))
    lines = split_of(cfg).lines() if cfg.target.dry_run else []
    if cfg.onpolicy.dry_run:
        lines += cost_lines(cfg, read_tokens(paths.tokens_dir(cfg))[1].train)
    for line in lines:
        log.info("train: %s", line)
    return objectives(cfg, {"evaluation": no_values(cfg)})


def no_values(cfg: Config) -> dict[str, float]:
    """What there is of `objectives` where nothing was trained to its end."""
    return dict.fromkeys(cfg.objectives, float("nan"))


def fleet_in(cfg: Config, ranks: Ranks, stack: ExitStack) -> Fleet:
    """The workers: of the process that started this one, or torchrun's first one makes them."""
    if not by_torchrun():
        return given()

    def make() -> Fleet:
        if not joins():
            raise InputError(
                "target.placement=ray under torchrun needs RAY_ADDRESS: `ray start` on each "
                "machine makes the cluster, see docs/ray.md. On one machine leave torchrun out"
            )
        return stack.enter_context(fleet_of(cfg, split_of(cfg, ranks.world)))

    return ranks.decided(make)


def whole_target(cfg: Config, device: torch.device, ranks: Ranks) -> Target:
    """The target, or this process's share of it.

    Raises:
        InputError: it cannot be loaded or followed, or bench could not decode it.
    """
    kind = locate(cfg.draft._target_)
    processes = ranks.world if cfg.target.shard else 1
    target = load_target(
        cfg.model, device, cfg.model.dtype, processes, partial(kind.target_layers, cfg.draft)
    )
    if cfg.bench_engine == "transformers":
        check_decoding(target)
    return target


def fresh_draft(
    cfg: Config, target: Target, device: torch.device, ranks: Ranks, mapping: dict[str, Tensor]
) -> Any:
    """A draft for the target, whole or this process's share of it."""
    kind = locate(cfg.draft._target_)
    shared = cfg.trainer.shard and ranks.world > 1
    with without_numbers() if shared and ranks.rank else nullcontext():
        draft = kind.new(target, cfg.draft, mapping, cfg.seed)
    if cfg.trainer.init is not None:
        begin_with(draft, cfg, target)
    if shared:
        shard_draft(draft, draft.units, device, ranks.world)
    draft.trains_on(device)
    if draft.not_copied:
        log.info(
            "train: draft.start=target: not copied, as target and draft do not both have it in "
            "the same sense: %s", ", ".join(draft.not_copied),
        )  # fmt: skip
    draft.gradient_checkpointing = cfg.trainer.gradient_checkpointing
    return draft


def wanted_of(cfg: Config) -> dict[str, Any]:
    """The options that the tokens must have been made with."""
    wanted: dict[str, Any] = {"max_length": cfg.max_length}
    if "draft_vocab_size" in cfg.draft.matters():
        wanted["draft.draft_vocab_size"] = cfg.draft.draft_vocab_size
    return wanted


def check_learnable(cfg: Config, splits: Splits) -> dict[str, dict[str, int]]:
    """By split how many conversations train nothing in this draft and why; InputError when none of
    a split does, or none is held out."""
    check_held_out(cfg, splits.eval)
    threads, reasons = torch.get_num_threads(), {}
    torch.set_num_threads(1)  # for so short operations several only wait for each other
    for name, tokens in vars(splits).items():
        counts = nothing_to_learn(cfg.draft, tokens.parts())
        refuse_nothing(cfg.draft, f"{paths.tokens_dir(cfg)}, {name}", counts, len(tokens))
        reasons[name] = dict(counts)
    torch.set_num_threads(threads)
    return reasons


def of_no_use(reasons: dict[str, dict[str, int]]) -> str:
    """What the draft could not learn from, for the last line; "" when nothing was left out."""
    parts = [f"{name}: {listed(counts)}" for name, counts in reasons.items() if counts]
    return "; nothing to learn in ".join(["", *parts])


def objectives(cfg: Config, record: dict[str, Any]) -> float | tuple[float, ...]:
    """The values that `objectives` names, one by itself, from a run's record."""
    gpus = record.get("processes", cfg.trainer.gpus) + record.get("workers", 0)
    results = {**record["evaluation"], "gpu_hours": gpus * record.get("seconds", 0.0) / 3600}
    values = tuple(float(results[name]) for name in cfg.objectives)
    return values if len(values) > 1 else values[0]


def states_of(
    cfg: Config, target: Target, splits: Splits, run: TrainingRun, stream: Stream | None = None
) -> Features:
    """How a batch gets the target's hidden states, as `target.placement` and `cache` say."""
    splits_by_sign = {1: splits.train, -1: splits.eval}
    if stream:
        sent_for = stream.features(splits_by_sign)
        return remembered(sent_for) if cfg.target.cache == "memory" else sent_for
    if cfg.target.pack_tokens is not None:
        target.take_packing()
    folder = paths.features_dir(cfg)
    if cfg.target.compile and cfg.target.cache != "disk":
        target.compile_layers()
    features = partial(target.states, most=cfg.target.pack_tokens, compiled=cfg.target.compile)
    together = cfg.target.shard and run.ranks.world > 1
    if cfg.target.cache == "none":
        return computed_together(features, run.ranks) if together else computed(features)
    if cfg.target.cache == "memory":
        return remembered(computed(features))
    made_of = Fingerprint(
        {k: run.fingerprint.inputs[k] for k in (paths.tokens_dir(cfg).name, "the target")},
        {"model.path": cfg.model.path, "model.aux_layers": target.aux_layers,
         "model.dtype": str(target.model.dtype), "max_length": cfg.max_length,
         **chosen(cfg, OF_STATES)},
    )  # fmt: skip
    make_cache(folder, features, splits_by_sign, made_of, run.ranks, together)
    target.forget_layers()
    return from_disk(folder, len(target.aux_layers), target.embed_VH.shape[1])


def make_objective(cfg: Config, draft: Any, target: Target, states: Features) -> Objective:
    """The draft's objective on this target, as the training loop wants it."""
    loss, head = loss_of(cfg), target.head
    if loss.function is not opd:
        check_function(loss.function, cfg.loss, len(draft.draft_ids_D), target.device)
    runs_target = cfg.target.placement == "inprocess" and cfg.target.cache == "none"
    live = 2.0 * target.parameters if runs_target else 0.0

    def denominators(batch: Batch) -> Tensor:
        counts_K: Tensor = draft.denominators(cfg.draft, batch)
        if not cfg.onpolicy.replays:
            return counts_K
        proposed_K = torch.zeros(cfg.draft.replay_length, dtype=torch.float64)
        if isinstance(batch, Sample) and batch.replay is not None:
            counted_RK = batch.replay.counts_RK
            proposed_K[: counted_RK.shape[1]] = counted_RK.sum(0).double()
        return torch.cat([counts_K, proposed_K])

    def forward(sample: Sample, window_K: Tensor) -> Outcome:
        outcome: Outcome = draft(sample, head, loss, cfg.draft, window_K)[1]
        flops, sums = outcome.flops + live * len(sample.ids_T), outcome.sums
        if sample.replay is not None:
            flops += sample.replay.flops + live * len(sample.replay.last_PH)
        if sample.decoded_4 is not None:
            gained, verifications, read, drafted = sample.decoded_4.tolist()
            flops += (live + 2.0 * head.weight_VH.numel()) * read + 2.0 * count(draft) * drafted
            own = {"gained": gained, "verifications": verifications, "decoded_tokens": read}
            sums = sums | {f"{ONPOLICY}{k}": torch.tensor(v) for k, v in own.items()}
        return replace(outcome, flops=flops, sums=sums)

    nothing_2 = torch.zeros(2, dtype=torch.long, device=target.device)
    states_2H = torch.zeros(2, head.weight_VH.shape[1], device=target.device)
    aux_2A = states_2H.repeat(1, len(target.aux_layers))
    idle = Sample(nothing_2, nothing_2.cpu(), [0], [2], 0, aux_2A, states_2H)
    steps = cfg.draft.steps + cfg.draft.replay_length * cfg.onpolicy.replays
    return Objective(steps, DRAFTS, states, samples_of, denominators, idle, forward)


def loss_of(cfg: Config) -> Loss:
    """What is to be made small, on the text and on what the draft proposes."""
    function, options = locate(cfg.loss._target_, "loss."), cfg.onpolicy
    if not options.replays:
        return Loss(function, cfg.loss)

    def part(terms: ProposedTerms) -> Loss | None:
        weights = vars(terms)
        if not any(weights.values()):
            return None
        own = LossConfig(name="proposed", temperature=cfg.loss.temperature, **weights)
        return Loss(opd, own, options.weight)

    parts = part(options.accepted), part(options.rejected)
    proposed = ProposedLoss(*parts, options.decay, options.start)
    return Loss(function, cfg.loss, options.level0, proposed)


def replaying(
    cfg: Config, replayer: Replayer, objective: Objective, splits: Splits, run: TrainingRun
) -> Objective:
    """The objective with proposals of the draft in its samples, and with its answers.

    Raises:
        InputError: the target cannot be decoded, where it is to answer.
    """

    def summed(ranks: Ranks) -> str:
        counts = ranks.gather((replayer.read, replayer.verified, replayer.decoded))
        read, verified, decoded = (sum(column) for column in zip(*counts, strict=True))
        return replace(replayer, read=read, verified=verified, decoded=decoded).summary()

    nothing = Features(lambda batches: list, summary=summed)
    objective = replace(objective, features=nothing, prepare=replayer.prepare)
    if not cfg.onpolicy.rolls:
        return objective
    check_decoding(replayer.target)
    rollouts = Rollouts(cfg, splits.train, replayer, run)
    return replace(objective, begin=rollouts.begin, prepare=rollouts.prepare)


def fingerprint_of(cfg: Config, tokens: Path) -> Fingerprint:
    """What a run depends on: its tokens, its target and every option that changes a number."""
    inputs = {
        tokens.name: sha256(tokens / "run.json"),
        "the target": model_digest(cfg.model.path),
        **own_code(cfg),
    }
    if (origin := cfg.draft.origin) is not None:
        inputs["draft.path"] = model_digest(origin)
    if (init := cfg.trainer.init) is not None:
        inputs["trainer.init"] = sha256(initial_weights(cfg, init))
    return Fingerprint(inputs, training_settings(cfg))
