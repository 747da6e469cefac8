"""Whether the kernels compute on this device what the plain formulas compute.

Shape suffixes: R rows, T positions, M key-value heads, E head size, X heads * E, N rows of a loss,
P positions that teach it, D draft vocabulary.
"""

import logging
from importlib.util import find_spec

import torch
from torch import Tensor

from specforge_exp.drafts.chain_attention import LayerStep, OwnKeys, chain_attention, visible
from specforge_exp.drafts.kernels import USED
from specforge_exp.losses import TERMS as OF_OPD
from specforge_exp.losses import TeacherRows, opd_closed

log = logging.getLogger(__name__)
LENGTHS = [70, 1, 45]
"""Of the documents of the trial."""
STEPS = 3
D, HEAT = 5000, 1.5
"""Of the losses of the trial."""
TERMS = ("kl", *(name for name, _ in OF_OPD.values()))
"""All that `opd_closed` has."""
AttentionHeads = tuple[int, int, int]
"""Key-value heads, query heads of each of them, and the size of a head."""
TRIED: dict[tuple[str, AttentionHeads | None], str | None] = {}
"""By type of device and heads what `unusable` said."""


def use_kernels(device: torch.device, heads: AttentionHeads | None) -> None:
    """Let steps on this device be by kernels, if they are right here; otherwise the log says why
    they are by plain products. On a CPU they always are.

    Args:
        device: where the steps will be.
        heads: of the draft, whose size says how much of a GPU's shared memory it takes; None: its
            attention is by no kernels.
    """
    if device.type == "cpu":
        return
    USED.discard(device.type)
    if (device.type, heads) not in TRIED:
        log.info("attention and loss: Triton's kernels are compiled, the first time, and tried")
        TRIED[device.type, heads] = unusable(device, heads)
    if reason := TRIED[device.type, heads]:
        log.warning("attention and loss by plain products, without Triton's kernels: %s", reason)
    else:
        USED.add(device.type)


def unusable(device: torch.device, heads: AttentionHeads | None) -> str | None:
    """Why the kernels cannot be used on a device; None: they gave the right numbers."""
    if find_spec("triton") is None:
        return "Triton is not installed"

    def attended() -> dict[str, Tensor]:
        return attention_trial(device, torch.bfloat16, heads) if heads else {}

    plain = attended(), loss_trial(device)
    USED.add(device.type)
    try:
        first = difference(plain[0], attended(), 0.03)
        return first or difference(plain[1], loss_trial(device), 1e-4)
    except Exception as error:  # whatever a compiler or a driver says
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    finally:
        USED.discard(device.type)


def difference(plain: dict[str, Tensor], found: dict[str, Tensor], rel: float) -> str | None:
    """Which numbers are further from the plain ones than this share of the largest."""
    for name, expected in plain.items():
        error = (found[name].double() - expected.double()).abs().max()
        if not error <= rel * expected.double().abs().max():  # NaN is not either
            return f"{name} is wrong by {float(error):.2g}"
    return None


def loss_trial(device: torch.device) -> dict[str, Tensor]:
    """Every term of a loss by itself and all of them together, with the gradient of the logits."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    N, P = 5, 3
    logits_ND, known_PD = random(N, D), random(P, D)
    at_N, next_N = (torch.arange(N, device=device) % limit for limit in (P, D))
    log_z_P, log_mass_P = torch.logsumexp(known_PD / HEAT, -1), -random(P).abs()
    weights = {name: random(N).abs() for name in TERMS}
    found: dict[str, Tensor] = {}
    for names in (*((name,) for name in TERMS), TERMS):
        chosen, gradient_ND = {name: weights[name] for name in names}, logits_ND.clone()
        if device.type in USED:
            from specforge_exp.drafts.kernels.losses import Known, opd_rows

            known = Known(known_PD, at_N, log_z_P[at_N], log_mass_P[at_N], HEAT, next_N)
            values = opd_rows(gradient_ND, known, chosen)
        else:
            logp_ND = (known_PD / HEAT - log_z_P[:, None])[at_N]
            teacher = TeacherRows(logp_ND, log_mass_P[at_N], next_N)
            values = opd_closed(gradient_ND, teacher, chosen)
        label = f"the loss of {' and '.join(names)}"
        found |= {f"{label}: {name}": value for name, value in values.items()}
        found[f"{label}: its gradient"] = gradient_ND
    return found


def attention_trial(
    device: torch.device, dtype: torch.dtype, heads: AttentionHeads
) -> dict[str, Tensor]:
    """Three steps of attention over packed documents, and their gradients."""
    generator, (M, G, E) = torch.Generator().manual_seed(0), heads

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) / 2
        return drawn.to(device, dtype).requires_grad_()

    T = sum(LENGTHS)
    start_T = torch.cat([torch.full((n,), sum(LENGTHS[:i])) for i, n in enumerate(LENGTHS)])
    slot_R = torch.randperm(T, generator=generator)[: T // 2]
    R = len(slot_R)
    kv_2TME = random(2, T, M, E)
    halves = [random(R, (M * G + 2 * M * (step > 0)) * E) for step in range(STEPS)]
    outer = [random(R, M * G * E).detach() for _ in range(STEPS)]
    turn_RE = torch.rand(R, E // 2, generator=generator).repeat(1, 2).to(device)
    one_RF, other_RF = turn_RE.sin().chunk(2, 1)
    angles = turn_RE.cos(), torch.cat([-one_RF, other_RF], 1)
    own = OwnKeys(kv_2TME.new_empty(2, STEPS - 1, R, M, E).detach())
    before, found = None, {}
    total = torch.zeros((), device=device)
    for step, half_RX in enumerate(halves):
        seen = visible(slot_R, start_T[slot_R], kv_2TME[0], None if step < 2 else slot_R - 9)
        numbers = iter([part.to(device) for part in seen.numbers])
        turn = LayerStep(seen.there(numbers, torch.arange(T, device=device)), angles, own, step)
        out_RX, before = chain_attention(turn, kv_2TME, half_RX, None, before)
        found[f"the output of step {step}"] = out_RX.detach()
        total = total + (out_RX.float() * outer[step]).sum()
    total.backward()
    gradients = {"the gradient of the shared keys": kv_2TME.grad}
    gradients |= {f"the gradient of step {step}": half.grad for step, half in enumerate(halves)}
    return found | {name: grad for name, grad in gradients.items() if grad is not None}
