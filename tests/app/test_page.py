"""The pages show reports and tiles, and say what to do when there is nothing."""

from pathlib import Path

import pytest

from histosynth.core.files import write_json, write_text
from histosynth.tiles.simulate import PhantomConfig, simulate

testing = pytest.importorskip("streamlit.testing.v1")


def show(runs: Path):
    script = f"from pathlib import Path\nfrom histosynth.app.page import main\nmain(Path({str(runs)!r}))"
    return testing.AppTest.from_string(script, default_timeout=60).run()


def test_an_empty_folder_says_what_to_do(tmp_path):
    page = show(tmp_path)
    assert not page.exception
    assert "histosynth demo" in page.info[0].value and "histosynth generate" in page.info[1].value


def test_reports_and_tiles_are_shown(tmp_path):
    simulate(tmp_path / "tiles", PhantomConfig(per_class=4, patients=3, size=32))
    spoken = {"word": "helps", "sentence": "GAN helps: balanced accuracy +4.1 points."}
    write_json(tmp_path / "run" / "report.json", {"verdicts": [spoken]})
    write_text(tmp_path / "run" / "report.html", "<p>the page</p>")
    page = show(tmp_path)
    assert not page.exception
    assert page.success[0].value == spoken["sentence"]
    assert page.selectbox[1].options == ["tiles"] and "TUM" in page.selectbox[2].options
    page.selectbox[2].select("TUM").run()
    assert not page.exception and "tiles of TUM" in page.caption[0].value
