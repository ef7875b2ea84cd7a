"""Films: frames as a GIF, or as an MP4 where there is an ffmpeg, and the frames of a training."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.core.files import atomic_path
from histosynth.tiles.images import read_rgb
from histosynth.tiles.pictures import FAINT, INK, font

FilmFormat = Literal["auto", "gif", "mp4"]
MAX_EDGE = 960
"""Longest edge of a frame of a film, pixels."""
MAX_FRAMES = 160
_STEP = re.compile(r"(\d+)$")


def film_suffix(kind: FilmFormat) -> str:
    """.mp4 or .gif: what `film` can write here; auto takes MP4 if there is an ffmpeg.

    Raises:
        SettingError: an unknown format, or mp4 without ffmpeg.
    """
    if kind not in ("auto", "gif", "mp4"):
        raise SettingError(f"film is {kind!r}.", "Use auto, gif or mp4.")
    if kind == "mp4" and find_ffmpeg() is None:
        raise SettingError("film is 'mp4', but there is no ffmpeg.", "Install imageio-ffmpeg or ffmpeg, or use gif.")
    return ".mp4" if kind != "gif" and find_ffmpeg() else ".gif"


def film(path: Path | str, frames: Sequence[Image.Image], seconds: float = 0.1, hold: float = 1.5) -> Path:
    """Write frames as a GIF that repeats, or as an MP4, as the suffix of the path says.

    Args:
        frames: all of one size; at most MAX_FRAMES, evenly chosen, are shown, none wider than MAX_EDGE.
        seconds: how long a frame is shown.
        hold: how long the last one is.

    Raises:
        DataError: no frame, or frames of different sizes.
        RunError: ffmpeg failed.
    """
    if not frames or len({f.size for f in frames}) != 1:
        raise DataError(f"A film got {len(frames)} frames of {len({f.size for f in frames})} sizes.", "Give one size.")
    chosen = [_limited(frames[k]) for k in evenly(len(frames), MAX_FRAMES)]
    with atomic_path(path) as temporary:
        if Path(path).suffix == ".mp4":
            _write_mp4(temporary, chosen + [chosen[-1]] * round(hold / seconds), 1 / seconds)
        else:
            # one palette for all, from frames of the whole film: a palette a frame flickers
            some = [np.asarray(chosen[k]) for k in evenly(len(chosen), 12)]
            palette = _palette(np.concatenate(some))
            indexed = [f.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for f in chosen]
            times = [round(seconds * 1000)] * (len(indexed) - 1) + [round(hold * 1000)]
            indexed[0].save(
                temporary, format="GIF", save_all=True, append_images=indexed[1:], duration=times, loop=0, disposal=1
            )
    return Path(path)


def training_frames(samples: Path | str) -> list[Image.Image]:
    """The fixed-seed grids (NAME-STEP.png) of a run's samples/ folder in order, with the step under each; may be none.

    Raises:
        DataError: a grid is damaged.
    """
    folder = Path(samples)
    found = {int(m[1]): p for p in sorted(folder.glob("*.png")) if (m := _STEP.search(p.stem))}
    if not found:
        return []
    steps = sorted(found)
    steps = [steps[k] for k in evenly(len(steps), MAX_FRAMES)]
    grids = [_limited(Image.fromarray(read_rgb(found[step])[0])) for step in steps]
    width, height = (max(g.size[k] for g in grids) for k in (0, 1))
    text = max(12, min(height // 32, 20))
    frames = []
    for step, grid in zip(steps, grids, strict=True):
        page = Image.new("RGB", (width, height + 2 * text), "white")
        page.paste(grid, (0, 0))
        pen = ImageDraw.Draw(page)
        pen.text((text // 2, height + text), f"step {step:,}".replace(",", " "), INK, font(text, True), anchor="lm")
        done = width * step / max(steps[-1], 1)
        pen.rectangle((0, height + 2 * text - 4, done, height + 2 * text), fill=(54, 116, 165))
        frames.append(page)
    return frames


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the positions 0 .. count - 1, evenly spaced, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def _palette(pixels: np.ndarray) -> Image.Image:
    """The best 253 colours, and those of paper and letters as they are."""
    best = Image.fromarray(pixels).quantize(253, Image.Quantize.MEDIANCUT).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*best[: 3 * 253], 255, 255, 255, *INK, *FAINT])
    return palette


def find_ffmpeg() -> str | None:
    """The program that writes MP4: of the package imageio-ffmpeg, else of this machine; None: there is none."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # RuntimeError: the package found no program
        return shutil.which("ffmpeg")


def _write_mp4(path: Path, frames: Sequence[Image.Image], rate: float) -> None:
    program = find_ffmpeg()
    if program is None:
        raise SettingError(f"{path.name} needs ffmpeg.", "Install imageio-ffmpeg or ffmpeg, or write a .gif.")
    width, height = frames[0].size
    command = [
        program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
        "-r", f"{rate:g}", "-i", "-", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-c:v", "libx264",
        "-crf", "16", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path),
    ]  # fmt: skip
    pixels = b"".join(np.asarray(f, dtype=np.uint8).tobytes() for f in frames)
    done = subprocess.run(command, input=pixels, capture_output=True, check=False)
    if done.returncode or not path.exists():
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RunError(f"{program} could not write {path.suffix}: {reason[0]}.", "Write a GIF instead.")


def _limited(frame: Image.Image) -> Image.Image:
    """The frame, scaled down if it is larger than a film shows."""
    scale = MAX_EDGE / max(frame.size)
    if scale >= 1:
        return frame
    return frame.resize((round(frame.width * scale), round(frame.height * scale)), Image.Resampling.LANCZOS)
