"""What on-policy training will make the target read, before it does."""

import numpy as np

from specforge_exp.config import Config
from specforge_exp.data.tokens import TokenSet
from specforge_exp.onpolicy.rollout import conversations_of
from specforge_exp.training.loop import total_steps


def cost_lines(cfg: Config, tokens: TokenSet) -> list[str]:
    """What onpolicy.dry_run prints: bounds, of the conversations' lengths alone."""
    own, total, lengths = cfg.onpolicy, total_steps(cfg, tokens), tokens.lengths
    steps = own.length or cfg.draft.replay_length
    replayed = range(own.start, total)
    passes = len(replayed) * cfg.trainer.batch_size * cfg.trainer.accumulate / len(tokens)
    passes = min(passes, float(cfg.epochs))
    most = np.minimum(own.anchors, (own.budget * lengths).astype(int) // max(1, steps - 1))
    read, judged = passes * lengths.sum(), passes * most.sum() * (steps - 1)
    lines = [
        f"onpolicy={own.name}: in {len(replayed)} of {total} steps the target reads {read:,.0f} "
        f"tokens of conversations, and at most {judged:,.0f} proposed ones "
        f"({1 + judged / max(1, read):.2f} times as many as without)"
    ]
    if own.rolls:
        rounds = replayed[:: own.sync_every]
        answers = [number for first in rounds for number in conversations_of(cfg, tokens, first)]
        longest = own.max_tokens or cfg.max_length
        lines.append(
            f"{len(rounds)} rounds, {len(answers):,} conversations answered one at a time: at most "
            f"{len(answers) * longest:,} tokens for answers of {longest}, in at least "
            f"{-(-len(answers) * longest // (steps + 1)):,} verifications of {steps + 1} tokens "
            f"(accepted length {steps + 1}), {steps + 1} times as many at accepted length 1"
        )
    return lines
