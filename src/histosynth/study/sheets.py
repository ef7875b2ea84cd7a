"""Sheets of tiles: the pictures of the report, and the same sheet as one PNG."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from histosynth.core.files import atomic_path

# Lossless while it fits. JPEG blocks must not pass for a generator's artefacts: full chroma, high quality.
_ENCODINGS = ((160, "PNG", 0), (160, "JPEG", 95), (128, "JPEG", 93), (96, "JPEG", 92), (64, "JPEG", 90))


@dataclass(frozen=True)
class Encoded:
    """Pictures as data URIs, in the order given, and how they were stored."""

    uris: list[str]
    how: str


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a data URI of MIME type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def montage(tiles: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Tiles uint8 [n, 3, S, S] on a white grid of `columns`: uint8 [H, W, 3]; missing places stay white."""
    tiles = np.asarray(tiles, dtype=np.uint8)
    n, _, height, width = tiles.shape
    rows = max(1, -(-n // columns))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = tile.transpose(1, 2, 0)
    return sheet


def columns_for(sources: int) -> int:
    """Tiles side by side in each source's block, so that up to twelve fill the width of a page."""
    return max(2, min(4, 12 // max(sources, 1)))


def encode_sheets(groups: Sequence[tuple[np.ndarray, int]], budget: int) -> Encoded:
    """Montages as data URIs of at most `budget` bytes together, as PNG if that fits, else as good JPEG.

    Args:
        groups: (tiles uint8 [n, 3, S, S], columns) for each picture.
        budget: bytes before base64; the last resort is used even if it is over.
    """
    size = max((tiles.shape[-1] for tiles, _ in groups), default=0)
    contents: list[bytes] = []
    how = kind = "PNG"
    for limit, kind, quality in _ENCODINGS:
        if kind == "JPEG" and limit > size and limit != 160:
            continue  # nothing would shrink: the same bytes as the attempt before
        contents = [_encode(montage(_shrunk(tiles, limit), columns), kind, quality) for tiles, columns in groups]
        scale = f", scaled from {size} to {limit} pixels" if size > limit else ""
        how = f"PNG{scale}" if kind == "PNG" else f"JPEG at quality {quality}{scale}"
        if sum(map(len, contents)) <= budget:
            break
    return Encoded([data_uri(content, f"image/{kind.lower()}") for content in contents], how)


def write_sheet_png(
    path: Path | str,
    samples: Mapping[str, Mapping[str, np.ndarray]],
    classes: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str] | None = None,
    columns: int | None = None,
    rows: int = 1,
) -> Path:
    """The sample sheet as a PNG of its own: a row a class, a group of tiles a source.

    Args:
        samples: source -> class label -> uint8 [n, 3, S, S].
        classes: {"label", "name", "colour"} for each row.
        titles: source -> heading; the source's own name where it is missing.
        columns: tiles side by side for each source.
        rows: rows of tiles for each class.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = [source for source in samples if any(len(tiles) for tiles in samples[source].values())]
    shown = [c for c in classes if any(len(samples[s].get(c["label"], ())) for s in sources)]
    columns = columns or columns_for(len(sources))
    tile, label, gap, head = 0.85, 1.75, 0.22, 0.5  # inches
    block_w, block_h = tile * columns, tile * rows
    width = label + len(sources) * (block_w + gap)
    height = head + max(len(shown), 1) * (block_h + 0.12)
    with rc_context({"text.parse_math": False, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        for i, source in enumerate(sources):
            x = (label + i * (block_w + gap)) / width
            title = (titles or {}).get(source, source)
            figure.text(x, 1 - 0.26 / height, title, fontsize=13, fontweight="bold", color="#1f2933", va="center")
        for j, entry in enumerate(shown):
            bottom = height - head - (j + 1) * (block_h + 0.12) + 0.12
            middle = (bottom + block_h / 2) / height
            figure.add_artist(_swatch(figure, 0.1 / width, middle, 0.1 / width, 0.36 / height, entry["colour"]))
            figure.text(0.3 / width, middle + 0.09 / height, _short(entry["label"], 14), fontsize=12,
                        fontweight="bold", color="#1f2933", va="center")  # fmt: skip
            if entry.get("name") and entry["name"] != entry["label"]:
                name = "\n".join(textwrap.wrap(entry["name"], 22, max_lines=2, placeholder="…"))
                figure.text(0.3 / width, middle - 0.04 / height, name, fontsize=8.5, color="#56616b", va="top")
            for i, source in enumerate(sources):
                tiles = samples[source].get(entry["label"])
                if tiles is None or not len(tiles):
                    continue
                sheet = montage(np.asarray(tiles)[: columns * rows], columns)
                used = min(block_h, sheet.shape[0] / sheet.shape[1] * block_w)
                box = (label + i * (block_w + gap), bottom + (block_h - used) / 2, block_w, used)
                axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
                axes.imshow(sheet, aspect="auto", interpolation="lanczos")
                axes.set_axis_off()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    return Path(path)


def _swatch(figure: Any, x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y - height / 2), width, height, facecolor=colour, transform=figure.transFigure)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _shrunk(tiles: np.ndarray, limit: int) -> np.ndarray:
    if tiles.shape[-1] <= limit:
        return tiles
    small = [
        np.asarray(Image.fromarray(t.transpose(1, 2, 0)).resize((limit, limit), Image.Resampling.LANCZOS))
        for t in np.asarray(tiles, dtype=np.uint8)
    ]
    return np.stack(small).transpose(0, 3, 1, 2)


def _encode(image: np.ndarray, kind: str, quality: int) -> bytes:
    stream = io.BytesIO()
    if kind == "PNG":
        Image.fromarray(image).save(stream, "PNG", optimize=False, compress_level=6)
    else:
        Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()
