"""Proposals of the draft as it is now, judged by the target in one forward per conversation.

Shape suffixes: T tokens, R anchors, K steps, J = K - 1, P = J * R, H hidden, D draft vocabulary, V
target vocabulary, N rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specforge_exp.config import Config
from specforge_exp.config.onpolicy import OnPolicyConfig
from specforge_exp.data.messages import MARKS
from specforge_exp.data.rendering import eos_token_ids
from specforge_exp.drafts.rows import document_bounds, possible_anchors
from specforge_exp.onpolicy.anchors import Draw, draw, missed
from specforge_exp.onpolicy.judges import Here, Judge
from specforge_exp.target import Head, Target, load_tokenizer
from specforge_exp.target.segments import check_segments
from specforge_exp.training.batches import Batch
from specforge_exp.training.features import States, conversations, joined
from specforge_exp.training.objective import Replay, Sample, samples_of

ROWS = 256
"""Rows of the target's logits that exist together."""


@dataclass
class Chooser:
    """Chooses proposed tokens, and keeps by how much the draft believed in them."""

    temperature: float
    numbers_KR: Tensor
    """In [0, 1)."""
    log_q: list[Tensor] = field(default_factory=list)

    def __call__(self, step: int, logits_RD: Tensor) -> Tensor:
        """Draft ids [R] of a step: the best, or samples."""
        if self.temperature == 0:
            return logits_RD.argmax(-1)
        chance_RD = torch.softmax(logits_RD.double() / self.temperature, -1)
        below_RD = chance_RD.cumsum(-1)
        where_R1 = self.numbers_KR[step].to(below_RD.device)[:, None] * below_RD[:, -1:]
        id_R1 = torch.searchsorted(below_RD, where_R1, right=True)
        id_R1 = id_R1.clamp(max=logits_RD.shape[1] - 1)
        self.log_q.append(chance_RD.gather(1, id_R1)[:, 0].log())
        return id_R1[:, 0]


