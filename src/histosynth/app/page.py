"""The pages: reports of runs, and the tiles of tile sets."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st
import streamlit.components.v1 as components

from histosynth.core.errors import HistosynthError
from histosynth.core.files import read_json
from histosynth.tiles.tileset import TileSet

_A_PAGE = 32
_COLUMNS = 8


def main(runs: Path) -> None:
    """Show what is in the folder `runs`."""
    st.set_page_config(page_title="histosynth", layout="wide")
    st.title("histosynth")
    reports = sorted((p.parent for p in runs.glob("**/report.json")), key=lambda p: -p.stat().st_mtime)
    tilesets = sorted(p.parent for p in runs.glob("**/tileset.json"))
    first, second = st.tabs([f"Reports ({len(reports)})", f"Tile sets ({len(tilesets)})"])
    with first:
        _report(runs, reports)
    with second:
        _tiles(runs, tilesets)


def _report(runs: Path, reports: list[Path]) -> None:
    if not reports:
        st.info(f"No report in {runs} yet. Make one with `histosynth demo` or `histosynth compare TILES`.")
        return
    folder = st.selectbox("Run", reports, format_func=lambda p: str(p.relative_to(runs)))
    report = read_json(folder / "report.json")
    for spoken in report.get("verdicts", []):
        {"helps": st.success, "hurts": st.error}.get(spoken["word"], st.info)(spoken["sentence"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    left, right = st.columns(2)
    left.download_button("Download the report", page, file_name=f"{folder.name}.html", mime="text/html")
    right.download_button(
        "Download the numbers", (folder / "report.json").read_bytes(), file_name=f"{folder.name}.json"
    )
    components.html(page, height=1200, scrolling=True)


def _tiles(runs: Path, tilesets: list[Path]) -> None:
    if not tilesets:
        st.info(f"No tile set in {runs} yet. Make one with `histosynth tiles import` or `histosynth generate`.")
        return
    folder = st.selectbox("Tile set", tilesets, format_func=lambda p: str(p.relative_to(runs)))
    tileset = TileSet.open(folder)
    label = st.selectbox("Class", tileset.classes)
    rows = tileset.kept[tileset.kept.label == label]
    pages = max(1, -(-len(rows) // _A_PAGE))
    number = st.number_input(f"Page (of {pages})", 1, pages)
    shown = rows.iloc[(number - 1) * _A_PAGE : number * _A_PAGE]
    st.caption(f"{len(rows)} tiles of {label}")
    columns = st.columns(_COLUMNS)
    for position, row in enumerate(shown.itertuples()):
        caption = f"seed {row.seed}" if row.generator else f"{row.patient} {row.split}"
        columns[position % _COLUMNS].image(str(tileset.folder / row.path), caption=caption)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
    except HistosynthError as error:
        st.error(str(error))
