"""Write ``results.json``, ``results_dict.json`` and ``report.html`` beside the predictions they are of."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from minigpt5.metrics.catalogue import explain
from minigpt5.metrics.relevance import show_vokens
from minigpt5.metrics.scores import Coverage, SampleValues, Scores
from minigpt5.predictions import LEFT_OUT_FILE, Prediction, count_left_out

RESULTS_FILE = "results.json"
PUBLISHED_FILE = "results_dict.json"
REPORT_FILE = "report.html"
Value = TypeVar("Value")
GALLERY_SIZE = 100
"""Predictions shown in the report; the scores are over all of them."""

_STYLE = """
:root { --ink: #1d2433; --soft: #667085; --line: #e4e7ec; --tint: #f7f8fa; --accent: #3b5bdb; --warn: #b54708; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, "Segoe UI", sans-serif; color: var(--ink); background: var(--tint); }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 12px; }
p.lead { color: var(--soft); margin: 4px 0 0; }
.card, article { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 4px 18px; }
.card { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 9px 12px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } th { font-weight: 600; color: var(--soft); font-size: 13px; }
td.number { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }
td.soft, .soft { color: var(--soft); } td.arrow { white-space: nowrap; }
code { font: 12px ui-monospace, monospace; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; }
.cards .card { padding: 14px 18px; } .cards b { display: block; font-size: 22px; } .warn { color: var(--warn); }
article { padding: 16px 18px; margin: 0 0 14px; }
article h3 { font-size: 14px; margin: 0 0 10px; } article h3 span { font-weight: 400; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 18px; }
.columns h4 { font-size: 12px; margin: 0 0 6px; color: var(--soft); text-transform: uppercase; }
.columns p { margin: 0 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 220px;
  overflow-y: auto; }
.columns img { width: 100%; max-width: 220px; border-radius: 6px; border: 1px solid var(--line); display: block;
  margin: 0 0 8px; } .inputs { display: flex; flex-wrap: wrap; gap: 6px; } .inputs img { width: 84px; }
.chips { margin: 10px 0 0; }
.chips span { display: inline-block; font-size: 12px; padding: 1px 8px; margin: 0 6px 4px 0; border-radius: 999px;
  background: var(--tint); border: 1px solid var(--line); color: var(--soft); }
"""


def write_report(folder: Path, predictions: Sequence[Prediction], scores: Scores) -> Path:
    """Write the three files into the prediction store and return the report's path."""
    left_out = count_left_out(folder)
    _write_json(folder / RESULTS_FILE, describe_scores(predictions, scores) | {"records_left_out": left_out})
    _write_json(folder / PUBLISHED_FILE, scores.published)
    path = folder / REPORT_FILE
    path.write_text(render_report(folder.name, predictions, scores, left_out), encoding="utf-8")
    return path


def describe_scores(predictions: Sequence[Prediction], scores: Scores) -> dict[str, Any]:
    """Return everything in ``results.json``, as plain values; a score that could not be made is null."""
    described = {}
    for name, score in scores.scores.items():
        meaning = explain(name)
        described[name] = asdict(score) | {
            "better": meaning.better,
            "description": meaning.text,
            "network": scores.networks.get(meaning.network or ""),
        }
    coverage = asdict(scores.coverage) | {
        "image_missing_rate": scores.coverage.image_missing_rate,
        "text_missing_rate": scores.coverage.text_missing_rate,
    }
    samples = [
        {"id": prediction.id} | values for prediction, values in zip(predictions, scores.samples, strict=True)
    ]
    return {
        "dataset": scores.dataset,
        "scores": described,
        "coverage": coverage,
        "networks": scores.networks,
        "notes": scores.notes,
        "published": scores.published,
        "samples": samples,
    }


def render_report(title: str, predictions: Sequence[Prediction], scores: Scores, left_out: int = 0) -> str:
    """Return the report as one HTML page; pictures are links relative to the prediction store.

    Args:
        title: heading.
        predictions: what was scored.
        scores: the scores.
        left_out: records of the test file that could not be used and have no prediction.
    """
    shown = list(zip(predictions, scores.samples, strict=True))[:GALLERY_SIZE]
    more = f"The first {len(shown)} of {len(predictions)}." if len(shown) < len(predictions) else ""
    notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in scores.notes)
    if left_out:
        notes += (
            f'<p class="warn">{left_out} records of the test file could not be used and are in no score: '
            f'<a href="{LEFT_OUT_FILE}">{LEFT_OUT_FILE}</a></p>'
        )
    heading = f"{escape(title)}: {escape(scores.dataset)} scores"
    gallery = "".join(_article(prediction, values) for prediction, values in shown)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{heading}</h1><p class="lead">{scores.coverage.predictions} predictions</p>{notes}'
        f"<h2>Coverage</h2>{_coverage(scores.coverage)}"
        f"<h2>Scores</h2>{_score_table(scores)}"
        f"<h2>Feature networks</h2>{_network_table(scores)}"
        "<h2>Figures of the published evaluation</h2>"
        f'<p class="soft">Computed as the published code does, under its names (results_dict.json).</p>'
        f"{_published_table(scores)}"
        f'<h2>Predictions</h2><p class="soft">{more}</p>{gallery}'
        "</main></body></html>\n"
    )


