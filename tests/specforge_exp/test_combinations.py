"""Laws that hold for every draft with any of its options and any mixture of terms.

Options are drawn by a seed: what each of them does by itself, other files say.
"""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, small_target
from test_eagle3 import gradients, packed
from torch import Tensor

from specforge_exp.bench.speculative import Decoding, generate, speculate
from specforge_exp.config import LossConfig, locate
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dspark.config import DSparkConfig
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.peagle.config import PEagleConfig
from specforge_exp.drafts.standalone.config import StandaloneConfig
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.losses import Loss, RowLoss, opd
from specforge_exp.target import Target
from specforge_exp.training.objective import Sample

TOKENS = 64
Conversation = tuple[Tensor, Tensor]


def some_options(draw: random.Random) -> Any:
    """Of a draft of any kind."""
    layers, steps = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    window = draw.choice([None, None, 6, 50])
    eagle: dict[str, Any] = {
        "draft_vocab_size": draw.choice([20, None]), "num_layers": layers,
        "norm_before_residual": draw.random() < 0.5, "sliding_window": window,
        "full_attention_layers": [draw.randrange(layers)] * bool(window and layers > 1),
        draw.choice(["norm_before_fc", "fc_norm"]): draw.random() < 0.5,
    }  # fmt: skip
    dflash: dict[str, Any] = {
        "block_size": 4, "num_layers": layers, "num_features": draw.choice([1, 3]),
        "num_anchors": draw.choice([1, 3, 50]), "min_loss_tokens": draw.choice([None, 1]),
        "position_weights": draw.choice(["decay", "dpace"]), "sliding_window": window,
        "divisor": draw.choice(["weights", "labels"]),
        "window": draw.choice(["slot", "block"]) if window else "slot",
        "sample_from_anchor": draw.random() < 0.5,
        "sliding_window_non_causal": bool(window) and draw.random() < 0.5,
    }  # fmt: skip
    eagle3 = Eagle3Config(
        name="eagle3", ttt_length=steps, norm_output=draw.random() < 0.5,
        start=draw.choice(["target", "random"]), **eagle,
    )  # fmt: skip
    peagle = PEagleConfig(
        name="peagle", num_depths=steps, max_anchors=draw.choice([None, 3]), depth_decay=0.7,
        down_sample_ratio=draw.choice([0.4, 1.0]), **eagle,
    )  # fmt: skip
    dspark = DSparkConfig(
        name="dspark", markov_rank=4, markov_head_type=draw.choice(["vanilla", "gated", "rnn"]),
        enable_confidence_head=draw.random() < 0.5, **dflash,
    )  # fmt: skip
    small = StandaloneConfig(name="small", config={"num_hidden_layers": layers}, horizon=steps)
    kinds = [eagle3, peagle, DFlashConfig(name="dflash", **dflash), dspark, small]
    return draw.choice(kinds)


def some_loss(draw: random.Random, whole: bool) -> LossConfig:
    """Up to three terms; that of the text where the draft can say all of it."""
    names = [name for name in LossConfig(name="x", lambda_ce=1).weights() if name != "lambda_hard"]
    chosen = draw.sample(names + ["lambda_hard"] * whole, draw.choice([1, 2, 3]))
    weights = {name: draw.choice([0.3, 1.0]) for name in chosen}
    return LossConfig(name="x", temperature=draw.choice([1.0, 0.7]), **weights)


def some_conversation(draw: random.Random) -> Conversation:
    """Of one to three turns, each of one to nine tokens, and sometimes words behind the last."""
    turns: list[int] = []
    for number in range(1, draw.choice([2, 3, 4])):
        turns += [0] * draw.randint(1, 5) + [number] * draw.choice([1, 2, 5, 9])
    turns += [0] * draw.choice([0, 3])
    return torch.tensor([draw.randrange(TOKENS) for _ in turns]), torch.tensor(turns)


def behind(draw: random.Random, conversation: Conversation) -> Conversation:
    """The conversation with further words that nobody has to predict."""
    more = torch.tensor([draw.randrange(TOKENS) for _ in range(draw.randint(1, 4))])
    ids, turns = conversation
    return torch.cat([ids, more]), torch.cat([turns, torch.zeros_like(more)])


