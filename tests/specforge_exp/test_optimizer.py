"""AdamW's steps are its formula's, at the rates, betas and decay that were asked for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from specforge_exp.causal.model import Causal
from specforge_exp.causal.objective import causal_lm
from specforge_exp.config import Config, TrainerConfig
from specforge_exp.config.causal import CausalConfig
from specforge_exp.training.optimizer import make_optimizer, take_step


@pytest.mark.parametrize("decays_all", [True, False])
def test_a_step_is_its_formula(decays_all: bool) -> None:
    """Vectors keep out of the decay where the objective says so, as a causal model's does."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    objective = causal_lm(Causal(model, CausalConfig(beta2=0.8)), torch.device("cpu"))
    assert not objective.decays_all
    objective = replace(objective, decays_all=decays_all)
    optimizer = make_optimizer(Config(trainer=TrainerConfig(weight_decay=0.1)), model, objective)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    means, squares = dict.fromkeys(expected, 0.0), dict.fromkeys(expected, 0.0)
    for step, rate in enumerate([1e-2, 3e-3, 3e-3], 1):
        for name, weight in model.named_parameters():
            assert weight.grad is not None and not weight.grad.any()
            g = torch.randn_like(weight)
            weight.grad += g
            means[name] = 0.9 * means[name] + 0.1 * g.double()
            squares[name] = 0.8 * squares[name] + 0.2 * g.double() ** 2
            root = (squares[name] / (1 - 0.8**step)).sqrt() + 1e-8
            decay = 0.1 if decays_all or weight.dim() == 2 else 0.0
            expected[name] = expected[name] * (1 - rate * decay)
            expected[name] -= rate * means[name] / (1 - 0.9**step) / root
        take_step(optimizer, rate)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach().double(), expected[name], rtol=1e-6, atol=1e-7)
