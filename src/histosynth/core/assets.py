"""The small weights that this project trained itself and ships inside the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from histosynth.core.errors import CheckpointError


def _folder() -> Path:
    return Path(str(files("histosynth") / "assets"))


def has_asset(name: str) -> bool:
    """Whether this installation has the asset file `name`."""
    return (_folder() / name).is_file()


def asset_path(name: str) -> Path:
    """The path of a shipped weight file.

    Raises:
        CheckpointError: this installation does not have it.
    """
    if not has_asset(name):
        present = ", ".join(sorted(p.name for p in _folder().glob("*.safetensors"))) or "none"
        raise CheckpointError(
            f"The shipped weights {name!r} are not in this installation (present: {present}).",
            "Reinstall histosynth, or train from scratch with init=none.",
        )
    return _folder() / name