def possible(values: Mapping[str, Value], scores: Scores) -> dict[str, Value]:
    """Return the named values that can exist: a baseline's only where some prediction has a baseline picture."""
    if scores.coverage.baseline_images:
        return dict(values)
    return {name: value for name, value in values.items() if not re.search("base?line", name)}


def format_value(value: float | None) -> str:
    """Return a score as text; a dash if there is none."""
    return "–" if value is None else f"{value:.4f}"


def _coverage(coverage: Coverage) -> str:
    entries = [
        ("pictures made where wanted", coverage.wanted_images - coverage.missing_images, coverage.wanted_images),
        ("pictures made unasked", coverage.extra_images, coverage.predictions - coverage.wanted_images),
        ("texts made where wanted", coverage.wanted_texts - coverage.missing_texts, coverage.wanted_texts),
        ("texts made unasked", coverage.extra_texts, coverage.predictions - coverage.wanted_texts),
    ]
    if coverage.baseline_images:
        entries.append(("baseline pictures", coverage.baseline_images, coverage.predictions))
    cards = []
    for label, count, total in entries:
        if total:
            text = f'<span class="soft">{label} ({count / total:.0%})</span>'
            cards.append(f'<div class="card"><b>{count} of {total}</b>{text}</div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _score_table(scores: Scores) -> str:
    rows = []
    for name, score in possible(scores.scores, scores).items():
        meaning = explain(name)
        if meaning.is_published:
            continue
        arrow = "↑ higher" if meaning.better == "higher" else "↓ lower"
        over = f"{score.count} of {score.total} {score.unit}"
        warning = ' class="warn"' if score.count < score.total else ' class="soft"'
        rows.append(
            f'<tr><td>{escape(meaning.title)}<br><code class="soft">{escape(name)}</code></td>'
            f'<td class="number">{format_value(score.value)}</td><td class="soft arrow">{arrow}</td>'
            f'<td{warning}>{over}</td><td class="soft">{escape(meaning.text)}</td>'
            f'<td class="soft">{escape(meaning.network or "none")}</td></tr>'
        )
    header = "<tr><th>Score</th><th>Value</th><th>Better</th><th>Over</th><th>Meaning</th><th>Network</th></tr>"
    return f'<div class="card"><table>{header}{"".join(rows)}</table></div>'


def _network_table(scores: Scores) -> str:
    rows = [
        f"<tr><td>{escape(use)}</td><td><code>{escape(label)}</code></td></tr>"
        for use, label in scores.networks.items()
    ]
    return f'<div class="card"><table>{"".join(rows)}</table></div>'


def _published_table(scores: Scores) -> str:
    rows = [
        f'<tr><td><code>{escape(name)}</code></td><td class="number">{format_value(value)}</td></tr>'
        for name, value in possible(scores.published, scores).items()
    ]
    return f'<div class="card"><table>{"".join(rows)}</table></div>'


def _article(prediction: Prediction, values: SampleValues) -> str:
    inputs = "".join(_picture(name, "input picture") for name in prediction.input_images)
    columns = [
        _column("Prompt", prediction.prompt, f'<div class="inputs">{inputs}</div>' if inputs else ""),
        _column("Generated", show_vokens(prediction.text), _pictures(prediction.images, "generated picture")),
        _column("Wanted", show_vokens(prediction.target), _pictures(prediction.target_images, "wanted picture")),
    ]
    if prediction.baseline_image:
        picture = _picture(prediction.baseline_image, "baseline picture")
        columns.append(_column("Baseline (Stable Diffusion)", prediction.caption or "no caption", picture))
    chips = "".join(
        f"<span>{escape(name)} {value:.3f}</span>"
        for name, value in values.items()
        if value is not None and not name.startswith("published_")
    )
    task = f'<span class="soft"> · {escape(prediction.task)}</span>'
    return (
        f"<article><h3>{escape(prediction.id)}{task}</h3>"
        f'<div class="columns">{"".join(columns)}</div><div class="chips">{chips}</div></article>'
    )


def _column(title: str, text: str, pictures: str) -> str:
    words = f"<p>{escape(text)}</p>" if text.strip() else '<p class="soft">no text</p>'
    return f"<div><h4>{escape(title)}</h4>{pictures}{words}</div>"


def _pictures(names: Sequence[str], description: str) -> str:
    if not names:
        return '<p class="soft">no picture</p>'
    return "".join(_picture(name, description) for name in names)


def _picture(name: str, description: str) -> str:
    return f'<img loading="lazy" src="{escape(quote(name))}" alt="{escape(description)}">'


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
