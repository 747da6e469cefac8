"""What a training step asks of a GPU, counted without one: tensors on the meta device have shapes
and no numbers, so a step that waited for one would fail there, as it would stand still on a GPU.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen3Config

from specforge_exp.config import LossConfig
from specforge_exp.drafts import chain_attention, head_loss, layers, teacher
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.draft import DFlash
from specforge_exp.drafts.draft import Draft
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.drafts.eagle3.draft import Eagle3
from specforge_exp.drafts.kernels import USED
from specforge_exp.losses import Loss, opd
from specforge_exp.sharding import without_numbers
from specforge_exp.target import Head
from specforge_exp.training.objective import Sample

META = torch.device("meta")
H, V, D = 4096, 151936, 32000
SHAPE: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": 12288, "num_attention_heads": 32, "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": V, "max_position_embeddings": 40960,
}  # fmt: skip
"""Qwen3-8B's."""


class Launches(TorchDispatchMode):
    """Counts the operators that would start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        idle = function.is_view or function._schema.name.startswith(
            ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach")
        )
        if isinstance(first, Tensor) and first.device == META and not idle:
            self.counts[str(function)] += 1
        return result


@pytest.fixture(autouse=True)
def sizes_of_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of what is held together; and the kernels."""
    for sizes in (
        head_loss.POSITIONS, head_loss.LOGITS, head_loss.BLOCK, head_loss.TILE,
        teacher.TILE_ELEMENTS, chain_attention.BLOCK_ROWS, layers.IN_ORDER,
    ):  # fmt: skip
        monkeypatch.setitem(sizes, "meta", sizes["cuda"])
    USED.add("meta")
    yield
    USED.discard("meta")


def eagle3() -> tuple[Draft[Any], Any]:
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=1, target_hidden_size=H, draft_vocab_size=D
    )  # fmt: skip
    t2d = torch.arange(V) < D
    with without_numbers():
        no = torch.empty(V, H, device=META)
        draft = Eagle3(config, no, torch.zeros(D, dtype=torch.long), t2d)
    assert len(draft.host_ids_D) == D
    return draft.to(META), Eagle3Config(name="eagle3", ttt_length=7)


def dflash() -> tuple[Draft[Any], Any]:
    config = Qwen3Config(
        **SHAPE, num_hidden_layers=5, block_size=16, mask_token_id=0, target_layers=[1, 9, 17],
        num_target_layers=36, sample_from_anchor=False, sliding_window_non_causal=False,
        window="slot",
    )  # fmt: skip
    embed_VH = torch.empty(V, H, device=META)
    with without_numbers():
        draft = DFlash(config, embed_VH, embed_VH)
    draft.host_ids_D = torch.arange(V)
    return draft.to(META), DFlashConfig(name="dflash")


def window(draft: Draft[Any], cfg: Any, conversations: int) -> Counter[str]:
    """Launches of one window: conversations of 2048 tokens, half of each an answer."""
    draft.compute_dtype = torch.bfloat16
    turns_T = (torch.arange(2048) >= 1024).long().repeat(conversations)
    T = len(turns_T)
    wide = draft.fc.weight.shape[1]
    states = (torch.empty(T, size, device=META, dtype=torch.bfloat16) for size in (wide, H))
    ids_T = torch.empty(T, device=META, dtype=torch.long)
    numbers, lengths = list(range(conversations)), [2048] * conversations
    sample = Sample(ids_T, turns_T, numbers, lengths, 0, *states)
    head = Head(torch.empty(V, H, device=META, dtype=torch.bfloat16))
    loss = Loss(opd, LossConfig(name="ce", lambda_ce=1.0))
    window_K = draft.denominators(cfg, sample).to(META)
    with Launches() as launches:
        draft(sample, head, loss, cfg, window_K)[1].loss.backward()
    return launches.counts


@pytest.mark.parametrize(("conversations", "most"), [(1, 851), (4, 1301)])
def test_a_window_of_eagle3(conversations: int, most: int) -> None:
    assert sum(window(*eagle3(), conversations).values()) <= most


def test_a_window_of_dflash() -> None:
    assert sum(window(*dflash(), 1).values()) <= 2006


def test_a_step_that_waits_is_seen() -> None:
    """The columns of the head, when the draft's ids have to be fetched first."""
    draft, cfg = eagle3()
    draft.__dict__["host_ids_D"] = None
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        window(draft, cfg, 1)


@pytest.mark.parametrize("made", [eagle3, dflash])
def test_a_weight_is_narrowed_once(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the layers' weights, or the columns that go together, becomes bfloat16 once for a
    window, not in every use."""
    draft, cfg = made()
    wide = {id(weight): name for name, weight in draft.named_parameters() if weight.dim() > 1}
    seen: Counter[str] = Counter()
    whole = layers.narrow

    def narrow(group: layers.Group, dtype: torch.dtype, copies: Any) -> Any:
        assert copies is not None
        if (group.columns.start, group.columns.stop, *map(id, group.weights)) not in copies:
            for weight in group.weights:
                seen[f"{wide[id(weight)]} {group.columns}"] += 1
        return whole(group, dtype, copies)

    monkeypatch.setattr(layers, "narrow", narrow)
    window(draft, cfg, 1)
    assert set(seen.values()) == {1} and len(seen) >= 7
    assert layers.COPIES.get() is None  # what is called between two windows reads the weights
