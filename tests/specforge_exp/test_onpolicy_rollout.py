"""Rollouts: what is said is the target's own, anchors are where the draft was wrong, a round on
disk is what was made."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import conversation_set, make_config, small_target
from torch import Tensor

from specforge_exp.bench.speculative import Decoding, generate
from specforge_exp.config import Config
from specforge_exp.config.onpolicy import OnPolicyConfig
from specforge_exp.data.tokens import TokenSet
from specforge_exp.drafts.dflash import DFlash
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.eagle3 import Eagle3
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.standalone import Standalone
from specforge_exp.drafts.standalone.config import StandaloneConfig
from specforge_exp.drafts.standalone.decoder import StandaloneDecoder
from specforge_exp.errors import InputError
from specforge_exp.onpolicy.cost import cost_lines
from specforge_exp.onpolicy.replay import Replayer
from specforge_exp.onpolicy.rollout import (
    Rollouts,
    conversations_of,
    forget_rounds,
    generator_draft,
    read_round,
    round_file,
    write_round,
)
from specforge_exp.target import Target
from specforge_exp.training.batches import Batch
from specforge_exp.training.checkpoint import start_over
from specforge_exp.training.objective import samples_of
from specforge_exp.training.ranks import Ranks
from specforge_exp.training.watching import TrainingRun

K = 4
KINDS = [
    pytest.param(
        Eagle3,
        Eagle3Config(name="eagle3", draft_vocab_size=None, ttt_length=K, start="random"),
        id="eagle3",
    ),
    pytest.param(
        DFlash,
        DFlashConfig(
            name="dflash", block_size=K + 1, num_layers=2, num_features=3, min_loss_tokens=1
        ),
        id="dflash",
    ),
    pytest.param(
        Standalone,
        StandaloneConfig(
            name="standalone", init="random", config={"num_hidden_layers": 2}, horizon=K
        ),
        id="standalone",
    ),
]
TURNS = [[0] * 5 + [1] * 30, [0] * 4 + [1] * 6 + [0] * 3 + [2] * 9]
"""Of two conversations; their tokens are 0, 1, 2, ..."""


def made_of(kind: Any, draft_cfg: Any, folder: Path, **options: Any) -> Rollouts:
    """Rollouts of two conversations by a small target and a draft that is nothing but its start."""
    target = small_target()
    mapping = {"d2t": torch.zeros(64, dtype=torch.long), "t2d": torch.ones(64).bool()}
    draft = kind.new(target, draft_cfg, mapping, 3)
    own = OnPolicyConfig(name="rollout", sync_every=3, max_tokens=24, errors=1.0, **options)
    cfg = replace(make_config(folder), draft=draft_cfg, onpolicy=own, epochs=10)
    cfg.trainer.batch_size = 2
    replayer = Replayer(own, draft, target, K, cfg.max_length)
    run = TrainingRun(folder, None, Ranks())  # type: ignore[arg-type]
    return Rollouts(cfg, conversation_set(TURNS), replayer, run)


def rejected(target: Target, draft: Any, ids_T: Tensor, first: int) -> list[int]:
    """Where an answer that begins at `first` has drafts rejected, by proposals after each token
    that a verification begins with; and how many verifications there are."""
    at, places = first, []
    while at < len(ids_T) - 1:
        decoder = draft.decoder()
        if isinstance(decoder, StandaloneDecoder):
            decoder.begin(int(ids_T[0]))
        aux_1TA, _ = target.features(ids_T[None, :at])
        decoder.commit(aux_1TA, ids_T[1 : at + 1].tolist())
        drafted, _ = decoder.propose(K, lambda logits: int(logits.argmax()))
        text = ids_T[at + 1 : at + 1 + K].tolist()
        right = next((k for k, (a, b) in enumerate(zip(drafted, text, strict=False)) if a != b), K)
        if right < K and at + right + 1 < len(ids_T):
            places.append(at + right)
        at += right + 1
    return places


@pytest.mark.parametrize(("kind", "draft_cfg"), KINDS)
def test_it_says_what_the_target_says(kind: Any, draft_cfg: Any, tmp_path: Path) -> None:
    """Greedily, each turn after the new answer before it, which an end token must have ended; the
    anchors are where the draft was rejected."""
    rollouts = made_of(kind, draft_cfg, tmp_path)
    target, tokens = rollouts.replayer.target, rollouts.tokens
    draft = generator_draft(rollouts.replayer.draft, target)
    for weight in draft.parameters():
        assert not weight.requires_grad
    for buffer, own in zip(draft.buffers(), rollouts.replayer.draft.buffers(), strict=True):
        assert buffer.data_ptr() == own.data_ptr()
    random = torch.Generator()
    first = generate(target, [0, 1, 2, 3], Decoding(24)).tokens
    stop = max(first, key=first.index)
    ended = first.index(stop) + 1
    for ends in (frozenset(), frozenset({stop})):
        rollouts.replayer.ends = ends
        answer = rollouts.answered(draft, *tokens[1], random)
        prompt = [0, 1, 2, 3, *(first[:ended] if ends else first)]
        if ends:
            prompt += [10, 11, 12]
            prompt += generate(target, prompt, Decoding(24, eos=ends)).tokens
        assert answer.ids_T.tolist() == prompt
        turns = [0] * 4 + [1] * (ended if ends else 24)
        turns += [0] * 3 + [2] * (len(prompt) - len(turns) - 3) if ends else []
        assert answer.turns_T.tolist() == turns
        begins = [4, ended + 7] if ends else [4]
        parts = [4 + ended if ends else len(prompt), len(prompt)]
        expected = [
            place
            for at, end in zip(begins, parts, strict=False)
            for place in rejected(target, draft, answer.ids_T[:end], at)
        ]
        assert answer.errors_R.tolist() == expected
        gained, verifications, read, _ = answer.decoded_4.tolist()
        assert gained == int((answer.turns_T > 0).sum()) - len(begins)
        assert verifications >= len(expected) >= (not ends)
        new = len(prompt) - int((answer.turns_T > 0).sum())
        assert read == new + verifications * (K + 1)


def test_what_follows_another_end_is_left_away(tmp_path: Path) -> None:
    """A text that goes on behind <|im_end|> is no prompt behind another of the target's ends."""
    rollouts = made_of(*KINDS[0].values, tmp_path)
    said = generate(rollouts.replayer.target, [0, 1, 2, 3], Decoding(24)).tokens
    stop = next(token for token in said if token != 9)
    own, later = rollouts.tokens[1], []
    for end in (9, stop):  # 9 is the last token of the text's first answer
        rollouts.replayer.ends = frozenset({stop, end})
        own[0][9] = end
        answer = rollouts.answered(rollouts.replayer.draft, *own, torch.Generator())
        first = said[: said.index(stop) + 1]
        assert answer.ids_T[: 4 + len(first)].tolist() == [0, 1, 2, 3, *first]
        later.append(int(answer.turns_T.max()))
    assert later == [1, 2]