@dataclass
class Replayer:
    """Makes samples with proposals, of batches of a training."""

    cfg: OnPolicyConfig
    draft: Any
    target: Target
    steps: int
    """Tokens proposed after an anchor."""
    limit: int
    """Positions that there are, as max_length: a chain ends before."""
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    closing: frozenset[int] = frozenset()
    """Tokens that end thoughts."""
    read: int = 0
    """Tokens of conversations that the target has read."""
    verified: int = 0
    """Proposed tokens that it has read."""
    decoded: int = 0
    """Tokens that it has read to write answers."""
    elsewhere: Judge | None = None
    """Who judges when the target's layers are in other processes."""

    @property
    def judge(self) -> Judge:
        """Who judges."""
        return self.elsewhere or Here(self.target)

    def prepare(self, batches: list[Batch], states: States) -> list[Sample]:
        """As `Objective.prepare`; called for a window when the step before it is done, so the
        proposals are those of the draft that is trained on them."""
        del states  # they are made here, with the keys and values that verification needs
        return [self.sample(batch) for batch in batches]

    @torch.no_grad()
    def sample(self, batch: Batch, errors: list[Tensor] | None = None) -> Sample:
        """One batch; held-out ones, and those before onpolicy.start, have no proposals.

        Args:
            batch: of conversations.
            errors: positions of each of them before a token that the draft missed; None: they are
                found by proposals from anchors that are drawn uniformly.
        """
        replays = batch.step >= self.cfg.start
        parts, texts = self.judge.read(list(conversations(batch)), replays)
        (sample,) = samples_of([batch], [joined(parts)])
        if not replays:
            return sample
        self.read += sum(batch.lengths)
        return replace(sample, replay=self.replayed(sample, texts, errors))

    def replayed(
        self, sample: Sample, texts: list[Any], errors: list[Tensor] | None
    ) -> Replay | None:
        """The proposals of a sample; None: there is no place for any."""
        ids_T, turns_T = sample.ids_T.cpu(), sample.turns_T
        possible_T = possible_anchors(turns_T, *document_bounds(sample.lengths, turns_T.device))
        parts = list(spans(sample.lengths))
        draws = []
        for span, number in zip(parts, sample.numbers, strict=True):
            fits_T = torch.arange(span.stop - span.start) + self.steps <= self.limit
            draws.append(draw(self.cfg, sample.draw, number, possible_T[span] & fits_T, self.steps))
        anchors, flops = [one.uniform() for one in draws], 0.0
        if errors is None and self.cfg.errors > 0 and any(len(a) for a in anchors):
            numbers = self.numbers(draws, anchors)
            tokens_KR, _, flops = self.propose(sample, packed(anchors, parts), numbers[0])
            chains = tokens_KR.split([len(a) for a in anchors], 1)
            errors = [
                missed(a, c, ids_T[p], turns_T[p])
                for a, c, p in zip(anchors, chains, parts, strict=True)
            ]
        if errors is not None:
            pairs = zip(draws, errors, strict=True)
            anchors = [one.with_errors(own, self.cfg.errors) for one, own in pairs]
        if not any(len(a) for a in anchors):
            return None
        replay = self.judged(sample, texts, anchors, self.numbers(draws, anchors))
        return replace(replay, flops=replay.flops + flops)

    def numbers(self, draws: list[Draw], anchors: list[Tensor]) -> Tensor:
        """Random numbers for these anchors of each conversation, [2, K, R]."""
        pairs = zip(draws, anchors, strict=True)
        return torch.cat([one.numbers(self.steps, len(a)) for one, a in pairs], -1)

    def propose(
        self, sample: Sample, anchor_R: Tensor, numbers_KR: Tensor
    ) -> tuple[Tensor, Chooser, float]:
        """Proposed tokens [K, R] on the CPU, how they were chosen, and FLOP."""
        chooser = Chooser(self.cfg.temperature, numbers_KR)
        tokens_KR, flops = self.draft.propose(sample, anchor_R, self.steps, chooser)
        return tokens_KR.cpu(), chooser, flops

    def judged(
        self, sample: Sample, texts: list[Any], anchors: list[Tensor], numbers: Tensor
    ) -> Replay:
        """Proposals from these anchors of each conversation, and what the target says of them, who
        has read the texts."""
        parts = list(spans(sample.lengths))
        anchor_R = packed(anchors, parts)
        tokens_KR, chooser, flops = self.propose(sample, anchor_R, numbers[0])
        last_TH = sample.last_TH
        chains = tokens_KR[:-1].split([len(own_R) for own_R in anchors], 1)
        asked = [n for n, own_R in enumerate(anchors) if len(own_R) and self.steps > 1]
        three = [texts, anchors, chains]
        read = self.judge.verify(*([each[n] for n in asked] for each in three))
        alone = len(anchor_R) if self.steps == 1 else 0
        none_JRH = last_TH.new_zeros(self.steps - 1, alone, last_TH.shape[1])
        read_JRH = torch.cat([none_JRH, *read], 1)
        self.verified += (self.steps - 1) * len(anchor_R)
        taught_KRH = torch.cat([last_TH[anchor_R.to(last_TH.device)][None], read_JRH])
        log_q_KR = torch.stack(chooser.log_q).cpu() if chooser.log_q else None
        stands_KR = stands(
            self.target.head, taught_KRH, tokens_KR, log_q_KR, numbers[1], self.cfg.temperature
        )
        valid_KR = self.valid(sample, anchor_R, tokens_KR)
        accepted_R = (stands_KR & valid_KR).int().cumprod(0).sum(0)
        at_K1 = torch.arange(self.steps)[:, None]
        counts_KR = valid_KR & (at_K1 <= accepted_R + self.cfg.beyond)
        accepted_KR = at_K1 < accepted_R
        flops += 2.0 * self.target.head.weight_VH.numel() * tokens_KR.numel()
        return Replay(
            anchor_R, tokens_KR, read_JRH.flatten(0, 1), counts_KR.T.contiguous(),
            accepted_KR.T.contiguous(), flops,
        )  # fmt: skip

    def valid(self, sample: Sample, anchor_R: Tensor, tokens_KR: Tensor) -> Tensor:
        """Whether anything may follow the tokens before each proposed one: not an end token, and
        not the whole rest of the turn; [K, R] bool."""
        ids_T, turns_T = sample.ids_T.cpu(), sample.turns_T
        _, end_T = document_bounds(sample.lengths, turns_T.device)
        steps_K1 = torch.arange(1, self.steps + 1)[:, None]
        at_KR = anchor_R + steps_K1
        inside_KR = at_KR < end_T[anchor_R]
        at_KR = at_KR.clamp(max=len(ids_T) - 1)
        inside_KR &= turns_T[at_KR] == turns_T[anchor_R]
        text_KR = ((tokens_KR == ids_T[at_KR]) & inside_KR).int().cumprod(0)
        before_KR = torch.cat([torch.ones_like(text_KR[:1]), text_KR[:-1]])  # all said is the text
        over_KR = (before_KR > 0) & ~inside_KR
        ended_KR = torch.isin(tokens_KR, torch.tensor(sorted(self.ends), dtype=torch.long))
        ended_KR = torch.cat([torch.zeros_like(ended_KR[:1]), ended_KR[:-1]])
        return (over_KR | ended_KR).int().cumsum(0) == 0

    def summary(self) -> str:
        """What verification took."""
        more = 1 + (self.verified + self.decoded) / max(1, self.read)
        own = f" and {self.decoded} to write them" if self.cfg.rolls else ""
        return (
            f"onpolicy={self.cfg.name}: the target read {self.verified} proposed tokens beside "
            f"{self.read} of conversations{own} ({more:.2f} times as many as without)"
        )


