"""Answers by the target in this process, by continuous batching."""

import asyncio

from specforge_exp.config import Config
from specforge_exp.data.chat import eos_token_ids, prompt_ids, readable
from specforge_exp.generation.engine import Answer, Refused, Request
from specforge_exp.generation.local.batcher import Batcher
from specforge_exp.target import load_target, load_tokenizer, set_up_torch
from specforge_exp.target.shape import turning_point


class TransformersEngine:
    """An engine over transformers; engine.concurrency conversations at a time, more wait.

    Args:
        cfg: model, engine.concurrency, device and threads are read.
        context: most tokens of a prompt and its answer; None, or more than the model has: the
            model's own, or what it rotates alike.
        cache_mb: MB for the keys and values of what was computed before.

    Raises:
        InputError: the target cannot be loaded or is of a kind that needs another engine.
    """

    def __init__(self, cfg: Config, context: int | None = None, cache_mb: int = 1024) -> None:
        target = load_target(cfg.model, set_up_torch(cfg), cfg.model.dtype)
        self.tokenizer = load_tokenizer(cfg.model)
        text = target.model.config.get_text_config()
        # Beyond it the sequences of a forward would change one another.
        most: int = turning_point(text) or text.max_position_embeddings
        self.batcher = Batcher(
            target.model,
            eos_token_ids(cfg.model.path, self.tokenizer),
            cfg.engine.concurrency,
            min(context or most, most),
            cache_mb << 20,
        )

    @property
    def servers(self) -> int:
        """This process alone."""
        return 1

    async def answer(self, request: Request) -> Answer:
        """See `generation.engine.Engine`."""
        messages = [readable(message, "in") for message in request.messages]
        ids = prompt_ids(self.tokenizer, messages, request.template_kwargs, request.tools)
        generated = await self.batcher.generate(ids, request.sampling, request.seed)
        answer_ids = generated.ids[:-1] if generated.finish_reason == "stop" else generated.ids
        added = self.tokenizer.added_tokens_decoder
        lost = [added[at].content for at in answer_ids if at in added and added[at].special]
        if lost and not request.sampling.ignore_eos:  # who goes on past an end wants it lost
            names = ", ".join(dict.fromkeys(lost))
            raise Refused(
                f"the answer holds {names}, which its text would lose; a server with a parser of "
                "this model's reasoning and tool calls reads it: engine=sglang, vllm or openai"
            )
        text = self.tokenizer.decode(answer_ids, skip_special_tokens=True)
        return Answer(
            {"role": "assistant", "content": text},
            generated.finish_reason,
            len(ids),
            len(generated.ids),
            generated.cached_tokens,
        )

    async def close(self) -> None:
        """Stop generating; the target's memory goes with this object."""
        await asyncio.to_thread(self.batcher.close)