def test_what_follows_new_thoughts_is_left_away(tmp_path: Path) -> None:
    """Templates leave earlier thoughts out of a prompt; the text that has some shows that its own
    does not."""
    rollouts = made_of(*KINDS[0].values, tmp_path)
    said = generate(rollouts.replayer.target, [0, 1, 2, 3], Decoding(24)).tokens
    stop, own, later = max(said, key=said.index), rollouts.tokens[1], []
    rollouts.replayer.ends, own[0][9] = frozenset({stop}), stop
    for closing, in_text in ((frozenset[int](), 5), (frozenset(said[:1]), 5), (said[:1], said[0])):
        rollouts.replayer.closing, own[0][5] = frozenset(closing), in_text
        answer = rollouts.answered(rollouts.replayer.draft, *own, torch.Generator())
        later.append(int(answer.turns_T.max()))
    assert later == [2, 1, 2]


@pytest.mark.parametrize(("kind", "draft_cfg"), KINDS)
def test_narrow_weights_turn_by_the_same_angles(kind: Any, draft_cfg: Any, tmp_path: Path) -> None:
    """A target in bfloat16, as on a GPU: the draft's weights are rounded, its rotations are not."""
    replayer = made_of(kind, draft_cfg, tmp_path).replayer
    replayer.target.model.bfloat16()
    draft = generator_draft(replayer.draft, replayer.target)
    assert {weight.dtype for weight in draft.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in replayer.draft.parameters()} == {torch.float32}
    turned = [m.inv_freq for m in draft.modules() if hasattr(m, "inv_freq")]
    assert turned and turned[0].tolist() == pytest.approx([1, 0.1, 0.01, 0.001])


