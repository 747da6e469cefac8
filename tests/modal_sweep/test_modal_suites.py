"""Hydra's own test suites for launchers, with the real modal client and containers that share
nothing writable with the launching process."""

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase

from specforge_exp.config import Config

# A schema of a package that no container of these tests has.
ConfigStore.instance().store(name="elsewhere", node=Config)
pytestmark = pytest.mark.usefixtures("on_local_modal")


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own() -> None:
    """The suites count on the defaults of Hydra's version base, which other tests have set."""
    Singleton._instances.pop(VersionBase, None)


def test_discovery() -> None:
    names = [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]
    assert "ModalLauncher" in names


@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("modal", ["hydra.launcher.poll=0.1"])], ids=["modal"]
)
class TestModalLauncher(LauncherTestSuite):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=modal", "hydra.launcher.sync_cwd=true"])],
    ids=["modal"],
)
class TestModalLauncherIntegration(IntegrationTestSuite):
    pass


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="the job writes into the launch directory")
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=modal"])], ids=["modal"]
)
class TestWithoutSync:
    """The control: nothing that a container writes there reaches this machine by itself."""

    generate_custom_cmd = IntegrationTestSuite.generate_custom_cmd
    get_test_scratch_dir = IntegrationTestSuite.get_test_scratch_dir
    test_get_orig_dir_multirun = IntegrationTestSuite.test_get_orig_dir_multirun
