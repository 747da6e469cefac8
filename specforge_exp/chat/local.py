"""Answers by the target in this process, with its draft or alone: the decoder of bench."""

from collections.abc import Generator
from pathlib import Path

import torch

from specforge_exp.bench.asking import begin_of, heading_of
from specforge_exp.bench.in_process import load_pair
from specforge_exp.bench.speculative import Decoding, generating, speculating
from specforge_exp.chat.dialogue import Dialogue, Piece, Spoken
from specforge_exp.config import Config
from specforge_exp.data.messages import Unrenderable
from specforge_exp.data.rendering import Spelling, eos_token_ids, prompt_ids
from specforge_exp.errors import InputError, first_line
from specforge_exp.target import Past, load_tokenizer


class LocalModel:
    """The target, with the draft exported to a folder, or alone.

    What the target has read stays between two answers, as far as the next prompt begins with it.
    """

    def __init__(self, cfg: Config, draft: Path | None) -> None:
        self.cfg, self.tokenizer = cfg, load_tokenizer(cfg.model)
        self.target, self.draft = load_pair(cfg, draft, cfg.model.dtype)
        self.eos = frozenset(eos_token_ids(cfg.model.path, self.tokenizer))
        self.random = torch.Generator().manual_seed(cfg.seed)
        self.heading = heading_of(self.tokenizer, cfg.model.chat_template_kwargs)
        self.past: Past | None = None

    def answer(self, dialogue: Dialogue) -> Generator[Spoken]:
        """As `Answering`."""
        prompt, own = self.prompt(dialogue), dialogue.settings
        room = self.cfg.max_length - len(prompt)
        if room < 1:
            raise InputError(
                f"the conversation has {len(prompt)} tokens, and max_length={self.cfg.max_length} "
                "leaves none for an answer: /reset, or begin with a larger max_length"
            )
        most = min(own.max_tokens, room)
        chain = self.cfg.chain_length
        decoding = Decoding(most, chain, own.temperature, self.eos, own.top_p)
        past, self.past = self.past or Past(self.target), None
        if self.draft is None:
            answers = generating(past, prompt, decoding, self.random)
        else:
            decoder, ids_D = self.draft.decoder(), self.draft.draft_ids_D
            answers = speculating(past, decoder, ids_D, prompt, decoding, self.random)
        spoken, spelling, ends = Spoken(), Spelling(self.tokenizer), [0]
        try:
            for answer in answers:
                self.past = past  # whole while nothing is being read
                kept = answer.accepted[-1] if answer.accepted else 0
                for place, token in enumerate(answer.tokens[spoken.tokens :]):
                    if text := spelling.add(token):
                        spoken.pieces.append(Piece(text, "drafted" if place < kept else "own"))
                    ends.append(len(spoken.pieces))
                before = ends[begin_of(answer.tokens, self.heading, self.tokenizer)]
                spoken.pieces[:before] = [Piece(p.text, "thought") for p in spoken.pieces[:before]]
                spoken.tokens, spoken.gained = len(answer.tokens), answer.gained
                spoken.seconds, spoken.first_seconds = answer.seconds, answer.first_seconds
                yield spoken
                self.past = None
        except torch.OutOfMemoryError as error:
            raise InputError(f"out of memory ({first_line(error)}): /reset, and go on") from None
        self.past = past
        spoken.pieces.append(Piece(spelling.rest()))
        if spelling.tokens[-1] not in self.eos:
            limit = f"max_length={self.cfg.max_length}" if most == room else f"{most} tokens"
            spoken.end = f"cut at {limit}"
        yield spoken

    def prompt(self, dialogue: Dialogue) -> list[int]:
        """Token ids of the conversation and the header of an answer; InputError."""
        try:
            kwargs = self.cfg.model.chat_template_kwargs
            return prompt_ids(self.tokenizer, dialogue.whole, kwargs)
        except Unrenderable as error:
            raise InputError(" ".join(str(error).split())) from None