def test_no_room_for_an_answer(tmp_path: Path) -> None:
    """Such a conversation stays as it is."""
    rollouts = made_of(*KINDS[0].values, tmp_path)
    rollouts.cfg.max_length = 6
    ids_T, turns_T = rollouts.tokens[0]
    answer = rollouts.answered(rollouts.replayer.draft, ids_T[:6], turns_T[:6], torch.Generator())
    assert answer.ids_T.tolist() == ids_T[:6].tolist()
    assert answer.turns_T.tolist() == turns_T[:6].tolist()
    assert answer.decoded_4.tolist() == [0] * 4


def test_a_proposal_ends_where_nothing_may_follow() -> None:
    """After an end token, and after all that is left of the turn; packed, too."""
    ids_T = torch.tensor([0, 1, 2, 3, 4, 5, 10, 11, 12, 13])
    turns_T = torch.tensor([0, 1, 1, 1, 2, 2, 0, 1, 1, 1])
    batch = Batch(ids_T, turns_T, [0, 1], [6, 4], 0)
    (sample,) = samples_of([batch], [(torch.zeros(10, 1), torch.zeros(10, 1))])
    replayer = Replayer(OnPolicyConfig(name="replay"), None, cast(Any, None), 4, 99, frozenset({9}))
    for anchor, tokens, valid in [
        (1, [2, 3, 4, 5], 2),  # the turn is over; the next one's tokens are no part of it
        (1, [2, 7, 4, 5], 4),
        (1, [7, 3, 4, 5], 4),
        (3, [4, 5, 10, 11], 0),
        (1, [9, 3, 4, 5], 1),
        (4, [5, 10, 11, 12], 1),
        (7, [12, 9, 0, 0], 2),
        (8, [13, 0, 0, 0], 1),
        (8, [0, 13, 0, 0], 4),
    ]:
        valid_KR = replayer.valid(sample, torch.tensor([anchor]), torch.tensor(tokens)[:, None])
        assert valid_KR[:, 0].tolist() == [k < valid for k in range(4)], (anchor, tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_round(temperature: float, tmp_path: Path) -> None:
    """It is on disk before its steps and read within them; anchors are its errors, its prompts
    those of its steps; answers are functions of seed, round and conversation."""
    rollouts = made_of(*KINDS[0].values, tmp_path, temperature=temperature, start=1, anchors=4)
    batch = Batch(torch.arange(4), torch.ones(4).long(), [0], [4], 0, step=0)
    rollouts.begin(0)
    assert not (tmp_path / "rollouts").exists()
    assert rollouts.prepare([batch], [])[0].decoded_4 is None
    rollouts.begin(1)
    file = round_file(tmp_path, 1)
    made, kept = rollouts.answers, read_round(file, 2)
    start_over(tmp_path)
    assert not file.exists()
    assert sorted(made) == sorted(kept) == [0, 1]
    for number, answer in made.items():
        for mine, read in zip(vars(answer).values(), vars(kept[number]).values(), strict=True):
            assert mine.tolist() == read.tolist()
            assert mine.dtype == read.dtype
    both = replace(batch, numbers=[1, 0], lengths=[2, 2], step=2)
    [sample] = rollouts.prepare([both], [])
    assert sample.replay is not None
    lengths = [len(made[n].ids_T) for n in sample.numbers]
    assert sample.lengths == lengths
    starts = dict(zip(sample.numbers, [0, lengths[0]], strict=True))
    anchors = set(sample.replay.anchor_R.tolist())
    for number, answer in made.items():
        errors = {starts[number] + at for at in answer.errors_R.tolist()}
        room = {at for at in errors if at - starts[number] < len(answer.ids_T) - 1}
        assert len(room & anchors) == min(4, len(room))
    again = made_of(*KINDS[0].values, tmp_path / "again", temperature=temperature, start=1)
    again.begin(1)
    assert made[0].ids_T.tolist() == again.answers[0].ids_T.tolist()
    rollouts.begin(4)
    texts = made[0].ids_T.tolist(), rollouts.answers[0].ids_T.tolist()
    assert (texts[0] == texts[1]) == (temperature == 0)
    file.write_bytes(b"x")
    rollouts.first = -1
    with pytest.raises(InputError, match=r"Remove the checkpoints after step 1, or start over"):
        rollouts.begin(2)


def test_rounds_that_no_checkpoint_needs_are_removed(tmp_path: Path) -> None:
    rollouts = made_of(*KINDS[0].values, tmp_path)
    answers = {
        0: rollouts.answered(rollouts.replayer.draft, *rollouts.tokens[0], torch.Generator())
    }
    for first in (0, 3, 6):
        write_round(round_file(tmp_path, first), answers)
    for step, left in ((None, [0, 3, 6]), (4, [3, 6]), (6, [6])):
        for folder in tmp_path.glob("step-*"):
            folder.rmdir()
        if step:
            (tmp_path / f"step-{step:06d}").mkdir()
        forget_rounds(tmp_path, 3)
        files = sorted((tmp_path / "rollouts").iterdir())
        assert [int(file.stem[5:]) for file in files] == left


def lengths_of(tokens: TokenSet, cfg: Config) -> tuple[int, int]:
    """Steps of an epoch, and conversations of the first round."""
    return -(-len(tokens) // cfg.trainer.batch_size), len(conversations_of(cfg, tokens, 0))


def test_the_cost_is_known_before(tmp_path: Path) -> None:
    """Bounds by the lengths of the conversations, and by rounds."""
    cfg = make_config(tmp_path)
    cfg.epochs, cfg.trainer.batch_size = 2, 2
    cfg.onpolicy = OnPolicyConfig(name="rollout", anchors=3, sync_every=4, max_tokens=10, start=1)
    tokens = conversation_set([[0, 1, 1, 1, 1]] * 3 + [[0] + [1] * 19] * 3)
    assert lengths_of(tokens, cfg) == (3, 6)
    [replay, rolled] = cost_lines(cfg, tokens)
    assert "in 5 of 6 steps the target reads 125 tokens of conversations" in replay
    # 10 of 12 conversations; two tokens judged after each of 3 anchors, or of 2 for 5 tokens
    assert "at most 50 proposed ones (1.40 times as many as without)" in replay
    assert "2 rounds, 8 conversations answered" in rolled
    assert "at most 80 tokens for answers of 10, in at least 20 verifications of 4 tokens" in rolled
    cfg.trainer.accumulate = 2  # an epoch's second step has two conversations
    cfg.onpolicy = OnPolicyConfig(name="replay", anchors=3, length=2)
    [replay] = cost_lines(cfg, tokens)
    assert "in 4 of 4 steps the target reads 150 tokens of conversations" in replay
    assert "at most 36 proposed ones (1.24 times as many as without)" in replay
