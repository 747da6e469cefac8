"""Rollouts: draft and target write the answers that the draft is trained on.

A round is `onpolicy.sync_every` steps. Before its first one the generator takes the draft's weights
and answers the prompts of the round's conversations, each once, by the decoder of bench: what is
said is the target's, so the answers are training text; where a verification rejected a proposal is
where replay has its anchors. Then the round is written to the run's folder, and a training that is
continued within it reads it: its weights of then are gone. At a round's beginning it is a function
of seed, step and weights, and made anew.

Shape suffixes: T tokens of a conversation, R errors, C conversations.
"""

import copy
import logging
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from specforge_exp.artifacts import disk_errors
from specforge_exp.bench.speculative import Decoding, Generation, speculating
from specforge_exp.config import Config
from specforge_exp.data.tokens import TokenSet
from specforge_exp.errors import InputError
from specforge_exp.onpolicy.replay import Replayer
from specforge_exp.records import replacing
from specforge_exp.target import Past, Target, take_dtype
from specforge_exp.training.batches import (
    Batch,
    draw_of,
    lay_out,
    moved,
    numbers_of,
    share,
    window_of,
)
from specforge_exp.training.checkpoint import ROUNDS, step_folders
from specforge_exp.training.features import States
from specforge_exp.training.loop import total_steps
from specforge_exp.training.objective import Sample
from specforge_exp.training.watching import TrainingRun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """A conversation with new answers."""

    ids_T: Tensor
    turns_T: Tensor
    """As `Batch.turns_T`."""
    errors_R: Tensor
    """Positions of the tokens before those that the draft missed."""
    decoded_4: Tensor
    """As `Sample.decoded_4`."""


@dataclass
class Rollouts:
    """The current round of a training, and samples of its conversations."""

    cfg: Config
    tokens: TokenSet
    """The training's conversations, whose prompts are answered."""
    replayer: Replayer
    run: TrainingRun
    first: int = -1
    """The round's first step; -1: there is none yet."""
    answers: dict[int, Rollout] = field(default_factory=dict)
    """By the number of the conversation."""

    def begin(self, step: int) -> None:
        """See `Objective.begin`.

        Raises:
            InputError: the training continues within a round that cannot be read.
        """
        start, every = self.cfg.onpolicy.start, self.cfg.onpolicy.sync_every
        first = step - (step - start) % every
        if step < start or first == self.first:
            return
        file = round_file(self.run.folder, first)
        if step > first:
            self.answers = read_round(file, step)
        else:
            self.answers = self.made(first)
            if self.run.ranks.rank == 0:
                write_round(file, self.answers)
                forget_rounds(self.run.folder, every)
            self.run.ranks.wait()
        self.first = first

    def made(self, first: int) -> dict[int, Rollout]:
        """The round that begins with this step; every process writes its part of the answers."""
        ranks, lengths = self.run.ranks, self.tokens.lengths
        uses = conversations_of(self.cfg, self.tokens, first)
        numbers = sorted(uses)
        mine = share(numbers, lengths, ranks.rank, ranks.world)
        draft = generator_draft(self.replayer.draft, self.replayer.target)
        quiet = None if ranks.rank == 0 else True
        bar = tqdm(mine, f"rollouts {first + 1}", unit="answer", disable=quiet, leave=False)
        own = {}
        for number in bar:
            random = numbers_of(draw_of(self.cfg.seed, first), number)
            said = self.answered(draft, *self.tokens[number], random)
            own[number] = [x.tolist() for x in vars(said).values()]
        plain = {n: said for part in ranks.gather(own) for n, said in part.items()}
        total_4 = torch.tensor([plain[n][3] for n in numbers], dtype=torch.float64).sum(0)
        log.info(
            "step %d: %d answers with the draft of now, accepted length %.3f", first,
            len(numbers), total_4[0] / total_4[1].clamp(min=1),
        )  # fmt: skip
        made = {}
        for n in numbers:
            ids_T, turns_T, errors_R = (torch.tensor(x, dtype=torch.long) for x in plain[n][:3])
            decoded_4 = torch.tensor(plain[n][3], dtype=torch.float64)
            decoded_4[2:] /= uses[n]  # what it took counts once in a round
            made[n] = Rollout(ids_T, turns_T, errors_R, decoded_4)
        return made

    @torch.no_grad()
    def answered(
        self, draft: Any, ids_T: Tensor, turns_T: Tensor, random: torch.Generator
    ) -> Rollout:
        """The conversation with other answers, one turn after the other; it ends with an answer
        that does not, or not as the one in its place, or where there is no room. What cannot be
        answered stays as it is."""
        own, replayer, ids = self.cfg.onpolicy, self.replayer, ids_T.tolist()
        said: list[int] = []
        turns: list[int] = []
        errors: list[int] = []
        decoded_4, before = torch.zeros(4, dtype=torch.float64), 0
        past = Past(replayer.target)
        for number in turns_T[turns_T > 0].unique().tolist():
            places = (turns_T == number).nonzero()[:, 0].tolist()
            prompt = said + ids[before : places[0]]
            room = self.cfg.max_length - len(prompt)
            if room < 2:
                break
            decoding = Decoding(
                min(room, own.max_tokens or room), replayer.steps, own.temperature, replayer.ends
            )
            spoken = speculating(past, draft.decoder(), draft.draft_ids_D, prompt, decoding, random)
            answer = deque(spoken, maxlen=1)[0]
            turns += [0] * (len(prompt) - len(said)) + [number] * len(answer.tokens)
            errors += rejections(answer, len(prompt))
            proposed = sum(answer.read) - len(answer.read)
            decoded_4 += torch.tensor([
                len(answer.tokens) - 1, len(answer.read),
                len(prompt) - len(said) + sum(answer.read),
                len(prompt) + len(answer.tokens) + proposed,
            ])  # fmt: skip
            said, before = prompt + answer.tokens, places[-1] + 1
            # What follows in the text follows its own end token, where it has one, and the answer
            # as templates show it: most leave out earlier thoughts, of which it then has none.
            if answer.tokens[-1] not in ({ids[places[-1]]} & decoding.eos or decoding.eos):
                break
            if replayer.closing & set(answer.tokens) - {ids[place] for place in places}:
                break
        errors_R = torch.tensor(errors, dtype=torch.long)
        if not said:
            return Rollout(ids_T, turns_T, errors_R, decoded_4)
        return Rollout(torch.tensor(said), torch.tensor(turns), errors_R, decoded_4)

    def prepare(self, batches: list[Batch], states: States) -> list[Sample]:
        """As `Objective.prepare`: the window's conversations with the round's answers, laid out by
        their own lengths."""
        if not batches or batches[0].step < self.cfg.onpolicy.start:  # also held-out ones
            return self.replayer.prepare(batches, states)
        numbers = [number for batch in batches for number in batch.numbers]
        answers = [self.answers[number] for number in numbers]
        lengths = [len(answer.ids_T) for answer in answers]
        samples = []
        for part in lay_out(list(range(len(numbers))), lengths, self.cfg.trainer):
            chosen = [answers[at] for at in part]
            ids_T = moved(torch.cat([one.ids_T for one in chosen]), batches[0].ids_T.device)
            batch = Batch(
                ids_T, torch.cat([one.turns_T for one in chosen]), [numbers[at] for at in part],
                [lengths[at] for at in part], batches[0].draw, step=batches[0].step,
            )  # fmt: skip
            sample = self.replayer.sample(batch, [one.errors_R for one in chosen])
            decoded_4 = torch.stack([one.decoded_4 for one in chosen]).sum(0)
            self.replayer.decoded += round(float(decoded_4[2]))
            samples.append(Sample(**{**vars(sample), "decoded_4": decoded_4}))
        return samples