def made(target: Target, cfg: Any, seed: int) -> Any:
    """A draft of which every weight carries something."""
    counts = torch.randint(9, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    mapping = vocabulary_mapping(counts, cfg.vocabulary(TOKENS))
    draft = locate(cfg._target_).new(target, cfg, mapping, seed)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return draft


def outcome(
    target: Target, draft: Any, cfg: Any, loss: Loss, samples: list[Sample]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, sums and gradients of a window."""
    window_K = torch.stack([draft.denominators(cfg, sample) for sample in samples]).sum(0)
    total, sums = torch.zeros(()), dict[str, Tensor]()
    for sample in samples:
        value, found = draft(sample, target.head, loss, cfg, window_K)
        if value.requires_grad:
            value.backward()
        total = total + value.detach()
        sums |= {name: sums.get(name, 0) + value for name, value in found.sums.items()}
    return total, sums, gradients(draft) if torch.is_grad_enabled() else {}


def own(logits: Tensor, teacher: Any, cfg: LossConfig) -> RowLoss:
    """The terms as a user's own function."""
    return opd(logits, teacher, cfg)


@pytest.mark.parametrize("seed", range(4, 24))
def test_any_options(seed: int) -> None:
    """A window is the sum of its conversations however they are packed, also where one has nothing
    to learn or a single block; nothing depends on what follows; a mixture is what autograd makes of
    its formulas; evaluating is training without gradients."""
    draw = random.Random(seed)
    cfg = some_options(draw)
    target = small_target(TOKENS)
    target.aux_layers = locate(cfg._target_).target_layers(cfg, 8)
    draft = made(target, cfg, seed)
    loss = some_loss(draw, len(draft.draft_ids_D) == TOKENS)
    conversations = [some_conversation(draw) for _ in range(draw.choice([1, 3]))]
    together = packed(target, *conversations)
    singly = [
        replace(packed(target, each), numbers=[number])
        for each, number in zip(conversations, together.numbers, strict=True)
    ]
    result = partial(outcome, target, draft, cfg)
    value, sums, expected = result(Loss(opd, loss), [together])
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    others = {
        "apart": result(Loss(opd, loss), singly),
        "longer": result(
            Loss(opd, loss), [packed(target, *(behind(draw, each) for each in conversations))]
        ),
        "own": result(Loss(own, loss), [together]),
    }
    with torch.no_grad():
        others["evaluated"] = result(Loss(opd, loss), [together])
    for name, (other, other_sums, found) in others.items():
        torch.testing.assert_close(other, value, rtol=2e-4, atol=1e-6, msg=f"{name}: {cfg}")
        assert all(
            torch.allclose(other_sums[key].double(), each.double(), rtol=1e-4, atol=1e-4)
            for key, each in sums.items()
        ), f"{name}: {cfg}"
        for key, gradient in found.items():
            apart = float((gradient - expected[key]).abs().max())
            assert apart <= 2e-4 * largest, f"{name}: {key}: {cfg}"


@pytest.mark.parametrize("seed", [*range(4, 12), 15])
@torch.no_grad()
def test_any_export(seed: int, tmp_path: Path) -> None:
    """What is read back, of either layout, computes and drafts the same."""
    draw = random.Random(seed)
    cfg = some_options(draw)
    target = small_target(TOKENS)
    target.aux_layers = locate(cfg._target_).target_layers(cfg, 8)
    draft = made(target, cfg, seed).eval()
    drafted = {"sglang": [], "speculators": [2]}[draw.choice(cfg.formats)]
    draft.write(tmp_path, target, TINY.path, torch.float32, *drafted)
    loaded = type(draft).load(tmp_path, target).eval()
    ids_1T = torch.tensor([[draw.randrange(TOKENS) for _ in range(20)]])
    aux_1TA, _ = target.features(ids_1T)
    ours, theirs = (each.all_logits(cfg, ids_1T, aux_1TA) for each in (draft, loaded))
    assert ours.equal(theirs)
    decoding, prompt = Decoding(9, draw.randint(1, cfg.chain_length(None))), ids_1T[0, :8].tolist()
    said, again = (
        speculate(target, each.decoder(), each.draft_ids_D, prompt, decoding)
        for each in (draft, loaded)
    )
    assert (said.tokens, said.gained, said.read) == (again.tokens, again.gained, again.read)
    assert said.tokens == generate(target, prompt, decoding).tokens
