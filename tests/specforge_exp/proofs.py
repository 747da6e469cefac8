"""What every kind of draft is held to."""

import json
import shutil
from typing import Any

import torch
from scipy.stats import chisquare
from torch import Tensor

from specforge_exp import paths
from specforge_exp.bench.speculative import Decoding, speculate
from specforge_exp.config import Config
from specforge_exp.stages.train import train
from specforge_exp.target import Target
from specforge_exp.training.objective import Sample


class Forced:
    """Proposes given tokens."""

    def __init__(self, tokens_KR: Tensor) -> None:
        self.tokens_KR = tokens_KR

    def propose(self, sample: Sample, anchor_R: Tensor, steps: int, choose: Any) -> Any:
        return self.tokens_KR, 0.0


class Partly:
    """Proposes the text, of every chain as far as another token."""

    def propose(self, sample: Sample, anchor_R: Tensor, steps: int, choose: Any) -> Any:
        at_K1, wrong_R = torch.arange(steps)[:, None], torch.arange(len(anchor_R)) * 2 % (steps + 1)
        text_KR = sample.ids_T[(anchor_R + 1 + at_K1).clamp(max=len(sample.ids_T) - 1)]
        return (text_KR + (at_K1 == wrong_R)) % 4, 0.0


def second_token_pvalue(target: Target, draft: Any, runs: int, **options: Any) -> float:
    """Chi-square of the second token of many sampled answers, the first that a verification made,
    against the target's distribution after the most frequent first one."""
    generator, size = torch.Generator().manual_seed(1), len(target.embed_VH)
    decoding = Decoding(max_tokens=2, chain_length=3, temperature=1.0, **options)
    prompt, counts_VV = [3, 17, 40, 8], torch.zeros(size, size)
    for _ in range(runs):
        first, second = speculate(
            target, draft.decoder(), draft.draft_ids_D, prompt, decoding, generator
        ).tokens
        counts_VV[first, second] += 1
    first = int(counts_VV.sum(1).argmax())
    _, last_1TH = target.features(torch.tensor([[*prompt, first]]))
    p_V = torch.softmax(target.head(last_1TH[0, -1:])[0].double(), -1)
    seen_V, total = counts_VV[first].double(), counts_VV[first].sum().double()
    large_V = p_V * total >= 5
    observed = torch.cat([seen_V[large_V], seen_V[~large_V].sum()[None]])
    expected = torch.cat([p_V[large_V], p_V[~large_V].sum()[None]]) * total
    keep = expected > 0
    return float(chisquare(observed[keep].numpy(), expected[keep].numpy()).pvalue)


def losses_of_two_starts(cfg: Config) -> list[list[float | None]]:
    """Of a training of three steps, and of one that goes on after its last step is lost."""
    train(cfg)
    folder = paths.run_dir(cfg)
    texts = [(folder / "metrics.jsonl").read_text()]
    (folder / "run.json").unlink()
    before, last = sorted(folder.glob("step-*"))[-2:]
    assert (before.name, last.name) == ("step-000002", "step-000003")
    shutil.rmtree(last)
    train(cfg)
    texts.append((folder / "metrics.jsonl").read_text())
    return [[json.loads(line).get("loss") for line in text.splitlines()] for text in texts]
