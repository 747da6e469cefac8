"""A third draft: all that it takes is this folder and conf/draft/toy.yaml.

Independent heads guess the next tokens from one state of the target and the token after it.

Shape suffixes: T tokens, A auxiliary states, H hidden, S slots, K steps, R rows, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from specforge_exp.drafts.draft import Draft
from specforge_exp.drafts.eagle3.chains import turn_masks
from specforge_exp.drafts.folder import read_export, write_export
from specforge_exp.drafts.head_loss import Heads, head_and_loss
from specforge_exp.drafts.layers import RMSNorm
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.drafts.weighting import weighted
from toy_draft.config import ToyConfig


class Toy(Draft[ToyConfig]):
    def __init__(self, target, heads):
        super().__init__()
        H = target.embed_VH.shape[1]
        self.mix, self.norm = nn.Linear(2 * H, heads * H, bias=False), RMSNorm(H, 1e-6)
        self.embed_VH, self.head_VH = target.embed_VH, target.head_weight_VH
        self.draft_ids_D, self.heads = torch.arange(len(self.head_VH)), heads

    @classmethod
    def new(cls, target, cfg, mapping, seed):
        torch.manual_seed(seed)
        return cls(target, cfg.heads)

    @staticmethod
    def target_layers(cfg, layers):
        return [layers - 2]

    @classmethod
    def load(cls, folder, target):
        config, tensors = read_export(folder, ["heads"])
        return cls.restored(target, ToyConfig(heads=config["heads"]), tensors)

    def write(self, folder, target, target_path, dtype):
        write_export(folder, {"heads": self.heads}, self.state_dict(), dtype)

    def states(self, next_T, aux_TA):
        both = torch.cat([aux_TA, F.embedding(next_T, self.embed_VH)], -1)
        return list(self.mix(both).chunk(self.heads, -1))

    def chains(self, cfg, batch):
        start_T, end_T = document_bounds(batch.lengths, batch.turns_T.device)
        slot_R, masks = (
            torch.arange(len(end_T)),
            turn_masks("inference", batch.turns_T, end_T, cfg.steps),
        )
        return Chains(start_T, end_T, batch.lengths, slot_R, [len(end_T)] * cfg.steps, masks)

    def denominators(self, cfg, batch):
        return torch.stack([mask.sum() for mask in self.chains(cfg, batch).supervised]).double()

    def objective(self, sample, target_head, loss, cfg, window_K):
        next_T = sample.ids_T.roll(-1)
        heads = Heads(
            self.norm, self.head_VH, self.draft_ids_D, target_head, sample.last_TH, next_T
        )
        weights = weighted(loss, (1 / window_K.clamp(min=1)).float(), torch.ones(cfg.steps))
        states = self.states(next_T, sample.aux_TA)
        return head_and_loss(self.chains(cfg, sample), states, heads, weights)

    def all_logits(self, cfg, ids_1T, aux_1TA):
        states = torch.stack(self.states(ids_1T[0].roll(-1), aux_1TA[0]))
        return F.linear(self.norm(states), self.head_VH).float()

    def decoder(self):
        return ToyDecoder(self)


class ToyDecoder:
    def __init__(self, draft):
        self.draft = draft

    def commit(self, aux_1SA, next_tokens):
        self.aux_1A, self.last = aux_1SA[0, -1:], next_tokens[-1]

    def propose(self, length, choose):
        states = self.draft.states(torch.tensor([self.last]), self.aux_1A)[:length]
        logits = [F.linear(self.draft.norm(x[0]), self.draft.head_VH).float() for x in states]
        return [choose(logits_V) for logits_V in logits], logits
