"""States from a server of the target: put together as the draft is fed them, and checked against
transformers'. A real vLLM is in tests/engines."""

from pathlib import Path

import pytest
import torch
from conftest import make_config, small_target
from numpy import int32

from specforge_exp.config.settings import training_settings
from specforge_exp.config.target import TargetConfig
from specforge_exp.errors import InputError
from specforge_exp.inference import served
from specforge_exp.inference.served import ServedStates
from specforge_exp.inference.states import Bytes, unpacked
from specforge_exp.target import Target
from specforge_exp.target.anatomy import outputs_of


class Captured(ServedStates):
    """The layers' outputs as a server captures them, of layers that it counts from `first`."""

    first = 1

    def states(self, conversations: list[object]) -> list[Bytes]:
        answers = []
        for ids in conversations:
            ids_1T = torch.as_tensor(ids, dtype=torch.long)[None]
            layers = dict(enumerate(target.layers, self.first))
            with outputs_of(layers) as outputs:
                target.features(ids_1T)
            answers.append(self.parts(torch.stack([outputs[k][0] for k in self.layers], 1)))
        return answers


target: Target = small_target()


def test_the_states_of_a_server(tmp_path: Path) -> None:
    """Also where the draft is fed by the last layer, and by layers in another order."""
    for aux_layers in ([1, 3, 4], [7, 2], []):
        target.aux_layers = aux_layers
        server = Captured(make_config(tmp_path), target, tmp_path / "states")
        assert server.layers == sorted({8, *(layer + 1 for layer in aux_layers)})
        ids_T = torch.arange(9, dtype=torch.int32)
        (data,) = server.states([ids_T.numpy().astype(int32)])
        aux_TA, last_TH = unpacked(data, torch.float32, 16)
        expected = target.features(ids_T.long()[None])
        assert aux_TA.equal(expected[0][0]) and last_TH.equal(expected[1][0])
        assert server.agreement(target) == 0.0


def test_states_of_other_layers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.aux_layers = [1, 3, 4]
    server = Captured(make_config(tmp_path), target, tmp_path / "states")
    monkeypatch.setattr(Captured, "first", 2)
    target.aux_layers = [1, 3, 4]
    server.layers = [2, 4, 5, 8]
    with pytest.raises(InputError, match=r"qwen3 differ from transformers' by .*another target"):
        server.agreement(target)
    monkeypatch.setitem(served.MOST, torch.float32, 1e9)  # they are nearer to another layer's
    with pytest.raises(InputError, match="another target"):
        server.agreement(target)
    monkeypatch.setattr(Captured, "first", 1)
    assert server.agreement(target) == 0.0


def test_what_a_server_is_started_with(tmp_path: Path) -> None:
    """Of several GPUs and with options; the states' own cannot be given."""
    cfg = make_config(tmp_path)
    cfg.target = TargetConfig(
        placement="ray", engine="vllm", tp_size=4, python="/opt/python", args={"max_num_seqs": 9}
    )
    command = ServedStates(cfg, target, tmp_path / "states").command(1234)
    assert command[:3] == ["/opt/python", "-m", "vllm.entrypoints.openai.api_server"]
    words = " ".join(command)
    for part in (
        "--tensor-parallel-size 4 --host 127.0.0.1 --port 1234", "--max-num-seqs 9",
        "--dtype float32 --max-model-len 258 --no-enable-prefix-caching",
    ):  # fmt: skip
        assert part in words
    for key in ("dtype", "no-enable-prefix-caching", "speculative_config"):
        with pytest.raises(InputError, match=rf"target\.args\.{key} is set by what the states"):
            TargetConfig(placement="ray", engine="vllm", args={key: 1})


def test_another_engine_is_another_training(tmp_path: Path) -> None:
    cfg = make_config(tmp_path)
    own = training_settings(cfg)
    cfg.target = TargetConfig(placement="ray", workers=2)
    assert training_settings(cfg) == own
    cfg.target = TargetConfig(placement="ray", engine="vllm", tp_size=2)
    assert training_settings(cfg) == own | {"target.engine": "vllm", "target.args": {}}
