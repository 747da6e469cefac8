"""Workers on several nodes of one cluster, one of which goes away while another comes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, make_config
from holding import hold, release
from ray_runs import (
    RAY,
    STEPS,
    assert_equal,
    composed,
    counted,
    nothing_goes_on,  # noqa: F401 (for every test)
    options,
    planned,
    processes,
    said,
    start,
)  # fmt: skip
from test_resume import run_of, wait_for_step

from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import train

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        find_spec("ray") is None or sys.platform != "linux",
        reason="Ray is not installed: pip install -e '.[ray]'",
    ),
]
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

store = {"object_store_memory": 100 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.remove_node(nodes[0], allow_graceful=False)
    print("changed", flush=True)
cluster.shutdown()
"""


@contextmanager
def cluster(environment: dict[str, str]) -> Iterator[Any]:
    """A head without places and two nodes with one each; a line of input swaps one of them."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(300)


def test_a_node_goes_and_another_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined by RAY_ADDRESS: what the lost node held is computed again, the numbers stay."""
    cfg = make_config(tmp_path)
    cfg.preprocess.source = "prep"
    prep(cfg)
    preprocess(cfg)
    train(composed(tmp_path, "alone"))
    settings = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    settings |= {"RAY_AUTH_TOKEN": os.urandom(16).hex(), "RAY_USAGE_STATS_ENABLED": "0"}
    with cluster(os.environ | settings) as nodes:
        address = nodes.stdout.readline().strip()
        for name, value in {**settings, "RAY_ADDRESS": address}.items():
            monkeypatch.setenv(name, value)
        words = options(tmp_path, "nodes", *RAY, "target.workers=2")
        hold(run_of(cfg, "nodes"), STEPS - 1)
        run = start([sys.executable, str(REPOSITORY / "train.py"), *words], tmp_path / "nodes.log")
        wait_for_step(run, composed(tmp_path, "nodes"), "nodes", 4)
        assert len(processes(nodes.pid, "^ray::TargetWorker")) == 2
        print("swap", file=nodes.stdin, flush=True)
        assert nodes.stdout.readline() == "changed\n"
        release(run_of(cfg, "nodes"))
        assert run.wait(300) == 0, said(tmp_path, "nodes")
        deadline = time.monotonic() + 300  # workers that were asked to end do
        while (left := processes(nodes.pid, "^ray::TargetWorker")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []  # the cluster stays, its workers do not
    assert f"joined Ray at {address}" in said(tmp_path, "nodes")
    assert_equal(composed(tmp_path, "nodes"), "nodes", "alone")
    assert counted(said(tmp_path, "nodes"))["taken"] == planned(0, STEPS)
