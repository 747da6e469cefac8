"""Where a sweep lives on Modal: one workspace, environment, app and Volume, written down and kept.

Calls know none of them, but Volumes and Dicts do: from another place a sweep's files look lost.
"""

from modal_sweep.errors import LaunchError
from modal_sweep.protocol.journal import Journal

CHOICES = {
    "workspace": "`modal profile activate` of a profile of it",
    "environment": "MODAL_ENVIRONMENT={}",
    "app": "hydra.launcher.app={}",
    "volume": "hydra.launcher.volume={}",
}


def here() -> dict[str, str]:
    """The workspace and the environment that this process uses."""
    from modal import Environment, Workspace

    names = Workspace.from_context().hydrate().name, Environment.from_context().hydrate().name
    return {"workspace": names[0] or "", "environment": names[1] or ""}


def refuse_elsewhere(journal: Journal, **own: str) -> dict[str, str]:
    """Where this process is, with what a launch says of its `app` and `volume`.

    Raises:
        LaunchError: the sweep lives elsewhere. A journal of old does not say where.
    """
    place = {**here(), **own}
    for kind, name in place.items():
        noted = journal.sweep.get(kind, name)
        if noted != name:
            choice = CHOICES[kind].format(noted)
            other = ", or another hydra.sweep.dir for a sweep of its own" if own else ""
            raise LaunchError(
                f"{journal.sweep_dir} is a sweep of {kind} {noted}, and this is {kind} {name}; "
                f"come back to it with {choice}{other}"
            )
    return place
