"""docs/targets.md: every family tried from its states to lossless decoding.

`python tests/specforge_exp/target_matrix.py > docs/targets.md`; test_target_matrix.py asserts what
it says.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from exported import dflash_logits, eagle3_logits
from families import FAMILIES, VOCABULARY, save, tokens
from torch import Tensor

from specforge_exp.bench.speculative import Decoding, generate, speculate
from specforge_exp.config import DraftConfig, LossConfig, ModelConfig
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.engines import serving
from specforge_exp.drafts.teacher import make_teacher
from specforge_exp.drafts.vocabulary import vocabulary_mapping
from specforge_exp.errors import InputError
from specforge_exp.losses import Loss, opd
from specforge_exp.target import Target, check_decoding, load_target
from specforge_exp.training.objective import Sample

LENGTH, PROMPT, NEW = 48, 24, 16
EAGLE3 = Eagle3Config(name="eagle3", draft_vocab_size=200, ttt_length=3)
DFLASH = DFlashConfig(
    name="dflash", start="target", block_size=4, num_layers=2, num_features=3, num_anchors=16,
    min_loss_tokens=4,
)  # fmt: skip
MAPPING = vocabulary_mapping(torch.arange(VOCABULARY).flip(0), 200)
LOSS = Loss(opd, LossConfig(name="m", lambda_ce=0.5, lambda_rkl=0.5))
COLUMNS = ["states", "logits", "EAGLE-3", "DFlash"]


def load(folder: Path, kind: Any, draft: DraftConfig) -> Target:
    """The target as train loads it for this draft."""
    model = ModelConfig(name="t", path=str(folder))
    feeds = partial(kind.target_layers, draft)
    return load_target(model, torch.device("cpu"), "float32", feeds=feeds)


@torch.no_grad()
def states(folder: Path) -> None:
    """What feeds a draft is what plain transformers calls hidden_states."""
    target = load(folder, Eagle3, EAGLE3)
    ids_1T = tokens(LENGTH)[None]
    plain = target.model(ids_1T, output_hidden_states=True)
    plain = plain.hidden_states
    aux_1TA, last_1TH = target.features(ids_1T)
    expected = torch.cat([plain[layer + 1] for layer in target.aux_layers], -1)
    torch.testing.assert_close(aux_1TA, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_1TH, plain[-1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def logits(folder: Path) -> None:
    """Teacher and bench have the distribution that plain transformers has."""
    target = load(folder, Eagle3, EAGLE3)
    ids_1T = tokens(LENGTH)[None]
    own_TV = target.model(ids_1T).logits[0].float()
    _, last_1TH = target.features(ids_1T)
    torch.testing.assert_close(target.head(last_1TH[0]), own_TV, rtol=1e-4, atol=1e-4)
    teacher = make_teacher(target.head, last_1TH[0], torch.arange(VOCABULARY))
    rows = teacher.plain_rows(torch.arange(LENGTH))
    logp_TV = next(v for v in vars(rows).values() if isinstance(v, Tensor) and v.dim() == 2)
    torch.testing.assert_close(logp_TV, own_TV.log_softmax(-1), rtol=1e-4, atol=1e-4)


def trained(target: Target, kind: Any, cfg: DraftConfig) -> Any:
    """A draft after four steps on one conversation; its loss fell."""
    ids_T, turns_T = tokens(LENGTH), torch.ones(LENGTH, dtype=torch.long)
    turns_T[:8] = 0
    aux_1TA, last_1TH = target.features(ids_T[None])
    sample = Sample(ids_T, turns_T, [0], [LENGTH], 0, aux_1TA[0], last_1TH[0])
    draft = kind.new(target, cfg, MAPPING, 0)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        window_K = draft.denominators(cfg, sample)
        loss = draft.objective(sample, target.head, LOSS, cfg, window_K).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    assert losses[-1] < losses[0] < float("inf"), losses
    return draft


@torch.no_grad()
def served(target: Target, draft: Any, folder: Path, ids_T: Tensor, aux_1TA: Tensor) -> None:
    """config.json and the tensors alone give the logits that our own decoder drafts from."""
    decoder = draft.decoder()
    decoder.commit(aux_1TA[:, : LENGTH - 1], ids_T[1:].tolist())
    _, drafted = decoder.propose(3, lambda logits: int(logits.argmax()))
    aux_SA = aux_1TA[0, : LENGTH - 1]
    if isinstance(draft, Eagle3):
        engine = eagle3_logits(folder, target.embed_VH, ids_T[1:], aux_SA)[None]
        drafted = drafted[:1]
    else:
        ends = target.embed_VH, target.head_weight_VH
        engine = dflash_logits(folder, ends, int(ids_T[-1]), aux_SA)
    torch.testing.assert_close(torch.stack(drafted), engine, rtol=2e-4, atol=2e-4)


def pipeline(kind: Any, cfg: DraftConfig, folder: Path) -> None:
    """Train, export, reload, compare; decoded answers are those of plain transformers."""
    target = load(folder, kind, cfg)
    check_decoding(target)
    draft = trained(target, kind, cfg)
    export = folder / f"export-{cfg.name}"
    export.mkdir(exist_ok=True)
    draft.write(export, target, str(folder), torch.float32)
    loaded = kind.load(export, target)
    ids_T = tokens(LENGTH)
    aux_1TA, _ = target.features(ids_T[None])
    assert torch.equal(
        draft.all_logits(cfg, ids_T[None], aux_1TA), loaded.all_logits(cfg, ids_T[None], aux_1TA)
    )
    served(target, loaded, export, ids_T, aux_1TA)
    prompt, decoding = ids_T[:PROMPT].tolist(), Decoding(NEW, 3)
    plain = target.model.generate(
        ids_T[None, :PROMPT], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, PROMPT:].tolist()  # fmt: skip
    assert generate(target, prompt, decoding).tokens == plain
    drafted = speculate(target, loaded.decoder(), loaded.draft_ids_D, prompt, decoding)
    assert drafted.tokens == plain


CHECKS: dict[str, Callable[[Path], None]] = {
    "states": states,
    "logits": logits,
    "EAGLE-3": partial(pipeline, Eagle3, EAGLE3),
    "DFlash": partial(pipeline, DFlash, DFLASH),
}


def engines_for(folder: Path) -> str:
    """Who serves EAGLE-3 and DFlash drafts of this target."""
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    by = {name: serving(name, architecture) for name in ("eagle3", "dflash")}
    cells = []
    for engine in dict.fromkeys(engine for names in by.values() for engine in names):
        lacking = [other for name, other in (("eagle3", "DFlash"), ("dflash", "EAGLE-3"))
                   if engine not in by[name]]  # fmt: skip
        cells.append(engine + "".join(f" ({name} alone)" for name in lacking))
    return ", ".join(cells) or "neither"


def examine(check: str, folder: Path) -> str:
    """ "yes", or why the family is refused; anything else is an error."""
    try:
        CHECKS[check](folder)
    except InputError as error:
        return str(error)
    return "yes"


HEADING = """# Targets

