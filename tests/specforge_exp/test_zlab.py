"""A DFlash export in z-lab's own code, the package dflash 0.1.0: it decodes what we export, counts
as docs/bench.md says, and words its prompts as our suite does."""

import importlib
import json
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import test_dflash
import torch
from conftest import make_config
from test_bench_served import figures
from test_bench_sets import composed
from test_dflash_pipeline import DRAFT
from test_eagle3 import conversation
from transformers import AutoConfig, AutoModelForCausalLM
from wheels import wheel

from specforge_exp import paths
from specforge_exp.bench.asking import asking_of
from specforge_exp.bench.sets import SHIPPED, bench_sets
from specforge_exp.config import Config, Source
from specforge_exp.data.conversations import asks_of
from specforge_exp.data.sources import load
from specforge_exp.stages.bench import bench
from specforge_exp.stages.export import export
from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import train
from specforge_exp.target import Target, load_tokenizer

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Zlab:
    """Modules of the package."""

    model: Any
    benchmark: Any


@pytest.fixture(scope="module")
def zlab() -> Iterator[Zlab]:
    """Imported out of its wheel, which is pure Python."""
    sys.path.insert(0, str(wheel("dflash==0.1.0")))
    yield Zlab(*(importlib.import_module(f"dflash.{name}") for name in ("model", "benchmark")))
    sys.path.pop(0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A draft whose blocks are right now and then, measured by bench."""
    cfg = make_config(tmp_path_factory.mktemp("dflash"))
    cfg.data.train[0] = Source(path="synthetic:train/stories", limit=80)
    cfg.preprocess.source, cfg.target.cache, cfg.export.dtype = "prep", "memory", "float32"
    cfg.draft = replace(DRAFT, start="target", num_anchors=16)
    cfg.epochs, cfg.lr, cfg.trainer.batch_size = 4, 6e-3, 4
    stories = Source(path="synthetic:bench/stories", limit=4)
    cfg.bench = replace(
        cfg.bench, chain_length=5, max_tokens=160, bootstrap=50, datasets={"stories": stories}
    )
    for stage in (prep, preprocess, train, export, bench):
        stage(cfg)
    return cfg


def test_the_export_in_its_own_code(
    exported: Config, zlab: Zlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key missing or left over, lossless, and tau of each prompt as bench has it: its figure is
    ours by conversations, and by responses ours is higher. Answers end by themselves: before
    max_tokens z-lab's last block is shorter, and its slots see one another."""
    monkeypatch.setattr(zlab.model, "_cuda_time", lambda: 0.0)
    options: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": torch.float32}
    target = AutoModelForCausalLM.from_pretrained(exported.model.path, **options).eval()
    folder = paths.export_dir(exported)
    assert AutoConfig.from_pretrained(folder).architectures == ["DFlashDraftModel"]
    draft, report = zlab.model.DFlashDraftModel.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert {name: list(keys) for name, keys in report.items() if keys} == {}
    asking = asking_of(exported, load_tokenizer(exported.model), None)
    lengths = []
    for record in bench_sets(exported).records["stories"]:
        ids_1T = torch.tensor([asking.encode(asks_of(record)[0])])
        most, ends = asking.decoding.max_tokens, sorted(asking.decoding.eos)
        answer = zlab.model.dflash_generate(
            draft.eval(), target, ids_1T, most, ends, return_stats=True
        )
        alone = zlab.model.dflash_generate(draft, target, ids_1T, most, ends, block_size=1)
        assert answer.output_ids.tolist() == alone.tolist()
        assert int(answer.output_ids[0, -1]) in ends
        lengths.append(statistics.mean(answer.acceptance_lengths))
    ours = figures(exported)["stories"]
    assert lengths == pytest.approx(ours["lengths"], abs=1e-4)
    assert statistics.mean(lengths) > 1.2 and ours["lossless"]
    by_responses = replace(exported, bench=replace(exported.bench, average="responses", force=True))
    bench(by_responses)
    assert figures(by_responses)["stories"]["accepted_length"] > statistics.mean(lengths)


@pytest.mark.parametrize("full", [[], [1]])
@pytest.mark.parametrize("non_causal", [False, True])
def test_windows_in_its_own_code(
    full: list[int], non_causal: bool, zlab: Zlab, random_target: Target, tmp_path: Path
) -> None:
    """The states of a block are ours, whichever of its slots see each other."""
    windows = {"sliding_window": 6, "full_attention_indices": full}
    cfg = replace(test_dflash.CFG, **windows, sliding_window_non_causal=non_causal)
    draft = test_dflash.small_draft(random_target, cfg)
    draft.write(tmp_path, random_target, "nowhere", torch.float32)
    theirs = zlab.model.DFlashDraftModel.from_pretrained(
        tmp_path, attn_implementation="sdpa", dtype=torch.float32
    )
    ids_T, _ = conversation(4, test_dflash.LONG)
    aux_1TA, _ = random_target.features(ids_T[None, :11])
    decoder = draft.decoder()
    decoder.commit(aux_1TA, ids_T[1:12].tolist())
    block_1S = torch.full((1, cfg.block_size), draft.config.mask_token_id)
    block_1S[0, 0] = ids_T[11]
    with torch.no_grad():
        (found_SH,) = theirs.eval()(
            position_ids=torch.arange(11 + cfg.block_size)[None],
            noise_embedding=random_target.embed_VH[block_1S], target_hidden=aux_1TA,
        )  # fmt: skip
    torch.testing.assert_close(found_SH, decoder.fill(cfg.steps), rtol=1e-5, atol=1e-5)


def test_its_sets_and_wording(zlab: Zlab) -> None:
    """Five of the suite's ten, from the same place and in the same words, but Python's shuffle with
    42 chooses other prompts."""
    suite = composed("bench=zlab").bench.suite
    assert list(zlab.benchmark.DATASETS) == ["gsm8k", "math500", "humaneval", "mbpp", "mt-bench"]
    for name, theirs in zlab.benchmark.DATASETS.items():
        place = "/".join(theirs["load_args"])
        assert suite[name].path == f"hub:{place}:{theirs['load_kwargs']['split']}"
        path = SHIPPED / f"{name}.jsonl"
        records = load(replace(suite[name], path=str(path), shuffle=None), name)
        for line, record in zip(path.read_text().splitlines(), records, strict=True):
            asked = theirs["format"](json.loads(line))
            ours = [ask[-1]["content"] for ask in asks_of(record)]
            assert ours == (asked if theirs.get("multi_turn") else [asked]), name
    order = list(range(1319))
    random.Random(42).shuffle(order)
    assert zlab.benchmark._select_dataset(list(range(1319)), 128) == order[:128]