def replayer_of(cfg: Config, draft: Any, target: Target, elsewhere: Judge | None) -> Replayer:
    """What makes samples with proposals of the draft; workers have tried the target themselves.

    Raises:
        InputError: the target cannot judge them in one forward.
    """
    tokenizer = load_tokenizer(cfg.model)
    known = tokenizer.get_vocab()
    target.tokens = max(known.values()) + 1  # others are never said, as in bench
    if not elsewhere:
        check_segments(target, max(cfg.max_length, 4))
    ends = frozenset(eos_token_ids(cfg.model.path, tokenizer))
    closings = [closing.strip() for _, closing in MARKS]
    closing = frozenset(known[name] for name in closings if name in known)
    steps, limit = cfg.onpolicy.length or cfg.draft.replay_length, cfg.max_length
    return Replayer(cfg.onpolicy, draft, target, steps, limit, ends, closing, elsewhere=elsewhere)


def spans(lengths: list[int]) -> Iterator[slice]:
    """Where each of packed conversations stands."""
    first = 0
    for length in lengths:
        yield slice(first, first + length)
        first += length


def packed(anchors: list[Tensor], parts: list[slice]) -> Tensor:
    """Positions in conversations as positions among packed tokens."""
    return torch.cat([a + part.start for a, part in zip(anchors, parts, strict=True)])


def stands(
    head: Head,
    taught_KRH: Tensor,
    tokens_KR: Tensor,
    log_q_KR: Tensor | None,
    numbers_KR: Tensor,
    temperature: float,
) -> Tensor:
    """Whether verification lets each proposed token stand, by itself; [K, R] bool on the CPU.

    Greedy: it is the target's own choice. Sampled: with probability min(1, p / q), as bench's
    `verify`.

    Args:
        head: the target's.
        taught_KRH: its states at the prefixes of the proposed tokens.
        tokens_KR: the proposed tokens.
        log_q_KR: log of the draft's probability of each; None: greedy.
        numbers_KR: in [0, 1).
        temperature: of both.
    """
    verdicts = []
    token_N = tokens_KR.flatten()
    for first in range(0, len(token_N), ROWS):
        rows = slice(first, first + ROWS)
        logits_NV = head(taught_KRH.flatten(0, 1)[rows].to(head.weight_VH.dtype))
        if log_q_KR is None:
            verdicts.append(logits_NV.argmax(-1).cpu() == token_N[rows])
            continue
        logp_NV = torch.log_softmax(logits_NV.double() / temperature, -1)
        log_p_N = logp_NV.gather(1, token_N[rows, None].to(logp_NV.device))[:, 0].cpu()
        q_N, p_N = log_q_KR.flatten()[rows].exp(), log_p_N.exp()
        verdicts.append(numbers_KR.flatten()[rows] * q_N < p_N)
    return torch.cat(verdicts).view_as(tokens_KR)
