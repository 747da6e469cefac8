"""Speculative decoding changes the speed of an answer and nothing else."""

from collections import deque
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from conftest import small_target
from scipy.stats import chisquare
from test_eagle3 import small_draft
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specforge_exp.bench import speculative
from specforge_exp.bench.speculative import (
    Choice,
    Decoding,
    Past,
    generate,
    generating,
    speculate,
    speculating,
    until_end,
    verify,
)
from specforge_exp.data import synthetic
from specforge_exp.data.chat import prompt_ids
from specforge_exp.data.conversations import asks_of
from specforge_exp.drafts.dspark.config import DSparkConfig
from specforge_exp.drafts.dspark.draft import DSpark
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.target import Target


def tiny_draft(target: Target) -> Eagle3:
    """An untrained draft for the tiny target: it guesses badly, which must not matter."""
    counts = torch.zeros(target.embed_VH.shape[0], dtype=torch.int64)
    cfg = Eagle3Config(name="eagle3", draft_vocab_size=512)
    return Eagle3.new(target, cfg, vocabulary_mapping(counts, 512), seed=0)


def test_greedy_output_is_the_targets_own(tiny_target: Target, tiny_tokenizer: Any) -> None:
    """Token for token what transformers' own greedy search says, on 8 prompts, in fp32."""
    draft = tiny_draft(tiny_target)
    eos = tiny_tokenizer.eos_token_id
    decoding = Decoding(max_tokens=24, chain_length=4, eos=frozenset({eos}))
    for record in synthetic.generate("bench", 8):
        prompt = prompt_ids(tiny_tokenizer, asks_of(record)[0], {})
        ids = torch.tensor([prompt])
        reference = tiny_target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            eos_token_id=eos, pad_token_id=eos,
        )[0, len(prompt) :].tolist()  # fmt: skip
        found = speculate(tiny_target, draft.decoder(), draft.draft_ids_D, prompt, decoding)
        assert found.tokens == reference
        assert generate(tiny_target, prompt, decoding).tokens == reference
        assert 1 + sum(found.gained) == len(found.tokens)


class Oracle:
    """A drafter that knows the answer."""

    def __init__(self, answer: list[int], vocabulary: int) -> None:
        self.answer, self.vocabulary, self.at = answer, vocabulary, -1

    def commit(self, aux: torch.Tensor, next_tokens: list[int]) -> None:
        self.at = 1 if self.at < 0 else self.at + len(next_tokens)

    def propose(self, length: int, choose: Choice) -> tuple[list[int], list[torch.Tensor]]:
        chain = (self.answer + [0] * length)[self.at : self.at + length]
        return chain, [torch.zeros(self.vocabulary)] * length


