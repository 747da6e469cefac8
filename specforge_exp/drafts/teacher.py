"""What the draft learns from: the target's distributions at the positions that are needed.

The target's logits exist for one tile of the vocabulary at a time; what stays is the columns of
the draft's vocabulary and the log-sum-exp over all.

Shape suffixes: P positions, N rows, H hidden, D draft vocabulary, V target vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.losses import TeacherRows
from specforge_exp.target import Head

TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits of the target that exist at once; on a CPU they should stay in its cache."""


@dataclass(frozen=True)
class Teacher:
    """The target at some positions."""

    logits_PD: Tensor
    """The target's logits at the draft's tokens, fp32."""
    log_z_P: Tensor
    """Their logsumexp."""
    log_mass_P: Tensor
    """log of the target's mass on the draft's vocabulary."""
    log_z_loss_P: Tensor
    """Like log_z_P, at the loss's temperature."""
    log_mass_loss_P: Tensor
    """Like log_mass_P, at the loss's temperature."""
    best_P: Tensor
    """Draft id of the most likely token of the draft's vocabulary."""
    sayable_P: Tensor
    """Whether that is the target's most likely token of all (a tie counts)."""
    temperature: float

    def rows(self, at_N: Tensor) -> TeacherRows:
        """The comparison's distribution, at the loss's temperature."""
        logits_ND = self.logits_PD[at_N]
        if self.temperature != 1.0:
            logits_ND.div_(self.temperature)
        logits_ND.sub_(self.log_z_loss_P[at_N][:, None])
        return TeacherRows(logits_ND, self.log_mass_loss_P[at_N])

    def shared(self, at_N: Tensor, local: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """What `rows` is made of, in `kernels.losses.Known`'s order; `local`: without mass."""
        mass_N = self.log_mass_loss_P[at_N]
        mass_N = torch.zeros_like(mass_N) if local else mass_N
        return self.logits_PD, at_N, self.log_z_loss_P[at_N], mass_N, self.temperature

    def plain_rows(self, at_N: Tensor) -> TeacherRows:
        """The distribution that verification uses, at temperature 1."""
        logits_ND = self.logits_PD[at_N].sub_(self.log_z_P[at_N][:, None])
        return TeacherRows(logits_ND, self.log_mass_P[at_N])


@torch.no_grad()
def make_teacher(
    head: Head,
    states_PH: Tensor,
    draft_ids_D: Tensor,
    temperature: float = 1.0,
    host_ids_D: Tensor | None = None,
) -> Teacher:
    """One pass over the target's vocabulary.

    Args:
        head: the target's.
        states_PH: its post-norm last hidden states.
        draft_ids_D: target id of every draft id, rising.
        temperature: of the loss.
        host_ids_D: the ids on the CPU, where they are there already.
    """
    P, V, device = len(states_PH), len(head.weight_VH), states_PH.device
    states_PH = states_PH.to(head.weight_VH.dtype)
    if host_ids_D is None:
        host_ids_D = draft_ids_D.cpu()
    width = max(1, TILE_ELEMENTS[device.type] // max(1, P))
    firsts = torch.arange(0, V + width, width)
    columns = torch.searchsorted(host_ids_D, firsts).tolist()
    logits_PD = torch.empty(P, len(draft_ids_D), device=device)
    top_P = torch.full((P,), float("-inf"), device=device)
    every_P, every_loss_P = top_P.clone(), top_P.clone()
    for index, first in enumerate(range(0, V, width)):
        tile_PV = head.tile(states_PH, slice(first, first + width))
        top_P = torch.maximum(top_P, tile_PV.amax(-1))
        every_P = torch.logaddexp(every_P, torch.logsumexp(tile_PV, -1))
        if temperature != 1.0:
            scaled_P = torch.logsumexp(tile_PV / temperature, -1)
            every_loss_P = torch.logaddexp(every_loss_P, scaled_P)
        span = slice(columns[index], columns[index + 1])
        if span.start < span.stop:
            logits_PD[:, span] = tile_PV.index_select(1, draft_ids_D[span] - first)
    log_z_P = row_logsumexp(logits_PD)
    log_z_loss_P = log_z_P
    if temperature == 1.0:
        every_loss_P = every_P
    else:
        log_z_loss_P = row_logsumexp(logits_PD, temperature)
    best_P = logits_PD.argmax(-1)
    sayable_P = logits_PD.gather(1, best_P[:, None])[:, 0] >= top_P
    masses = (log_z_P - every_P, log_z_loss_P, log_z_loss_P - every_loss_P)
    return Teacher(logits_PD, log_z_P, *masses, best_P, sayable_P, temperature)


def row_logsumexp(logits_PD: Tensor, temperature: float = 1.0) -> Tensor:
    """logsumexp of logits / temperature, some rows at a time: its temporaries stay small."""
    rows = max(1, TILE_ELEMENTS[logits_PD.device.type] // logits_PD.shape[1])
    parts = [torch.logsumexp(part / temperature, -1) for part in logits_PD.split(rows)]
    return torch.cat(parts)
