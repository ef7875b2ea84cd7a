"""Pictures that show how a training goes: reference tiles beside synthetic ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from histosynth.core.files import atomic_path

_GAP = 2


def save_panel(path: Path, rows: Sequence[Tensor]) -> Path:
    """Write rows of uint8 tiles [n, 3, S, S] as one PNG; rows may differ in length."""
    size = rows[0].shape[-1]
    columns = max(len(row) for row in rows)
    step = size + _GAP
    canvas = np.full((len(rows) * step - _GAP, columns * step - _GAP, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            canvas[r * step : r * step + size, c * step : c * step + size] = tile.permute(1, 2, 0).cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(canvas).save(temporary)
    return path
