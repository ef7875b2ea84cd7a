"""The verb that downloads public tiles."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.errors import SettingError
from histosynth.study.verbs.show import print_table
from histosynth.tiles.download.catalogue import find, load_catalogue, size_text
from histosynth.tiles.download.job import DownloadConfig
from histosynth.tiles.download.job import download as download_tiles


def download(
    name: str | None = None,
    out: Path | None = None,
    *,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    config: Annotated[DownloadConfig, Parameter(name="*")] = DownloadConfig(),
) -> None:
    """Download a public data set, resumable and verified; without a name, list what there is.

    Args:
        name: data set, such as crc-val-he-7k.
        out: folder for it.
        list_: list the data sets with size, licence and citation.
    """
    from rich.console import Console

    if list_ or name is None:
        _list(config)
        return
    if out is None:
        find(name, load_catalogue(config.catalogue))  # a wrong name is the first thing to say
        raise SettingError("There is no folder to download to.", f"histosynth tiles download {name} FOLDER")
    source = download_tiles(name, out, config)
    import_ = f"histosynth tiles import {shlex.quote(str(source))} TILES"
    Console().print(f"Ready: {source}\nNext:  {import_}", highlight=False, markup=False, soft_wrap=True)


def _list(config: DownloadConfig) -> None:
    from rich.console import Console

    catalogue = load_catalogue(config.catalogue)
    rows = [
        [d.name, size_text(d.size), f"{d.tiles:,}", d.licence + (f", {d.terms}" if d.terms else ""), d.about_it]
        for d in catalogue.values()
    ]
    print_table(["name", "size", "tiles", "licence", "what"], rows)
    citations: dict[str, list[str]] = {}
    for dataset in catalogue.values():
        citations.setdefault(dataset.citation, []).append(dataset.name)
    for citation, names in citations.items():
        Console().print(f"{', '.join(names)}: {citation}", highlight=False, markup=False)
