"""What a task returns is a plain value wherever that says it, and NaN of any kind is no result."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modal_app import driver
from modal_local.client import LocalModal
from test_modal_place import values

from modal_sweep.errors import JobFailed, LaunchError
from modal_sweep.protocol.payload import sendable
from modal_sweep.protocol.result import is_nan, pack_value, unpack_value, without_pickle

KINDS = [np.float64, np.float32, np.array, lambda x: torch.tensor(x, dtype=torch.float64), float]


@settings(deadline=None)
@given(st.floats(allow_nan=True, width=32), st.sampled_from(KINDS), st.sampled_from([list, tuple]))
def test_numbers_of_any_library_are_plain(number: float, kind: Any, several: Any) -> None:
    for value, plain in ((kind(number), number), (several([kind(number), 1]), None)):
        packed = json.loads(json.dumps(pack_value(value)))
        assert is_nan(packed) == math.isnan(number)
        back = unpack_value(packed)
        if plain is None:
            assert type(back) is several and back[1] == 1
            back = back[0]
        assert type(back) is float and (back == number or math.isnan(number))
    assert is_nan(pack_value(several([1, kind(number)]))) == math.isnan(number)


@pytest.mark.parametrize("value", [np.int64(3), np.bool_(True), torch.tensor(3), np.str_("a")])
def test_other_scalars_too(value: Any) -> None:
    back = unpack_value(pack_value({"a": [value]}))["a"][0]
    assert type(back) in (int, bool, str) and back == value.item()


@pytest.mark.parametrize("value", [[(1, 2)], {1: 2}, {"a": [{"b": (3,)}]}, (1, (2,)), [[1], None]])
def test_what_json_would_change_comes_back_as_it_was(value: Any) -> None:
    assert unpack_value(json.loads(json.dumps(pack_value(value)))) == value


def test_what_cannot_be_sent_says_so() -> None:
    with pytest.raises(JobFailed, match="the return value, a generator, cannot be sent"):
        pack_value(number for number in range(3))
    packed = pack_value(np.zeros(3))
    assert (unpack_value(packed) == np.zeros(3)).all()
    with pytest.raises(JobFailed, match="has expired"):
        unpack_value(without_pickle({"value": packed})["value"])


TASKS = """
import threading

LOCK, HELD = threading.Lock(), {"it": threading.Lock()}

def reads(x):
    with LOCK:
        return x

def calls(x):
    return [reads(y) for y in [x]]

def around(lock):
    return lambda x: lock and x

wrapped = around(threading.Lock())

def inner(x):
    def below():
        return HELD["it"]
    return below()

def beside(held):
    if held:
        later = 1
    def reads(x):
        return later if x else HELD
    return reads

unassigned = beside(False)

def recurses(x):
    return recurses(x - 1) or HELD

def plain(x):
    return threading.Lock()
"""


def test_what_keeps_a_task_from_being_sent_is_named() -> None:
    """A global that pickle cannot take, wherever the task reads it: the fault is the app's."""
    module = {"__name__": "__main__"}
    exec(TASKS, module)
    culprits = {"reads": "LOCK", "calls": "LOCK", "wrapped": "lock", "inner": "HELD",
                "recurses": "HELD", "unassigned": "HELD"}  # fmt: skip
    for name, culprit in culprits.items():
        with pytest.raises(LaunchError) as refusal:
            sendable("the task", module[name], ("context", module[name]))
        assert f"the task reads __main__.{culprit}, which cannot be sent" in str(refusal.value)
        assert "make it inside the function, or keep it in a module" in str(refusal.value)
    assert sendable("the task", module["plain"], module["plain"])
    with pytest.raises(LaunchError, match=r"the task cannot be sent to Modal \(.*lock"):
        sendable("the task", None, module["LOCK"])


LOCKED = """
import threading
import hydra

LOCK = threading.Lock()

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    with LOCK:
        return 1.0

main()
"""


@pytest.mark.usefixtures("on_local_modal")
def test_a_launch_and_its_rehearsal_name_the_global(tmp_path: Path) -> None:
    (tmp_path / "locked.py").write_text(LOCKED)
    for more in ([], ["hydra.launcher.dry_run=true"]):
        command = [str(tmp_path / "locked.py"), "-m", "hydra/launcher=modal", "+x=1", *more]
        printed = driver.run([*command, f"hydra.sweep.dir={tmp_path}/sweep"], expect=1)
        assert "the task __main__.main reads __main__.LOCK, which cannot be sent" in printed
        assert "Traceback" not in printed


@pytest.mark.usefixtures("on_local_modal")
def test_a_value_outlives_its_call(tmp_path: Path, control_plane: LocalModal) -> None:
    sweep = tmp_path / "sweep"
    command = values(sweep, "ret=float64,tensor,pair,not,generator")
    driver.run([*command, "hydra.launcher.detach=true"])
    calls = {event["call"] for event in driver.events(sweep, "spawn")}
    state = control_plane.wait_for(
        lambda state: all(state["calls"][call]["done"] for call in calls), timeout=120
    )
    assert state
    for call in calls:
        control_plane.expire(call)
    printed = driver.run(command, expect=1)
    ends = driver.ends(sweep)
    assert [ends[job]["value"]["json"] for job in range(3)] == [1.5, 1.5, [1.5, 2]]
    assert [ends[job]["status"] for job in (0, 3, 4)] == ["completed", "failed", "failed"]
    assert "the return value, a generator, cannot be sent" in printed
    assert "NaN" in ends[3]["error"]["message"] and "3 of 5 jobs completed" in printed
