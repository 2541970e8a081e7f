"""Results as Markdown tables and plots, from the cells that are there."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5.tinyworld.experiments.comparisons import Comparison, Sizes, Variant
from minigpt5.tinyworld.experiments.intervals import Interval, mean_interval
from minigpt5.tinyworld.experiments.plan import Cell
from minigpt5.tinyworld.quality import MEANINGS
from minigpt5.tinyworld.stories import STORY_LENGTH

RESULTS, FIGURES = "results.md", "figures"
Found = Mapping[str, Mapping[str, Interval]]
"""Variant → measure → mean over seeds."""


def write_report(
    folder: Path,
    cells: Mapping[str, Sequence[Cell]],
    comparisons: Sequence[Comparison],
    sizes: Sizes,
    command: str,
    missing: Mapping[str, str],
) -> Path:
    """Write ``results.md`` with a table and a plot for each comparison that has a result.

    Args:
        folder: where to; figures go below it.
        cells: comparison → its cells.
        comparisons: what to show, in order; those without any result are left out.
        sizes: of the trainings.
        command: the command line that made the results.
        missing: name of each cell without a result → why.
    """
    lines = [*_preface(sizes, command), *_missing(missing)]
    for comparison in comparisons:
        found = collect(cells[comparison.name])
        if not found:
            continue
        figure = folder / FIGURES / f"{comparison.name}.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw(comparison, found, figure)
        lines += [f"## {comparison.title}", "", *table(comparison, found), ""]
        lines += [f"Counted of each training: {counted(comparison, cells[comparison.name])}.", ""]
        lines += [f"![{comparison.title}]({FIGURES}/{figure.name})", ""]
    path = folder / RESULTS
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def collect(cells: Sequence[Cell]) -> dict[str, dict[str, Interval]]:
    """Return variant → measure → mean over the seeds that have a result."""
    values: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        result: dict[str, Any] = cell.result() or {"measures": {}}
        for name, share in result["measures"].items():
            values.setdefault(cell.variant, {}).setdefault(name, []).append(share["value"])
    return {
        variant: {name: mean_interval(shares) for name, shares in measures.items()}
        for variant, measures in values.items()
    }


def counted(comparison: Comparison, cells: Sequence[Cell]) -> str:
    """Return how many things, sentences or replies each measure of a training is a share of."""
    totals: dict[str, set[int]] = {name: set() for name in comparison.measures}
    for cell in cells:
        measures: dict[str, Any] = (cell.result() or {"measures": {}})["measures"]
        for name in totals.keys() & measures.keys():
            totals[name].add(measures[name]["total"])
    shown = {name: " or ".join(map(str, sorted(found))) for name, found in totals.items() if found}
    return ", ".join(f"{count} ({MEANINGS[name]})" for name, count in shown.items())


def table(comparison: Comparison, found: Found) -> list[str]:
    """Return the lines of a Markdown table, a row for each variant; what has no result is a dash."""
    rows = [["", *(MEANINGS[name] for name in comparison.measures), "seeds"]]
    rows.append(["---", *("---:" for _ in comparison.measures), "---:"])
    for variant in comparison.variants:
        measures = found.get(variant.label, {})
        shown = [str(measures[name]) if name in measures else "–" for name in comparison.measures]
        counts = {measures[name].count for name in comparison.measures if name in measures}
        rows.append([variant.label, *shown, str(max(counts, default=0))])
    return [f"| {' | '.join(row)} |" for row in rows]


def draw(comparison: Comparison, found: Found, path: Path) -> None:
    """Plot the first measure over the variants: lines over a number, else bars."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    measure = comparison.measures[0]
    shown = [variant for variant in comparison.variants if measure in found.get(variant.label, {})]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    if comparison.axis:
        for line in dict.fromkeys(variant.line for variant in shown):
            part = [variant for variant in shown if variant.line == line]
            places = [variant.x or 0.0 for variant in part]
            means, halves = _values(part, found, measure)
            axes.errorbar(places, means, yerr=halves, marker="o", capsize=3, label=line or None)
            axes.set_xticks(sorted({variant.x or 0.0 for variant in shown}))
        if any(variant.line for variant in shown):
            axes.legend()
        axes.set_xlabel(comparison.axis)
        axes.set_ylabel(_axis_label(measure))
    else:
        means, halves = _values(shown, found, measure)
        axes.barh([variant.label for variant in shown], means, xerr=halves, capsize=3, height=0.6)
        axes.invert_yaxis()
        axes.set_xlabel(_axis_label(measure))
    axes.set_title(comparison.title, loc="left")
    (axes.set_ylim if comparison.axis else axes.set_xlim)(0, 100)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _values(variants: Sequence[Variant], found: Found, measure: str) -> tuple[list[float], list[float]]:
    """Return means and half intervals in per cent; of one seed no number, which draws no bar."""
    intervals = [found[variant.label][measure] for variant in variants]
    halves = [math.nan if one.half is None else 100 * one.half for one in intervals]
    return [100 * one.mean for one in intervals], halves


def _axis_label(measure: str) -> str:
    return f"{MEANINGS[measure]}, %".replace(": ", ":\n")


def _preface(sizes: Sizes, command: str) -> list[str]:
    return [
        "# The paper's comparisons on the tiny world",
        "",
        "Shares in per cent on held-out combinations of attributes, read off the pictures by the tiny world's "
        "recogniser; ± is half the 95 % interval of the mean over seeds by Student's t. They say which way a "
        "setting works at this size, not how much it does at 7B.",
        "",
        f"```bash\n{command}\n```",
        "",
        f"Stage 1: {sizes.captions} captioned pictures, {sizes.steps[0]} steps. Stage 2: {sizes.stories} stories, "
        f"{sizes.steps[1]} steps at a learning rate of {sizes.stage2_rate:g}, the language loss weighted "
        f"{sizes.stage2_text_weight:g}. {sizes.batch_size} samples a step. "
        f"Held out: {sizes.held_out} captions, {math.ceil(sizes.held_out / STORY_LENGTH)} stories.",
        "",
    ]


def _missing(missing: Mapping[str, str]) -> list[str]:
    if not missing:
        return []
    listed = [f"- {name}: {reason}" for name, reason in missing.items()]
    return [f"**{len(missing)} cells have no result:**", "", *listed, ""]
