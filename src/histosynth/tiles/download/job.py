"""Download public tiles: licence and size shown first, resumable, verified, ready for `tiles import`.

OUT/<archives>      class folders in a zip are read in place; other archives are unpacked, then removed
OUT/tiles.csv       path, label, patient, where the archive alone does not tell them
OUT/<name>.record.json  what the repository said of its files
OUT/download.json   where everything came from: addresses, sizes, checksums, licence, citation, date
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import histosynth
from histosynth.core.errors import DataError, HistosynthError, RunError, SettingError
from histosynth.core.fetch import fetch, md5_file
from histosynth.core.files import ensure_folder, read_json, write_json
from histosynth.core.progress import say
from histosynth.core.web import Patience, check_url, fetch_json
from histosynth.tiles.download.catalogue import Dataset, RemoteFile, complete, find, load_catalogue, size_text
from histosynth.tiles.download.layouts import write_table
from histosynth.tiles.download.rar import is_rar, unpack_rar, unrar_tool

DATASETS = load_catalogue()
"""The data sets that histosynth knows, by name."""

# pictures hardly shrink in an archive; blocks of the disk and masks take the rest
_UNPACKED = 1.2


@dataclass(frozen=True)
class DownloadConfig:
    """How a data set is downloaded."""

    accept_licence: bool = False
    """You accept the licence, where it does not allow every use."""
    mirror: str = ""
    """Folder on the web that holds a copy of the files under their names; checksums are verified all the same."""
    keep_archives: bool = False
    """Keep archives after they are unpacked."""
    timeout: float = 30.0
    """Seconds without a byte after which the connection is made anew."""
    catalogue: Path | None = None
    """YAML file with further data sets, of the form of tiles/download/datasets.yaml."""


def download(name: str, out: Path | str, config: DownloadConfig = DownloadConfig()) -> Path:
    """Download a data set; repeat the call after an interruption to go on.

    Args:
        name: a data set of `DATASETS`, or of the catalogue in `config`.
        out: folder for it.

    Returns:
        What `tiles import` reads: the archive, or the folder with tiles.csv.

    Raises:
        SettingError: unknown name, or a licence that was not accepted.
        RunError: no space, no connection, another data set in `out`.
        DataError: a checksum or size that is wrong, an archive that is not as the catalogue says.
    """
    dataset, out = find(name, load_catalogue(config.catalogue)), Path(out)
    for line in describe(dataset):
        say(line)
    if not (dataset.permissive or config.accept_licence):
        raise SettingError(
            f"{dataset.title} is under {dataset.licence}: {dataset.terms or 'not every use is allowed'}.",
            f"Read {dataset.licence_url}, then repeat the command with --accept-licence.",
        )
    if config.timeout <= 0:
        raise SettingError(f"--timeout is {config.timeout}.", "Give seconds, such as 30.")
    if config.mirror:
        check_url(config.mirror)
    done = _earlier(dataset, out)
    if done is not None:
        say(f"{dataset.title} is complete in {out}.")
        return done
    patience = Patience(timeout=config.timeout)
    dataset, record = _ask(dataset, config, patience)
    unpacked = dataset.layout["kind"] != "archive"
    _check_space(dataset, out, unpacked)
    ensure_folder(out)
    if any(is_rar(out / f.name) for f in dataset.files):
        try:
            unrar_tool(out)
        except RunError as error:
            say(f"{error} Until then the download goes on.")
    if record is not None:
        write_json(out / f"{dataset.name}.record.json", record)
    archives = [_get(file, out, config, patience) for file in dataset.files]
    source = archives[0]
    if unpacked:
        folders = [_unpack(a, out / "images" / a.stem) for a in archives if a.suffix != ".csv"]
        count = write_table(dataset, out, folders)
        say(f"tiles.csv lists {count} tiles.")
        source = out
    write_json(out / "download.json", _manifest(dataset, source, out, config))
    if unpacked and not config.keep_archives:
        for archive in archives:
            if archive.suffix != ".csv":
                archive.unlink(missing_ok=True)
    return source


def describe(dataset: Dataset) -> list[str]:
    """What to know before it is downloaded: contents, licence, citation, size; a line each."""
    use = "" if dataset.permissive else f", {dataset.terms or 'with restrictions'}"
    return [
        f"{dataset.title}: {dataset.about_it}",
        f"Licence: {dataset.licence}{use} ({dataset.licence_url})",
        f"Please cite: {dataset.citation}",
        f"From: {dataset.page}",
        f"Size: {size_text(dataset.size)}",
    ]


def _earlier(dataset: Dataset, out: Path) -> Path | None:
    """The source that an earlier call completed in `out`, if it is still whole."""
    path = out / "download.json"
    if not path.exists():
        return None
    manifest = read_json(path)
    found = manifest.get("name") if isinstance(manifest, dict) else None
    if found != dataset.name:
        raise RunError(f"{out} holds another download ({found}).", "Choose another folder.")
    source = out / str(manifest.get("source", ""))
    if dataset.layout["kind"] == "archive":
        sizes = [f.get("size") for f in manifest.get("files", []) if f.get("name") == source.name]
        whole = source.is_file() and [source.stat().st_size] == sizes
    else:
        whole = (out / "tiles.csv").is_file() and (out / "images").is_dir()
    return source if whole else None


def _ask(dataset: Dataset, config: DownloadConfig, patience: Patience) -> tuple[Dataset, Any]:
    """The data set with sizes and checksums as its repository lists them, and that record (None: not reached).

    Where the catalogue knows all checksums, a record that cannot be reached is no obstacle.
    """
    pinned = all(f.md5 and f.url for f in dataset.files)
    if config.mirror and pinned:
        return dataset, None
    addresses = {dataset.record: "the record of the repository"}
    if config.mirror:
        addresses = {_join(config.mirror, f"{dataset.name}.record.json"): "the record on the mirror"} | addresses
    problem: HistosynthError | None = None
    for address, origin in addresses.items():
        try:
            record = fetch_json(address, replace(patience, attempts=3))
        except HistosynthError as error:
            problem = error
            continue
        return complete(dataset, record, origin), record
    if pinned:
        say(f"{problem.message if problem else ''} The checksums of the catalogue are used.")
        return dataset, None
    raise RunError(
        f"The checksums of {dataset.title} cannot be asked of {dataset.record}: {problem}",
        "Try again later. A mirror can hold them as "
        f"{dataset.name}.record.json, which lies beside every finished download.",
    )


def _join(base: str, name: str) -> str:
    return f"{base.rstrip('/')}/{quote(name)}"


def _check_space(dataset: Dataset, out: Path, unpacked: bool) -> None:
    """Say what is needed and what there is; too little is an error now and not in an hour."""
    if dataset.size is None:
        return
    need = dataset.size * (1 + _UNPACKED * unpacked)
    for file in dataset.files:
        for path in (out / file.name, out / f"{file.name}.part"):
            if path.is_file():
                need -= min(path.stat().st_size, file.size or 0)
        if unpacked and (out / "images" / Path(file.name).stem).is_dir():
            need -= _UNPACKED * (file.size or 0)
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    tail = " (archive and unpacked tiles)" if unpacked else ""
    say(f"Space: {size_text(round(need))} needed{tail}, {size_text(free)} free in {place}")
    if free < need:
        raise RunError(
            f"{place} has {size_text(free)} free, but {dataset.title} needs {size_text(round(need))}{tail}.",
            "Free some space, or give a folder on another disk.",
        )


def _get(file: RemoteFile, out: Path, config: DownloadConfig, patience: Patience) -> Path:
    path = out / file.name
    if path.is_file():
        found = md5_file(path, file.name)
        if found == file.md5:
            say(f"{file.name} is there already; its checksum is right.")
            return path
        raise DataError(
            f"{path} has the MD5 {found} where {file.md5} is expected ({file.checked_by}).",
            "It is not the file of the repository, or damaged: remove it, then repeat the command.",
        )
    url = _join(config.mirror, file.name) if config.mirror else file.url
    fetch(url, path, size=file.size, digest=file.md5, patience=patience)
    say(f"{file.name} is complete; its MD5 is that of {file.checked_by}.")
    return path


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack to a folder, all or nothing; one that is there was unpacked by an earlier call."""
    from histosynth.tiles.sources.archives import unpack

    if folder.is_dir():
        return folder
    say(f"Unpack {archive.name} ...")
    return unpack_rar(archive, folder) if is_rar(archive) else unpack(archive, folder)


def _manifest(dataset: Dataset, source: Path, out: Path, config: DownloadConfig) -> dict[str, Any]:
    files = [
        {
            **asdict(f),
            "url": _join(config.mirror, f.name) if config.mirror else f.url,
            "size": f.size or (out / f.name).stat().st_size,
        }
        for f in dataset.files
    ]
    return {
        "name": dataset.name,
        "title": dataset.title,
        "source": str(source.relative_to(out)),
        "licence": dataset.licence,
        "licence_url": dataset.licence_url,
        "citation": dataset.citation,
        "page": dataset.page,
        "record": dataset.record,
        "files": files,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "histosynth": histosynth.__version__,
    }
