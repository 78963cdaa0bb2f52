"""The report as one page for people: `sparsify_report.html` beside the weights.

The page is whole in itself: style sheet, charts and pictures are inside, there is no script, and its own policy forbids
the browser to fetch anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsify.blocks import BlockMask
from sparsify.stages.report import BENCHMARK, Measure, measures
from sparsify.stages.report_pictures import line_chart, mask_picture

TEMPLATE = Path(__file__).with_name("report_page.html")
# What the page shows at the most; the JSON file beside it holds all.
SHOWN_LAYERS, SHOWN_MASKS = 1000, 256
# Lists up to this length are open when the page is.
OPEN_LAYERS = 64
# Measures of which more is better, and whose change is a difference and not a share.
POINTS = {"accuracy", "spearman"}


def render(report: Mapping[str, Any], masks: Mapping[str, BlockMask]) -> str:
    """The page.

    Args:
        report: As `sparsify.stages.report.build` makes it.
        masks: Masks of the pruned weights, by name.

    Returns:
        HTML.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    # Names and texts come from checkpoints and recipes: everything that is not made here is escaped.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    recipe, columns, layers = report["recipe"], report["columns"], report["layers"]
    found = measures(columns)
    curves = [
        {**curve, "charts": [(title, Markup(svg)) for title, svg in curve["charts"]]}
        for curve in _curves(report["history"], recipe["stages"])
    ]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        recipe=recipe,
        recipe_text=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=90),
        cards=_cards(report, found),
        columns=list(columns),
        rows=[(measure.title, measure.texts, change(measure)) for measure in found],
        curves=curves,
        layers=layers[:SHOWN_LAYERS],
        masks=[_picture(name, mask) for name, mask in list(masks.items())[:SHOWN_MASKS]],
        mask_count=len(masks),
        open_layers=len(layers) <= OPEN_LAYERS,
        environment=_environment(report["environment"]),
    )


def change(measure: Measure) -> str:
    """How the last column differs from the first; empty where one of them was not measured."""
    first, last = measure.values[0], measure.values[-1]
    if len(measure.values) < 2 or first is None or last is None:
        return ""
    if measure.key in POINTS:
        return f"{last - first:+.2f}"
    if measure.key.startswith(BENCHMARK):
        return f"{last - first:+.4f}"
    return f"{last / first - 1:+.1%}" if first else ""


def _cards(report: Mapping[str, Any], found: Sequence[Measure]) -> list[tuple[str, str, str]]:
    """The few numbers that matter most: what, value, and what it was."""
    cards = []
    totals = report["totals"]
    if totals["layers"]:
        cards.append(
            ("weights removed", f"{totals['sparsity']:.1%}", f"of {totals['layers']} pruned weights")
        )
    for measure in found:
        wanted = measure.key in ("perplexity", "bytes", *POINTS) or (
            measure.key.startswith("latency") and " x " not in measure.key
        )
        texts = measure.texts
        if measure.key == "bytes":
            texts = [None if value is None else f"{value / 1e6:.2f} MB" for value in measure.values]
        last = texts[-1]
        if wanted and last is not None:
            first = texts[0] if len(texts) > 1 else None
            was = f"{first} before ({change(measure)})" if first is not None else ""
            cards.append((measure.title, last, was))
    return cards


def _curves(
    history: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Charts of each training, with what it did in words."""
    curves = []
    for entry in history:
        pruner = stages[entry["stage"]].get("pruner")
        what = f"searching with {pruner['method']}" if pruner else "healing"
        points = entry["points"]
        charts = []
        losses = [(point["step"], point["loss"]) for point in points]
        if losses:
            charts.append(("loss", line_chart(losses, "loss over optimizer steps", "{:.4g}".format)))
        shares = [(point["step"], point["sparsity"]) for point in points if "sparsity" in point]
        if shares:
            label = "share of weights removed over optimizer steps"
            charts.append(("weights removed", line_chart(shares, label, "{:.0%}".format, (0.0, 1.0))))
        curves.append({"title": f"Stage {entry['stage'] + 1}: {what}", "charts": charts})
    return curves


def _picture(name: str, mask: BlockMask) -> dict[str, Any]:
    size = f"{mask.shape[0]} x {mask.shape[1]}, {mask.block}, {mask.density:.0%} kept"
    # As wide and high as the weight, not as its grid; but a picture stays a picture.
    aspect = min(max(mask.shape[1] / mask.shape[0], 1 / 3), 3.0)
    return {"name": name, "size": size, "address": mask_picture(mask.keep), "aspect": f"{aspect:.3f}"}


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Machine and versions, as rows."""
    rows = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items() if version)
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        if key != "command" and value not in (None, ""):
            rows.append((key.replace("_", " "), str(value)))
    return rows