def rejections(answer: Generation, at: int) -> list[int]:
    """Positions of the tokens before those that verifications rejected, in an answer that begins
    `at` a position; none where the answer ended before the token that took its place."""
    places = []
    for gained, accepted, read in zip(answer.gained, answer.accepted, answer.read, strict=True):
        if gained == accepted + 1 and accepted < read - 1:
            places.append(at + accepted)
        at += gained
    return places


def conversations_of(cfg: Config, tokens: TokenSet, first: int) -> Counter[int]:
    """How often the steps of the round that begins with `first` use which conversation."""
    size = cfg.trainer.batch_size * cfg.trainer.accumulate
    per_epoch = -(-len(tokens) // size)
    last = min(first + cfg.onpolicy.sync_every, total_steps(cfg, tokens))
    windows = [
        window_of(len(tokens), size, cfg.seed, *divmod(step, per_epoch))
        for step in range(first, last)
    ]
    return Counter(number for window in windows for number in window)


def generator_draft(draft: Any, target: Target) -> Any:
    """The draft as it is now, in the target's type as bench has it; what is the target's is not
    copied."""
    shared = {id(tensor): tensor for tensor in draft.buffers()}
    copied = copy.deepcopy(draft, shared).requires_grad_(False).eval()
    take_dtype(copied, target.model.dtype)
    return copied


def round_file(folder: Path, first: int) -> Path:
    """Where the round that begins with a step lies."""
    return folder / ROUNDS / f"step-{first:06d}.safetensors"


def write_round(file: Path, answers: dict[int, Rollout]) -> None:
    """Write a round whole; InputError when the disk is full."""
    columns = zip(*(vars(answer).values() for answer in answers.values()), strict=True)
    ids, turns, errors, decoded = map(list, columns)
    tensors = {
        "numbers": torch.tensor(list(answers)), "lengths": torch.tensor(list(map(len, ids))),
        "ids": torch.cat(ids).int(), "turns": torch.cat(turns).short(),
        "errors": torch.cat(errors), "errors_of": torch.tensor(list(map(len, errors))),
        "decoded": torch.stack(decoded),
    }  # fmt: skip
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            save_file(tensors, partial)


def read_round(file: Path, step: int) -> dict[int, Rollout]:
    """What `write_round` wrote; InputError where it cannot be read."""
    try:
        tensors = load_file(file)
        columns = [
            tensors["ids"].long().split(tensors["lengths"].tolist()),
            tensors["turns"].long().split(tensors["lengths"].tolist()),
            tensors["errors"].split(tensors["errors_of"].tolist()),
            tensors["decoded"],
        ]
        rows = zip(tensors["numbers"].tolist(), *columns, strict=True)
        return {number: Rollout(*parts) for number, *parts in rows}
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the training continues after step {step}, within a round whose answers cannot be "
            f"read: {file} ({error}). Remove the checkpoints after step {int(file.stem[5:])}, or "
            "start over with trainer.resume=false"
        ) from None


def forget_rounds(folder: Path, every: int) -> None:
    """Remove the rounds that no checkpoint continues in."""
    oldest = min((int(path.name[5:]) for path in step_folders(folder)), default=0)
    for file in (folder / ROUNDS).glob("step-*.safetensors"):
        if int(file.stem[5:]) + every <= oldest:
            file.unlink()