def test_a_perfect_draft_is_accepted_whole() -> None:
    target = small_target()
    prompt = [5, 9, 2, 33]
    decoding = Decoding(max_tokens=22, chain_length=6)
    alone = generate(target, prompt, decoding)
    oracle = Oracle(generate(target, prompt, Decoding(max_tokens=40)).tokens, 64)
    found = speculate(target, oracle, torch.arange(64), prompt, decoding)
    assert found.tokens == alone.tokens
    assert found.gained == [7, 7, 7]
    assert found.accepted == [6, 6, 6]
    assert found.read == [7, 7, 7]
    first = frozenset(alone.tokens[:1])
    for short in (replace(decoding, max_tokens=1), replace(decoding, eos=first)):
        found = speculate(target, oracle, torch.arange(64), prompt, short)
        assert (found.tokens, found.gained) == (alone.tokens[:1], [])
        assert generate(target, prompt, short).tokens == alone.tokens[:1]


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The distribution cut to its most likely tokens that reach top_p together."""
    kept, mass = torch.zeros_like(p), 0.0
    for token in sorted(range(len(p)), key=lambda token: -float(p[token])):
        if mass < top_p:
            kept[token] = p[token]
        mass += float(p[token])
    return kept / kept.sum()


@pytest.mark.parametrize(("size", "top_p"), [(40, 1.0), (64, 1.0), (40, 0.7)])
def test_sampled_tokens_follow_the_target(size: int, top_p: float) -> None:
    """The first verified token, over many runs, has the target's distribution (chi-square)."""
    torch.manual_seed(0)
    target = small_target()
    draft = small_draft(target, size)
    generator = torch.Generator().manual_seed(1)
    choice = Choice(1.0, generator, top_p)
    prompt = torch.tensor([[5, 9, 2, 33, 17]])
    aux, last = target.features(prompt)
    p = nucleus(torch.softmax(target.head(last[0, -1:])[0].double(), -1), top_p)
    decoder = draft.decoder()
    decoder.commit(aux[:, :-1], prompt[0, 1:].tolist())
    two_rows = target.head(last[0, -1:]).repeat(2, 1)
    runs, counts = 4000, torch.zeros(64)
    for _ in range(runs):
        drafted, logits = decoder.propose(1, choice)
        counts[verify(drafted, logits, two_rows, draft.draft_ids_D, choice)[0]] += 1
    assert counts[p == 0].sum() == 0
    order = p.argsort(descending=True)
    expected, observed = runs * p[order], counts[order].double()
    large = expected >= 5
    expected = torch.cat([expected[large], expected[~large].sum()[None]]).numpy()
    observed = torch.cat([observed[large], observed[~large].sum()[None]]).numpy()
    keep = expected > 0
    test = chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum())
    assert test.pvalue > 1e-3
    wrong = chisquare(observed[keep][::-1], expected[keep] * observed.sum() / expected[keep].sum())
    assert wrong.pvalue < 1e-3  # the test can fail


@pytest.mark.parametrize("drafts", [True, False])
def test_what_was_read_is_not_read_again(drafts: bool) -> None:
    """Turn after turn, also after one that was broken off, a past that stays changes no token."""
    target = small_target()
    draft = small_draft(target)
    decoding = Decoding(max_tokens=20, chain_length=4)
    read: list[int] = []
    features = target.features

    def counted(ids_BT: torch.Tensor, cache: Any = None) -> Any:
        read.append(ids_BT.shape[1])
        return features(ids_BT, cache)

    target.features = counted  # type: ignore[method-assign]

    def ask(past: Past, prompt: list[int], most: int = 99) -> list[int]:
        read.clear()
        answers = (
            speculating(past, draft.decoder(), draft.draft_ids_D, prompt, decoding)
            if drafts
            else generating(past, prompt, decoding)
        )
        return list(deque(islice(answers, most), maxlen=1)[0].tokens)

    past, prompt = Past(target), [5, 9, 2, 33, 17]
    for turn, most in enumerate((99, 3, 99)):
        said = ask(past, prompt, most)
        first = read[0]
        fresh = ask(Past(target), prompt, most)
        assert said == fresh
        assert read[0] == len(prompt) and first <= (4 if turn else 5)
        prompt = [*prompt, *said, 11, 12, 13]
    ask(past, prompt)
    assert ask(past, prompt[:7]) == ask(Past(target), prompt[:7])  # the talk was cut short
    assert ask(past, [3, 4]) == ask(Past(target), [3, 4])  # and forgotten


def test_sampling_is_repeatable() -> None:
    target = small_target()
    draft = small_draft(target)
    decoding = Decoding(max_tokens=20, chain_length=3, temperature=0.8)

    def once() -> list[int]:
        generator = torch.Generator().manual_seed(7)
        answer = speculate(
            target, draft.decoder(), draft.draft_ids_D, [1, 2, 3], decoding, generator
        )
        return answer.tokens

    assert once() == once()


def test_answers_end_where_they_should() -> None:
    assert until_end([4, 5, 6], 9, frozenset({5})) == ([4, 5], True)
    assert until_end([4, 5, 6], 2, frozenset()) == ([4, 5], True)
    assert until_end([4, 5, 6], 4, frozenset()) == ([4, 5, 6], False)


