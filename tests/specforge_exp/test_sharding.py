"""Weights that stand at two places, weights without numbers, and a model that is dealt."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from specforge_exp.sharding import (
    as_in,
    gradient_of,
    is_sharded,
    save_shared_once,
    shard_draft,
    whole,
    without_numbers,
)

CPU = torch.device("cpu")


class Tied(nn.Module):
    """Embeddings that are the head too, and two layers, of which one is for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("ids", torch.arange(3))

    def forward(self, ids_T: Tensor) -> Tensor:
        state_TH = self.layer(self.embed(ids_T))
        self.unused(state_TH)
        logits_TV: Tensor = self.head(state_TH)
        return logits_TV


def tied(seed: int) -> Tied:
    torch.manual_seed(seed)
    return Tied()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_stands_twice_is_saved_once() -> None:
    first, other = tied(0), tied(1)
    for model in (first, other):
        save_shared_once(model)
    state = first.state_dict()
    layers = {f"{name}.{part}" for name in ("layer", "unused") for part in ("weight", "bias")}
    assert set(state) == {"embed.weight", "ids", *layers}
    assert "m.head.weight" not in nn.ModuleDict({"m": first}).state_dict()
    other.load_state_dict(state)
    assert torch.equal(other.head.weight, first.embed.weight)
    assert other.head.weight is other.embed.weight
    del state["layer.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layer.weight"'):
        other.load_state_dict(state)


def test_modules_without_numbers_still_share() -> None:
    with without_numbers():
        model = Tied()
    assert all(weight.is_meta for weight in model.parameters())
    assert model.head.weight is model.embed.weight and len(list(model.parameters())) == 5
    assert model.ids.tolist() == [0, 1, 2]
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.usefixtures("alone")
def test_a_dealt_model_is_the_same() -> None:
    """Values, gradients and what is shared; a unit's weights have gradients, used or not."""
    ids_T = torch.tensor([1, 5, 2])
    plain, model = tied(0), tied(0)
    shard_draft(model, [model.layer, model.unused], CPU, 1)
    assert model.head.weight is model.embed.weight
    assert is_sharded(model) and is_sharded(model.layer) and not is_sharded(plain)
    for each in (plain, model):
        each(ids_T).square().sum().backward()
    assert model.head.weight is model.embed.weight
    for (name, weight), own in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert isinstance(own, DTensor)
        assert torch.equal(whole(own), weight.detach())
        assert not whole(own).requires_grad
        if weight.grad is not None:
            torch.testing.assert_close(whole(own.grad), weight.grad, msg=name)
    value = torch.rand(6, 4)
    assert as_in(plain.embed.weight, value) is value
    assert torch.equal(whole(as_in(model.embed.weight, value)), value)
    assert model.unused.weight.grad is not None and plain.unused.weight.grad is None
    assert torch.equal(whole(model.unused.weight.grad), torch.zeros(4, 4))
    assert torch.equal(gradient_of(plain.unused.weight), torch.zeros(4, 4))
    assert gradient_of(plain.unused.weight) is plain.unused.weight.grad
