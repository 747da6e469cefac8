"""The frozen target: its states and logits, and what differs between families, read from it."""

from specforge_exp.target.ends import Ends, make_ends
from specforge_exp.target.files import load_tokenizer, text_config
from specforge_exp.target.head import Head
from specforge_exp.target.loading import load_target
from specforge_exp.target.machine import (
    DTYPES,
    check_gpus,
    set_up_torch,
    take_dtype,
    take_what_is_there,
)
from specforge_exp.target.model import Target
from specforge_exp.target.past import Past, check_decoding
from specforge_exp.target.shape import check_length, draft_shape

__all__ = [
    "DTYPES",
    "Ends",
    "Head",
    "Past",
    "Target",
    "check_decoding",
    "check_gpus",
    "check_length",
    "draft_shape",
    "load_target",
    "load_tokenizer",
    "make_ends",
    "set_up_torch",
    "take_dtype",
    "take_what_is_there",
    "text_config",
]  # fmt: skip
