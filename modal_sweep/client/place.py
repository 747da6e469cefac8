"""Where a sweep lives on Modal: one workspace, environment, app and Volume, written down and kept.

Calls know none of them, but Volumes and Dicts do: from another place a sweep's files look lost.
"""

from modal_sweep.client.settings import volume_name
from modal_sweep.config import ModalLauncherConf
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.journal import Journal

CHOICES = {"workspace": "MODAL_PROFILE", "environment": "MODAL_ENVIRONMENT"}


def here() -> dict[str, str]:
    """The workspace and the environment that this process uses."""
    from modal import Environment, Workspace

    names = Workspace.from_context().hydrate().name, Environment.from_context().hydrate().name
    return {"workspace": names[0] or "", "environment": names[1] or ""}


def refuse_elsewhere(journal: Journal, conf: ModalLauncherConf | None = None) -> dict[str, str]:
    """Where this process is, and what a launch says of its app and Volume.

    Raises:
        LaunchError: the sweep lives elsewhere. A journal of old does not say where.
    """
    place = here() | ({"app": conf.app, "volume": volume_name(conf)} if conf else {})
    for kind, name in place.items():
        noted = journal.sweep.get(kind, name)
        if noted != name:
            choice = CHOICES.get(kind, f"hydra.launcher.{kind}")
            raise LaunchError(
                f"{journal.sweep_dir} is a sweep of {kind} {noted}, and this is {kind} {name}; "
                f"{choice}={noted} leads back to it, another hydra.sweep.dir to a sweep of its own"
            )
    return place
