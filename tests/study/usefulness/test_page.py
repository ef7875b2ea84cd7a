"""The page says what the numbers say, stands alone, and puts up with the least experiment."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from histosynth.core.files import read_json, write_json
from histosynth.study.usefulness.assess import assess
from histosynth.study.usefulness.page import write_page
from histosynth.study.usefulness.view import context
from tests.study.usefulness.contract import CLASSES, made_up

COMMAND = "histosynth utility real gan diffusion --out <here>"


class _Page(HTMLParser):
    """Collects text, ids, links, picture sources and alternative texts; complains of tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.ids, self.links, self.pictures, self.open = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        if tag == "img":
            self.pictures.append((found["src"], found["alt"]))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    made_up(out, {"gan": 0.0, "diffusion": 0.4}, numbers=(5, 20, 0), shares=(0.3, 0.6), external=True, rare_gain=0.3)
    result = assess(out, seed=1, replicates=300)
    page = write_page(out, result, COMMAND)
    return out, result, _Page(page.read_text(encoding="utf-8"))


def test_the_page_opens_with_the_verdicts_and_their_sentences(written):
    _, result, page = written
    for spoken in result["verdicts"]:
        assert spoken["sentence"] in page.text and spoken["word"].capitalize() in page.text
    places = [page.text.index(words) for words in (result["verdicts"][0]["sentence"], "How to read it", "To repeat it")]
    assert places == sorted(places)
    assert "<here>" in page.text and "filled signs are beyond chance" in page.text


def test_the_page_stands_alone_and_its_links_lead_somewhere(written):
    _, _, page = written
    assert all(source.startswith("data:image/svg+xml") and alt for source, alt in page.pictures)
    assert len(page.pictures) >= 8
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert len(set(page.ids)) == len(page.ids)


def test_pictures_have_the_numbers_in_words(written):
    _, result, page = written
    forest = next(alt for _, alt in page.pictures if alt.startswith("Forest plot"))
    for spoken in result["verdicts"]:
        assert f"{100 * spoken['mean']:+.1f}".replace("-", "−") in forest
    assert "selected GAN" in forest and "only" not in forest  # synthetic tiles alone are far off
    gains = next(alt for _, alt in page.pictures if alt.startswith("Differences in the recall"))
    assert all(label in gains for label in CLASSES)


def test_the_same_numbers_are_in_the_json_and_on_the_card(written):
    out, result, _ = written
    report = read_json(out / "report.json")
    assert report["verdicts"] == json.loads(json.dumps(result["verdicts"])) and report["command"] == COMMAND
    card = (out / "report.md").read_text(encoding="utf-8")
    assert all(f"**{v['word']}**: {v['sentence']}" in card for v in result["verdicts"])
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 9 and len({line.count("|") for line in rows}) == 1


def test_rows_that_flatter_are_marked(written):
    _, result, page = written
    worth = context(result | {"created": "", "version": "", "title": "", "command": ""})["worth"]
    assert worth["rows"] and all("†" in cell["text"] for row in worth["rows"] for cell in row["cells"])
    assert "†: the generator had learned from more real tiles" in page.text


def test_the_least_experiment_has_a_page(tmp_path):
    plan = made_up(tmp_path, {"new": -0.5}, numbers=(0,), seeds=(1,), patients=3)
    plan["generators"][0]["title"] = "<b>new</b>"
    plan["rare"], plan["notes"] = [], ["<script>alert(1)</script>"]
    write_json(tmp_path / "plan.json", plan)
    (tmp_path / "extra.json").unlink()
    result = assess(tmp_path, seed=0, replicates=200)
    text = write_page(tmp_path, result, "").read_text(encoding="utf-8")
    page = _Page(text)
    assert "<script>" not in text and "<b>new" not in text.lower()
    assert "there is no curve" in page.text and "Fewer than five patients" in page.text
    for path in (tmp_path / "cells").glob("real_new*"):
        path.unlink()
    result = assess(tmp_path, seed=0, replicates=200)
    assert "No verdict" in _Page(write_page(tmp_path, result, "").read_text(encoding="utf-8")).text
