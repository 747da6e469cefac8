"""Every family from its states to lossless decoding; a handful of them in the fast tier."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import FAMILIES, NOT_FED, each_family, save
from target_matrix import CHECKS, examine

from specforge_exp.target import Target
from specforge_exp.target.anatomy import CACHE, find_layers

REFUSED = {
    **{(name, draft): "cannot be decoded in this process"
       for name in ("MiniMax", "Jamba") for draft in ("EAGLE-3", "DFlash")},
    **{(name, check): "do not give one state of 64" for name in NOT_FED for check in CHECKS},
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the models are that exist."""
    return {}


@pytest.mark.parametrize("check", CHECKS)
@each_family
def test_family(
    family: str, check: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if family not in folders:
        folders[family] = save(FAMILIES[family](), tmp_path_factory.mktemp("target"))
    answer = examine(check, folders[family])
    assert REFUSED.get((family, check), "yes") in answer


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_given_by_a_name_that_forwards_know(family: str) -> None:
    """Another one may be lost in **kwargs without a word."""
    config = FAMILIES[family]()
    text = type(config) in tf.AutoModelForCausalLM._model_mapping
    kind = tf.AutoModelForCausalLM if text else tf.AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(config)
    for module in (model, find_layers(model)[0]):
        assert CACHE in inspect.signature(module.forward).parameters


def test_and_without_a_warning(random_target: Target) -> None:
    cache = random_target.new_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        random_target.features(torch.arange(5)[None], cache)
    assert cache.get_seq_length() == 5
