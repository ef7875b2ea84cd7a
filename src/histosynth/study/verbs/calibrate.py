"""The verb that calibrates predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.classify.predictions import read_predictions
from histosynth.core.progress import say
from histosynth.study.calibration.run import CalibrateConfig, calibrate_predictions
from histosynth.study.compare import spell


def calibrate(
    predictions: Path, out: Path, *, config: Annotated[CalibrateConfig, Parameter(name="*")] = CalibrateConfig()
) -> Path:
    """Fit temperature, vector, isotonic scaling and conformal sets on val, and measure them on the other splits.

    Args:
        predictions: a CSV with split,image_path,y_true,y_pred,top1_conf,logits_json and, better, patient; `train
            classifier` writes one.
        out: folder to write calibration.json, the calibrators, conformal.json, diagrams and a page to.
    """
    command = spell("calibrate", [predictions, out], config)
    page = calibrate_predictions(read_predictions(predictions), out, config, command)
    say(f"Page: {page}")
    return page