Every family below was tried with a small random model of transformers' own configuration class: 8
layers, width 64. Made by `python tests/specforge_exp/target_matrix.py > docs/targets.md`; the same
checks are tests (`tests/specforge_exp/test_target_matrix.py`). Real weights are not part of it.

- **states**: what feeds a draft equals plain transformers' `hidden_states`.
- **logits**: the distribution that a draft is trained against and that bench samples from equals
  `model(ids).logits`, with all that belongs to the head (scale, soft cap, bias). Granite's four
  multipliers and Cohere's scale are not 1 here, and a fresh EAGLE-3 head has the scale in it.
- **EAGLE-3**, **DFlash**: train, export, reload with equal logits; formulas that read the exported
  folder alone give the decoder's logits; answers decoded with the draft are those of `generate`.
- **served by**: the engines that hand this target's states to a draft, by their sources
  (`specforge_exp/drafts/engines.json`); train and regen warn where none does. vLLM's
  `--model-impl=transformers` may serve others. P-EAGLE and DSpark go with vLLM's,
  `draft=standalone` with any target.

A draft rotates whole heads by the target's embedding for layers that see everything; one that
changes with the length (dynamic, longrope) becomes the plain one, and `max_length` may not pass the
length (nor bench's own `bench.max_length`) where the target's changes. A config.json, also of
another maker's draft, whose `rope_scaling` and `rope_parameters` are two different embeddings is
refused with both: every reader takes one of them. Where layers differ in the size of their heads,
the draft has that of most. Its token embeddings are the target's weights, as engines hand them to a
draft: not multiplied by what a family scales them with. Quantised targets: FP8 and MXFP4 load
everywhere and are unpacked where nothing runs them as they are (without a GPU; MXFP4 also without
its kernels), but for FP8 whose blocks its weights do not fill; GPTQ, AWQ, compressed-tensors,
bitsandbytes and torchao are refused with the name of their package where it is not installed.
Written by bitsandbytes 0.50 (8 and 4 bits) and as compressed-tensors' 4 bits they gave the logits
that they stand for; the others were not tried with their package. Scales that transformers does not
read (NVIDIA's Model Optimizer, FP8 as vLLM writes it) are refused, and quantised weights are not
trained. The head must be plain numbers, and the embeddings where config.json says so. An adapter
(LoRA) has to be merged first, and its adapter_config.json removed. A model that needs its own
Python code is refused: `trust_remote_code` stays off.

Rejected tokens are taken out of keys and values. A layer that keeps a state instead (linear
attention, convolutions) or an index goes back to a copy from before the verification, and what was
accepted is read once more with the next tokens: what is said and τ are exact, bench's seconds are
longer than those of an engine that keeps the state of every token. `onpolicy=` judges many
proposals in one forward, which such layers cannot.

`draft.start=target` copies of the last layer what a draft has too: projections, and norms that
multiply as an RMS norm does (by w or 1 + w). Queries and keys of targets that norm or rotate heads
otherwise, biases, experts, fused projections, and norms that stand behind a part or subtract the
mean are not copied; train names them.

"""


def main() -> None:
    """Print the page."""
    print(HEADING, end="")
    print("| family | " + " | ".join(CHECKS) + " | served by |")
    print("|---" * (len(CHECKS) + 2) + "|")
    notes: dict[str, str] = {}
    for family, config in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = save(config(), Path(folder))
            cells = []
            for check in CHECKS:
                answer = examine(check, path)
                if answer != "yes":
                    notes[family], answer = answer.replace(folder, "<folder>"), "refused"
                cells.append(answer)
            cells.append(engines_for(path))
        print(f"| {family} | " + " | ".join(cells) + " |", flush=True)
    print("\nRefused, in the words of train and bench:\n")
    for family, reason in notes.items():
        print(f"- {family}: {reason}", flush=True)
    templates = Path(__file__).with_name("chat_templates.py")
    if templates.exists():
        print("\n## Chat templates\n", flush=True)
        subprocess.run([sys.executable, str(templates)], check=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
