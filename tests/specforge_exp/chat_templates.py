"""Tokenizers of each kind with the templates of chat_shapes, and what becomes of a conversation.

python tests/specforge_exp/chat_templates.py      # the table of docs/targets.md
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any

from chat_shapes import SHAPES, Shape

WORDS = [
    "Hello you. Good to hear. Yes No maybe",
    "Once upon a time a small goat lived in the harbour.",
    "Is it even? Yes, it is. No, it is not.",
    "Go on and tell me more about the weather in Rome.",
] * 40


LINES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen cut words: line breaks stay together, whatever follows them."""


def tiny(lines: bool) -> Any:
    """The tiny target's byte-level tokenizer, a new one, that cuts as GPT-2 or by LINES."""
    from conftest import TINY
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    from specforge_exp.target import load_tokenizer

    made = load_tokenizer(TINY)
    if lines:
        made.backend_tokenizer.pre_tokenizer = Sequence(
            [Split(Regex(LINES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    return made


def metaspace(special: tuple[str, ...], spelling: str) -> Any:
    """BPE with byte fallback and the metaspace, as in the tokenizer.json of Llama 2 or Mistral."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if spelling == "normalizer":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme=spelling, split=True
        )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    single = [f"<0x{i:02X}>" for i in range(256)]
    trainer = BpeTrainer(vocab_size=500, special_tokens=["<unk>", *single], show_progress=False)
    made.train_from_iterator(WORDS, trainer)
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@cache
def tokenizer_of(shape: Shape) -> Any:
    """Its tokenizer, made once; plain text begins with its first token, as a template's does."""
    from tokenizers.processors import Sequence, TemplateProcessing

    if shape.spelling in ("lines", "gpt2"):
        made = tiny(shape.spelling == "lines")
        new = [token for token in shape.special if token not in made.get_vocab()]
        made.add_special_tokens({"additional_special_tokens": new})
    else:
        made = metaspace(shape.special, shape.spelling)
    made.eos_token, made.bos_token = shape.eos[0], shape.bos
    if shape.bos:
        backend, first = made.backend_tokenizer, (shape.bos, made.bos_token_id)
        begins = TemplateProcessing([shape.bos, "$A"], special_tokens=[first])
        before = [backend.post_processor] if backend.post_processor else []
        backend.post_processor = Sequence([*before, begins])
    made.chat_template = shape.template
    return made


def chat_of(shape: Shape, **options: Any) -> Any:
    """What encodes its conversations."""
    from specforge_exp.data.chat import Chat

    made = tokenizer_of(shape)
    eos = set(made.convert_tokens_to_ids(list(shape.eos)))
    return Chat(made, shape.kwargs, eos, **options)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TALKS: dict[str, list[dict[str, Any]]] = {
    "masks": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Go on"}, {"role": "assistant", "content": "Two."},
    ],
    "thoughts": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "One.", "reasoning": "Well."},
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "Two.", "reasoning": "Well."},
    ],
    "tool calls": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "No."},
    ],
}  # fmt: skip
REASONS = {
    "opens thoughts": "refused without thoughts: its prompt opens them",
    "closes the thoughts": "refused: its prompt closes them",
}


def cell(shape: Shape, column: str) -> str:
    """How the two answers of a conversation are trained on in a template."""
    from specforge_exp.data.chat import Unrenderable, encode_many

    if column == "tool calls" and not shape.tools:
        return "none"
    (result,) = encode_many(chat_of(shape), [{"conversations": TALKS[column]}])
    if isinstance(result, Unrenderable):
        return next(text for reason, text in REASONS.items() if reason in str(result))
    assert not result.left_out
    decode = tokenizer_of(shape).decode
    spans = [(row, span) for row in (result, *result.apart) for span in row.spans]
    said = [decode(row.ids[first:last]) for row, (first, last) in spans]
    if column == "thoughts" and not all("Well." in text for text in said):
        return "not shown, not trained"
    return "turn by turn" if result.apart else "together"


ABOUT = """\
A turn begins where the prompt that a server makes of the messages before it ends, and ends with the
token that the server stops at: checked on shapes of the public templates against their own
renderings. *together*: a conversation is one sequence; *turn by turn*: the template shows earlier
answers otherwise later, so they are sequences of their own (`preprocess.changed_turns`);
*not shown*: thoughts beside the content are no part of what this template renders.
Made by `python tests/specforge_exp/chat_templates.py`.

"""


def table() -> str:
    """The table of docs/targets.md about chat templates."""
    columns = list(TALKS)
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for shape in SHAPES:
        cells = [cell(shape, column) for column in columns]
        lines.append(f"| {shape.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    print(ABOUT + table())
