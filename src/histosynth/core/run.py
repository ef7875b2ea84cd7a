"""Run folders: every setting, what it was run with, how it went, and what is needed to go on.

config.yaml     every setting, resolved
manifest.json   verb, version, packages, device, seed, parents, status, times, error
metrics.csv     a row a logged step          tensorboard/   the same, as events
checkpoints/    safetensors                  state/         what is needed to resume
samples/        pictures
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from histosynth.core.errors import RunError
from histosynth.core.files import (
    atomic_path,
    ensure_folder,
    explain_os_error,
    read_json,
    write_json,
    write_text,
)

_PACKAGES = ("histosynth", "torch", "torchvision", "diffusers", "peft", "numpy", "scipy", "pandas")
# settings that may differ between a run and its resumption, because they do not change its result
_FREE = {"device", "out", "workers"}


class Run:
    """A run folder that is being written; a context manager that records how the run ended."""

    def __init__(self, folder: Path, manifest: dict[str, Any], resumed: bool) -> None:
        self.folder, self.manifest, self.resumed = folder, manifest, resumed
        self._columns: list[str] | None = None
        self._events: Any = None
        self._started = time.monotonic()

    @classmethod
    def open(cls, folder: Path | str, verb: str, config: Any, parents: Sequence[str] = ()) -> Self:
        """Start a run, or go on with the run that is in this folder.

        Args:
            folder: made when absent.
            verb: such as "train gan".
            config: a dataclass or dict of JSON-ready values.
            parents: names or hashes of what the run was made from.

        A run that failed before it had made anything is no run: the command that mends it may come with other settings.

        Raises:
            RunError: the folder holds other files, or a run with another verb or other settings, or
                another process is writing to it.
        """
        folder = Path(folder)
        settings = plain(config)
        path = folder / "manifest.json"
        try:
            used = path.is_file() and not _made_nothing(folder, path)
            foreign = not path.is_file() and folder.is_dir() and any(p for p in folder.iterdir() if p.name[0] != ".")
        except OSError as error:
            raise explain_os_error(error, f"Cannot read the folder {folder}") from error
        if foreign:
            raise RunError(f"The folder {folder} is not empty and holds no run.", "Choose a new or empty folder.")
        ensure_folder(folder)
        if used:
            manifest = read_json(path)
            _check_same(folder, manifest, verb, settings)
        else:
            manifest = {"verb": verb, "created": _now(), "seconds": 0.0}
        run = cls(folder, manifest, resumed=used)
        _lock(folder)
        manifest.update(
            verb=verb,
            status="running",
            started=_now(),
            settings=settings,
            parents=list(parents),
            packages=_versions(),
            python=platform.python_version(),
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            error=None,
        )
        write_text(folder / "config.yaml", _yaml(settings))
        run._write_manifest()
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.manifest["seconds"] = round(self.manifest["seconds"] + time.monotonic() - self._started, 2)
        self.manifest["ended"] = _now()
        if error is None:
            self.manifest["status"] = "finished"
        else:
            interrupted = isinstance(error, KeyboardInterrupt)
            self.manifest["status"] = "interrupted" if interrupted else "failed"
            self.manifest["error"] = f"{type(error).__name__}: {error}"
        if self._events is not None:
            self._events.close()
        try:
            self._write_manifest()
            _unlock(self.folder)
        except RunError:
            if error is None:  # when the disk is full, the first error is the one to report
                raise

    @property
    def state_path(self) -> Path:
        """Where the recipe keeps what it needs to resume."""
        return self.folder / "state" / "state.safetensors"

    def checkpoint_path(self, name: str) -> Path:
        """Where the checkpoint `name` belongs."""
        return self.folder / "checkpoints" / f"{name}.safetensors"

    def sample_path(self, name: str) -> Path:
        """Where the picture `name` belongs."""
        path = self.folder / "samples" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, **results: Any) -> None:
        """Record results in the manifest."""
        self.manifest.setdefault("results", {}).update(plain(results))
        self._write_manifest()

    def log(self, step: int, **scalars: float) -> None:
        """Append a row to metrics.csv and to the TensorBoard events; every call has the same names."""
        path = self.folder / "metrics.csv"
        columns = ["step", *scalars]
        new = not path.exists()
        if self._columns is None:
            self._columns = columns if new else path.read_text().splitlines()[0].split(",")
        with open(path, "a", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns, restval="", extrasaction="ignore", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({"step": step} | {k: f"{v:.6g}" for k, v in scalars.items()})
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def truncate_log(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run writes them again."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return
        head, *rows = path.read_text().splitlines()
        # a kill can leave half a line; its first field is then not to be trusted
        kept = [r for r in rows if r.count(",") == head.count(",") and int(r.split(",")[0]) <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join([head, *kept]) + "\n")

    def _write_manifest(self) -> None:
        write_json(self.folder / "manifest.json", self.manifest)


def plain(value: Any) -> Any:
    """Dataclasses, paths, tuples and NumPy scalars as JSON-ready values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str):
        return value.item()
    return value


def is_finished(folder: Path | str) -> bool:
    """Whether a run in this folder ended well."""
    path = Path(folder) / "manifest.json"
    return path.is_file() and read_json(path).get("status") == "finished"


def _made_nothing(folder: Path, manifest: Path) -> bool:
    """Whether the run in this folder ended early, with nothing but its settings on disk."""
    if any(p for p in folder.iterdir() if p.name[0] != "." and p.name not in ("manifest.json", "config.yaml")):
        return False
    return read_json(manifest).get("status") in ("failed", "interrupted")


def _check_same(folder: Path, manifest: dict[str, Any], verb: str, settings: dict[str, Any]) -> None:
    if manifest.get("verb") != verb:
        raise RunError(
            f"The folder {folder} holds a run of {manifest.get('verb')!r}, not of {verb!r}.",
            "Choose another folder.",
        )
    old = manifest.get("settings", {})
    changed = sorted(k for k in old.keys() | settings.keys() if old.get(k) != settings.get(k) and k not in _FREE)
    if changed:
        detail = ", ".join(f"{k}: {old.get(k)!r} then, {settings.get(k)!r} now" for k in changed)
        raise RunError(
            f"The folder {folder} holds a run with other settings ({detail}).",
            "Repeat the same command to go on with that run, or choose another folder.",
        )


def _lock(folder: Path) -> None:
    path = folder / ".lock"
    try:
        holder = int(path.read_text()) if path.exists() else 0
    except (ValueError, OSError):
        holder = 0
    if holder and holder != os.getpid() and _alive(holder):
        raise RunError(
            f"Process {holder} is writing to {folder}.",
            f"Wait for it or stop it; if it is gone, delete {path}.",
        )
    write_text(path, str(os.getpid()))


def _unlock(folder: Path) -> None:
    (folder / ".lock").unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False, allow_unicode=True)