class Scripted(Choice):
    """Takes given choices, then the first that can be; knows its probability and the others."""

    def __init__(self, path: list[int], decoding: Decoding, draft_ids_D: Tensor) -> None:
        super().__init__(decoding.temperature, None, decoding.top_p)
        self.path, self.draft_ids, self.weight = list(path), draft_ids_D.tolist(), 1.0
        self.taken: list[int] = []
        self.forks: list[list[int]] = []
        self.asked: list[Tensor] = []
        self.drafted: list[int] = []

    def take(self, chances: list[float]) -> int:
        possible = [index for index, chance in enumerate(chances) if chance > 0]
        ahead = len(self.taken) < len(self.path)
        index = self.path[len(self.taken)] if ahead else possible[0]
        if not ahead:
            self.forks += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(index)
        self.weight *= chances[index]
        return index

    def probabilities(self, logits: Tensor) -> Tensor:
        self.asked.append(super().probabilities(logits))
        return self.asked[-1]

    def pick(self, probabilities: Tensor) -> int:
        return self.take((probabilities / probabilities.sum()).tolist())

    def uniform(self) -> float:
        """Below min(1, p / q) of the token that is judged, or above: the last that was asked for
        are p and q."""
        token = self.drafted.pop(0)
        p, q = float(self.asked[-2][token]), float(self.asked[-1][self.draft_ids.index(token)])
        return 1 - 1e-12 if self.take([min(1.0, p / q), 1 - min(1.0, p / q)]) else 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "top_p"), [("eagle3", 1.0), ("dspark", 1.0), ("dspark", 0.8)])
def test_the_law_of_whole_answers(kind: str, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way that chance can go, with its probability: answers of several verifications have
    the target's own, with a draft that cannot say all tokens, and with chains that confidence
    ends."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=8,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4, bos_token_id=0,
    )  # fmt: skip
    target = Target(LlamaForCausalLM(config).eval(), [1, 3, 4])
    cfg: Any = Eagle3Config(name="e", draft_vocab_size=2)
    mapping = vocabulary_mapping(torch.tensor([5, 0, 7]), 2)
    draft: Any = Eagle3.new(target, cfg, mapping, 0)
    decoding = Decoding(3, 2, 0.9, frozenset({2}), top_p)
    if kind == "dspark":
        cfg = DSparkConfig(name="s", block_size=3, num_layers=1, num_features=3, markov_rank=4)
        draft, decoding = DSpark.new(target, cfg, {}, 0), replace(decoding, verify_cost=0.3)
    for weight in draft.parameters():
        weight.data += 0.5 * torch.randn(weight.shape)
    law, alone, lengths = dict[Any, float](), dict[Any, float](), set[int]()

    def watched(drafted: list[int], *rest: Any) -> list[int]:
        rest[-1].drafted = list(drafted)
        lengths.add(len(drafted))
        return verify(drafted, *rest)

    monkeypatch.setattr(speculative, "verify", watched)
    for found, drafts in ((law, True), (alone, False)):
        paths: list[list[int]] = [[]]
        while paths:
            chance = Scripted(paths.pop(), decoding, draft.draft_ids_D)
            monkeypatch.setattr(speculative, "Choice", lambda *_, chance=chance: chance)
            answer = (
                speculate(target, draft.decoder(), draft.draft_ids_D, [1, 2, 0], decoding)
                if drafts
                else generate(target, [1, 2, 0], decoding)
            )
            said = tuple(answer.tokens)
            found[said] = found.get(said, 0.0) + chance.weight
            paths += chance.forks
    assert law.keys() == alone.keys() and len(law) > 3
    assert (lengths == {2}) == (kind == "eagle3")
    assert all(law[said] == pytest.approx(alone[said], abs=1e-6) for said in law)
