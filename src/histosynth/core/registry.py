"""Names to parts. A name resolves when it is used; listing names imports nothing."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from histosynth.core.errors import PluginError, SettingError, did_you_mean


class Registry:
    """A table of "module:attribute" strings, widened by an entry-point group of other packages.

    Our own names win over entry points of the same name, so that installing a package cannot silently
    change what a command does.
    """

    def __init__(self, kind: str, table: dict[str, str], group: str = "") -> None:
        self.kind, self._table, self._group = kind, dict(table), group

    def targets(self) -> dict[str, str]:
        """Every name with its "module:attribute"."""
        found = {e.name: e.value for e in entry_points(group=self._group)} if self._group else {}
        return found | self._table

    def names(self) -> list[str]:
        """Every known name, sorted."""
        return sorted(self.targets())

    def load(self, name: str) -> Any:
        """Import and return the object called `name`.

        Raises:
            SettingError: no part has this name (near names are suggested).
            PluginError: the part exists but cannot be imported; other parts are not affected.
        """
        targets = self.targets()
        if name not in targets:
            raise SettingError(f"There is no {self.kind} called {name!r}.", did_you_mean(name, targets))
        module, _, attribute = targets[name].partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise PluginError(
                f"The {self.kind} {name!r} ({targets[name]}) cannot be loaded: {error}.",
                "Reinstall or remove the package that provides it.",
            ) from error
