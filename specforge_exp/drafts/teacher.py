"""What the draft learns from: the target's distributions at the positions that are needed.

Shape suffixes: B batch, T tokens, P needed positions, N rows, H hidden, D draft vocabulary,
V target vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.losses import TeacherRows, teacher_rows

CHUNK_ELEMENTS = 2**26
"""Logits held at once while the teacher's rows are made."""


@dataclass(frozen=True)
class Teacher:
    """Once per needed position: logits at the draft's tokens and statistics of all of them."""

    index_BT: Tensor
    """Row of each position in the tensors below, -1 where it was not needed."""
    logits_PD: Tensor
    """The target's logits at the draft's tokens."""
    log_z_P: Tensor
    """logsumexp of all logits."""
    log_z_loss_P: Tensor
    """logsumexp of all logits / temperature."""
    top_P: Tensor
    """The target's most likely token."""
    temperature: float

    def rows(self, at_N: Tensor) -> TeacherRows:
        """The comparison's distribution, at the loss's temperature."""
        return teacher_rows(self.logits_PD[at_N], self.log_z_loss_P[at_N], self.temperature)

    def plain_rows(self, at_N: Tensor) -> TeacherRows:
        """The distribution that verification uses, at temperature 1."""
        return teacher_rows(self.logits_PD[at_N], self.log_z_P[at_N])


@torch.no_grad()
def make_teacher(
    head: Callable[[Tensor], Tensor],
    last_BTH: Tensor,
    needed_BT: Tensor,
    draft_ids_D: Tensor,
    temperature: float = 1.0,
) -> Teacher:
    """Run the target's head at the needed positions, a bounded number of logits at a time.

    Args:
        head: hidden states [N, H] -> logits [N, V].
        last_BTH: the target's last hidden states, as `head` takes them.
        needed_BT: bool.
        draft_ids_D: target id of every draft id.
        temperature: of the loss.
    """
    index_BT = torch.full(needed_BT.shape, -1, device=last_BTH.device)
    states_PH = last_BTH[needed_BT]
    index_BT[needed_BT] = torch.arange(len(states_PH), device=last_BTH.device)
    vocabulary = len(head(last_BTH[:1, :1].flatten(0, 1))[0])
    identity = len(draft_ids_D) == vocabulary
    made: list[tuple[Tensor, ...]] = []
    for chunk_NH in states_PH.split(max(1, CHUNK_ELEMENTS // vocabulary)):
        logits_NV = head(chunk_NH).float()
        log_z_N = torch.logsumexp(logits_NV, -1)
        log_z_loss_N = log_z_N
        if temperature != 1.0:
            log_z_loss_N = torch.logsumexp(logits_NV / temperature, -1)
        logits_ND = logits_NV if identity else logits_NV[:, draft_ids_D]
        made.append((logits_ND, log_z_N, log_z_loss_N, logits_NV.argmax(-1)))
    logits, log_z, log_z_loss, top = (torch.cat(column) for column in zip(*made, strict=True))
    return Teacher(index_BT, logits, log_z, log_z_loss, top, temperature)
