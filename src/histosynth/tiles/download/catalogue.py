"""The public data sets that can be downloaded, as data (`datasets.yaml`), and what their repositories say of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.web import check_url

_MD5 = re.compile(r"[0-9a-f]{32}")
_KINDS = {"archive": set(), "table": {"table", "image", "label"}, "folders": {"images", "labels", "patient"}}
_GIGA = 1e9


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set."""

    name: str
    """Name on the disk."""
    key: str
    """Name, or numeric id, in the record of the repository."""
    url: str = ""
    """Where to get it; "" when only the record tells."""
    size: int | None = None
    """Bytes."""
    md5: str = ""
    """Checksum in hexadecimal; "" when only the record tells."""
    checked_by: str = "the catalogue"
    """Where the checksum is from."""


@dataclass(frozen=True)
class Dataset:
    """A public data set."""

    name: str
    title: str
    about_it: str
    tiles: int
    """Number of images."""
    licence: str
    licence_url: str
    permissive: bool
    """Whether any use is allowed; otherwise the licence must be accepted by a flag."""
    citation: str
    page: str
    """For people."""
    repository: str
    """Whose record format: zenodo, figshare or dataverse."""
    record: str
    """For programs: sizes and checksums as JSON."""
    files: tuple[RemoteFile, ...]
    layout: Mapping[str, Any]
    """How the tiles lie in the files; see datasets.yaml."""
    terms: str = ""
    """What the licence forbids, in a few words."""
    about: int | None = None
    """Bytes of the download, roughly, while the exact size is not known."""

    @property
    def size(self) -> int | None:
        """Bytes of the download; None when nobody has said yet."""
        known = [f.size for f in self.files]
        return self.about if None in known else sum(s for s in known if s is not None)


def size_text(size: int | None) -> str:
    """Bytes for people: 11.7 GB."""
    if size is None:
        return "asked at the start"
    return f"{size / _GIGA:.1f} GB" if size >= _GIGA else f"{size / 1e6:.1f} MB"


def load_catalogue(path: Path | None = None) -> dict[str, Dataset]:
    """The known data sets by name, with those of another YAML file of the same form added.

    Raises:
        DataError: the file is missing, is not YAML, or an entry is not as it should be.
    """
    entries = _read(Path(__file__).with_name("datasets.yaml"))
    if path is not None:
        entries |= _read(path)
    return entries


def _read(path: Path) -> dict[str, Dataset]:
    import yaml

    remedy = "See tiles/download/datasets.yaml of histosynth for the form."
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"The catalogue {path} cannot be read: {error}.", remedy) from error
    if not isinstance(content, dict):
        raise DataError(f"The catalogue {path} is not a table of data sets.", remedy)
    try:
        return {name: _entry(name, fields) for name, fields in content.items()}
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        raise DataError(f"The catalogue {path} has a wrong entry: {error}.", remedy) from error


def _entry(name: str, fields: dict[str, Any]) -> Dataset:
    files = tuple(RemoteFile(**f) for f in fields["files"])
    dataset = Dataset(**{**fields, "name": name, "files": files})
    kind = dataset.layout.get("kind")
    if kind not in _KINDS or _KINDS[kind] - dataset.layout.keys():
        raise ValueError(f"{name}: layout {dict(dataset.layout)}")
    if dataset.repository not in RECORDS:
        raise ValueError(f"{name}: repository {dataset.repository!r}")
    for file in files:
        if Path(file.name).name != file.name or file.name.startswith("."):
            raise ValueError(f"{name}: file name {file.name!r}")
        if file.md5 and not _MD5.fullmatch(file.md5):
            raise ValueError(f"{name}: md5 {file.md5!r}")
    re.compile(dataset.layout.get("patient", "") if kind == "folders" else "")
    return dataset


def find(name: str, catalogue: Mapping[str, Dataset]) -> Dataset:
    """The data set of that name.

    Raises:
        SettingError: there is none.
    """
    if name not in catalogue:
        raise SettingError(f"There is no data set {name!r} to download.", did_you_mean(name, catalogue))
    return catalogue[name]


def _zenodo(record: Any) -> dict[str, RemoteFile]:
    return {
        f["key"]: RemoteFile(f["key"], f["key"], f["links"]["self"], f["size"], f["checksum"].removeprefix("md5:"))
        for f in record["files"]
    }


def _figshare(record: Any) -> dict[str, RemoteFile]:
    return {
        str(f["id"]): RemoteFile(f["name"], str(f["id"]), f["download_url"], f["size"], f["computed_md5"])
        for f in record["files"]
    }


def _dataverse(record: Any) -> dict[str, RemoteFile]:
    files = {}
    for entry in record["data"]["latestVersion"]["files"]:
        f = entry["dataFile"]
        # a table is kept as a converted copy: `filesize` is that of the copy, the checksum that of the original
        table = f.get("tabularData") or "originalFileFormat" in f
        size = f.get("originalFileSize") if table else f["filesize"]
        files[str(f["id"])] = RemoteFile(f["filename"], str(f["id"]), "", size, f["md5"])
    return files


RECORDS: dict[str, Callable[[Any], dict[str, RemoteFile]]] = {
    "zenodo": _zenodo,
    "figshare": _figshare,
    "dataverse": _dataverse,
}
"""The record of each repository, as its files by key (https://developers.zenodo.org, https://docs.figshare.com,
https://guides.dataverse.org/en/latest/api/native-api.html)."""


def complete(dataset: Dataset, record: Any, origin: str = "the record of the repository") -> Dataset:
    """The data set with the sizes and checksums that the record of its repository lists.

    Args:
        dataset: what the catalogue knows; it is contradicted by nothing.
        record: JSON of the repository.
        origin: where the record is from, for those who want to know what a checksum is worth.

    Raises:
        DataError: the record is not of the expected form, misses a file, or contradicts the catalogue.
    """
    remedy = f"Look at {dataset.page}; a newer histosynth may know more."
    try:
        listed = RECORDS[dataset.repository](record)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"The record {dataset.record} has an unknown form ({error!r}).", remedy) from error
    files = []
    for file in dataset.files:
        there = listed.get(file.key)
        if there is None:
            raise DataError(
                f"The record {dataset.record} has no file {file.key} (it has: {', '.join(listed) or 'none'}).", remedy
            )
        bad_size = there.size is not None and not (isinstance(there.size, int) and there.size > 0)
        if bad_size or not _MD5.fullmatch(str(there.md5)):
            raise DataError(
                f"The record {dataset.record} lists {file.key} with size {there.size} and MD5 {there.md5}.", remedy
            )
        for what, ours, theirs in (("MD5", file.md5, there.md5), ("size", file.size, there.size)):
            if ours and theirs and ours != theirs:
                raise DataError(
                    f"The record {dataset.record} lists {file.name} with the {what} {theirs}; the catalogue of "
                    f"histosynth says {ours}. The file was changed.",
                    remedy,
                )
        by = file.checked_by if file.md5 else origin
        url = file.url or check_url(there.url)
        files.append(replace(file, url=url, size=there.size or file.size, md5=there.md5, checked_by=by))
    return replace(dataset, files=tuple(files))
