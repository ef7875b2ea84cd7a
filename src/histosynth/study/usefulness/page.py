"""The page of the experiment, the same numbers as JSON, and a card for a model's description."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import histosynth
from histosynth.core.files import write_json, write_text
from histosynth.study.report import page_template
from histosynth.study.usefulness.tables import arms_table, columns
from histosynth.study.usefulness.view import context, where


def write_page(out: Path, result: Mapping[str, Any], command: str) -> Path:
    """Write report.json, report.md and report.html into the folder `out`; returns the page's path.

    Args:
        result: what `assess` found.
        command: the command line that repeats the experiment.

    Raises:
        RunError: the folder cannot be written.
    """
    source = result["plan"].get("source", "")
    report = {
        "title": "Do synthetic tiles help?" + (f" {source}" if source else ""),
        "verb": "utility",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": histosynth.__version__,
        "command": command,
        **result,
    }
    write_json(out / "report.json", report)
    write_text(out / "report.md", card(report))
    write_text(out / "report.html", page_template("usefulness.html.j2").render(context(report)))
    return out / "report.html"


def card(report: Mapping[str, Any]) -> str:
    """The result on half a page of Markdown."""
    primary = report["primary"]
    lines = [f"# {report['title']}", ""]
    lines += [f"- **{v['word']}**: {v['sentence']}" for v in report["verdicts"]] or ["- No generator was compared."]
    lines += ["", f"Taken at {where(report)}. Baseline: {primary['baseline']}.", ""]
    titles = [title for _, title, _ in columns(report)]
    lines += [f"| Training set | Real | Synthetic | {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) + 2)}"]
    for row in arms_table(report):
        cells = [c["text"] + (f" ({c['interval']})" if c["interval"] else "") for c in row["cells"]]
        lines.append(f"| {row['title']} | {row['real']} | {row['made']} | {' | '.join(cells)} |")
    if grave := [c["text"] for c in report["cautions"] if c["severity"] != "note"]:
        lines += ["", "Before you rely on this:", "", *(f"- {text}" for text in grave)]
    return "\n".join([*lines, "", f"histosynth {report['version']}: `{report['command']}`", ""])
