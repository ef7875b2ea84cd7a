"""The verb that opens the browser pages."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from histosynth.core.errors import HistosynthError


def app(runs: Path = Path("runs"), *, port: int = 8501) -> None:
    """Look at reports and tile sets in the browser.

    Args:
        runs: folder whose runs and tile sets are shown.
        port: port on this machine.
    """
    if find_spec("streamlit") is None:
        raise HistosynthError(
            "The browser pages need streamlit, which is not installed.", "pip install 'histosynth[app]'"
        )
    page = Path(__file__).with_name("page.py")
    options = ["--server.port", str(port), "--server.address", "localhost", "--server.fileWatcherType", "none"]
    options += ["--browser.gatherUsageStats", "false"]
    subprocess.run([sys.executable, "-m", "streamlit", "run", str(page), *options, "--", str(runs)], check=False)
