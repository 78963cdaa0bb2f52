"""The report's page: what it shows, that it is whole in itself, and how it looks in a real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from sparsify import pipeline
from sparsify.blocks import BlockMask, BlockShape
from sparsify.recipe.schema import Recipe
from sparsify.stages.report import layer_entry, totals
from sparsify.stages.report_page import render
from sparsify.stages.report_pictures import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    line_chart,
    mask_picture,
    ticks,
)
from tests.cli import checkpoints
from tests.core.test_pipeline import Notes

VOID = {"meta", "img", "br", "i/", "circle/", "line/", "polyline/"}


class Page(HTMLParser):
    """Reads a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with a search, healing, and two evaluations."""
    place = tmp_path_factory.mktemp("run")
    pipeline.run(recipe(place))
    return place


def recipe(place: Path, out: str = "out") -> Recipe:
    if not (place / "dense").exists():
        checkpoints.llama(place / "dense")
    data = {"path": str(checkpoints.text(place)), "length": 32, "samples": 32}
    search = {"method": "group_lasso", "block": "32x32", "sparsity": 0.6, "until": 0.75}
    stages = [
        {"stage": "evaluate", "latency_tokens": [4]},
        {"stage": "finetune", "steps": 16, "batch": 4, "save_steps": 4, "pruner": search},
        {"stage": "finetune", "steps": 3, "batch": 4, "heal": "masked"},
        {"stage": "convert"},
        {"stage": "evaluate", "latency_tokens": [4, 2], "latency_batches": [3, 1, 2]},
        {"stage": "report"},
    ]
    values = {
        "name": "search",
        "description": "find, <i>then heal</i> & measure",
        "model": str(place / "dense"),
    }
    return Recipe.from_dict(
        {
            "version": 1,
            **values,
            "out": str(place / out),
            "data": {"train": data, "eval": data},
            "stages": stages,
        }
    )


def read(folder: Path) -> tuple[Page, dict[str, Any]]:
    report = json.loads((folder / "out" / "sparsify_report.json").read_text())
    return Page((folder / "out" / "sparsify_report.html").read_text()), report


def test_the_page_shows_what_the_report_holds(folder):
    page, report = read(folder)
    for column in report["columns"].values():
        assert f"{column['quality']['perplexity']:.2f}" in page.text
        assert f"{column['bytes']:,}" in page.text and f"{column['latency']['4'] * 1e3:.2f} ms" in page.text
    last = report["columns"]["recovered"]
    assert set(last["latency"]) == {"2", "4"} and set(last["latency_batches"]) == {"2", "3"}
    assert f"{last['latency_batches']['3']['4'] * 1e3:.2f} ms" in page.text
    titles = re.findall(r"latency, [\dx ]+tokens?", page.text[page.text.index("peak memory") :])
    assert titles == [f"latency, {size}{count} tokens" for size in ("", "2 x ", "3 x ") for count in (2, 4)]
    first, last = (column["bytes"] for column in report["columns"].values())
    assert f"{last / first - 1:+.1%}" in page.text
    widths = [style.removeprefix("width: ") for tag in page.all("i") if (style := tag.get("style"))]
    assert widths == [f"{100 * layer['density']:.1f}%" for layer in report["layers"]]
    pictures = page.all("img")
    assert [image["alt"] for image in pictures] == [
        f"blocks kept in {entry['name']}" for entry in report["layers"]
    ]
    for name in (layer["name"] for layer in [*report["layers"], *report["kept_dense"]]):
        assert name in page.text
    assert report["environment"]["command"] in page.text and report["environment"]["cpu"] in page.text
    text = page.text[page.text.index("version: 1") :]
    assert "method: group_lasso" in text and "description: find, <i>then heal</i> & measure" in text
    assert "Stage 2: searching with group_lasso" in page.text and "Stage 3: healing" in page.text
    assert len(page.all("polyline")) == 4


def test_the_history_tells_how_sparsity_grows(folder):
    _, report = read(folder)
    search, heal = ([point["sparsity"] for point in entry["points"]] for entry in report["history"])
    assert len(search) == 16 and search == sorted(search) and search[0] < 0.2
    assert search[11:] == pytest.approx([report["totals"]["sparsity"]] * 5)  # the cut is after step 12
    assert 0.05 < search[5] < search[11]
    assert heal == pytest.approx([report["totals"]["sparsity"]] * 3)


def test_a_resumed_run_has_the_same_history(folder, tmp_path):
    shutil.copytree(folder / "dense", tmp_path / "dense")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe(tmp_path), progress=Notes("training", 10))
    result = pipeline.run(recipe(tmp_path), resume=True)
    assert result.report is not None and result.report["history"] == read(folder)[1]["history"]


def test_the_page_needs_nothing_from_elsewhere(folder):
    page, _ = read(folder)
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "base", "form", "video", "a"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all(
            value.startswith("data:image/png") for key, value in attributes.items() if key == "src" and value
        )
    text = (folder / "out" / "sparsify_report.html").read_text()
    assert "url(" not in text and "@import" not in text and "http" not in re.sub("http-equiv", "", text)
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def hostile() -> tuple[dict[str, Any], dict[str, BlockMask]]:
    attack = '"><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>'
    masks = {attack: BlockMask(torch.eye(4, 6) > 0, (60, 96), BlockShape(16, 16))}
    report = {
        "sparsify": "1",
        "environment": {"cpu": attack, "gpu": [attack], "versions": {"torch": attack}, "command": attack},
        "recipe": {"name": attack, "model": attack, "description": attack, "stages": [{"stage": attack}]},
        "layers": [layer_entry(name, mask, True, 4) for name, mask in masks.items()],
        "kept_dense": [{"name": attack, "shape": [1], "reason": attack}],
        "totals": totals(masks),
        "columns": {attack: {"bytes": 12}, "other": {"parameters": 3, "quality": {"accuracy": 0.0}}},
        "history": [{"stage": 0, "points": [{"step": 5, "loss": 2.0}]}, {"stage": 0, "points": []}],
        "notes": [attack],
    }
    return report, masks


def test_names_cannot_bring_markup_along():
    text = render(*hostile())
    page = Page(text)
    assert page.text.count("<script>alert(1)</script>") > 8
    assert "script" not in {tag for tag, _ in page.tags} and len(page.all("img")) == 1
    assert len(page.all("circle")) == 1  # one loss has no line, but a dot


def test_a_report_of_nothing_but_numbers_is_a_page():
    report, _ = hostile()
    report |= {
        "layers": [],
        "kept_dense": [],
        "columns": {},
        "history": [],
        "notes": [],
        "totals": totals({}),
    }
    page = Page(render(report, {}))
    assert "How it was made" in page.text and "Masks" not in page.text and not page.all("table")


def test_long_models_are_cut_and_say_so():
    mask = BlockMask(torch.ones(2, 2) > 0, (32, 32), BlockShape(16, 16))
    masks = {f"layer.{index}": mask for index in range(1100)}
    report, _ = hostile()
    report["layers"] = [layer_entry(name, mask, True, 4) for name in masks]
    text = render(report, masks)
    assert text.count("<img ") == 256 and "The first 256 of 1100." in text and "The first 1000;" in text
    assert "<details open>" not in text and len(text) < 2_000_000


def pixels(address: str) -> np.ndarray:
    return imread(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_a_mask_is_drawn_block_by_block():
    keep = torch.rand(5, 9) < 0.5
    drawn = pixels(mask_picture(keep))
    assert drawn.shape == (5, 9, 4) and np.array_equal(drawn[..., 3] > 0.5, keep.numpy())
    assert set(np.unique(drawn[..., 3])) == {0.0, 1.0}


def test_a_large_mask_is_averaged():
    keep = torch.zeros(512, 300, dtype=torch.bool)
    keep[:256], keep[256:384, ::2] = True, True
    opacity = pixels(mask_picture(keep))[..., 3]
    assert opacity.shape == (128, 128)
    assert (opacity[:64] == 1).all() and (opacity[96:] == 0).all()
    assert opacity[64:96].mean() == pytest.approx(0.5, abs=0.03)


def test_a_chart_puts_points_where_they_belong():
    chart = line_chart([(10, 1.0), (20, 3.0), (30, 2.0)], "loss", str)
    (places,) = re.findall(r'points="([^"]*)"', chart)
    assert [tuple(map(float, place.split(","))) for place in places.split()] == [
        (LEFT, HEIGHT - BOTTOM), ((LEFT + WIDTH - RIGHT) / 2, TOP), (WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2)
    ]  # fmt: skip


@pytest.mark.parametrize("low, high", [(0, 1), (1, 2000), (3.91, 3.92), (0.0, 1e-6), (-7.5, 40), (5, 6)])
def test_ticks_are_few_and_round(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    digits = {f"{value:.3g}" for value in np.diff(found)}
    assert len(digits) == 1 and digits.pop().replace(".", "").strip("0")[:2] in (
        "1",
        "2",
        "25",
        "5",
        "1e",
        "2e",
    )


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
# Loads the page in a frame as wide as a telephone or a screen, and writes down what came of it.
PROBE = """<!DOCTYPE html>
<iframe src="sparsify_report.html" style="width: {width}px; height: 800px; border: 0"></iframe>
<pre id="found"></pre><script>
document.querySelector("iframe").onload = event => {{
  const view = event.target.contentWindow, page = view.document, root = page.documentElement;
  page.querySelectorAll("details").forEach(part => part.open = true);
  const outside = [...page.querySelectorAll("body *")].filter(part =>
    !part.closest(".scroll, pre, svg") && part.getBoundingClientRect().right > view.innerWidth + 1);
  document.querySelector("#found").textContent = JSON.stringify({{
    width: view.innerWidth, scroll: root.scrollWidth, outside: outside.map(part => part.outerHTML.slice(0, 200)),
    ground: view.getComputedStyle(page.body).backgroundColor, text: view.getComputedStyle(page.body).color,
    fetched: view.performance.getEntriesByType("resource").map(entry => entry.name).filter(n => !n.startsWith("data:")),
    pictures: [...page.images].map(image => [image.complete, image.naturalWidth, image.width, image.height]),
    letters: [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height),
    scrolling: [...page.querySelectorAll(".scroll")].map(part => part.scrollWidth > part.clientWidth),
  }});
}};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome on the path")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_real_browser(folder, tmp_path, width, dark):
    shutil.copy(folder / "out" / "sparsify_report.html", tmp_path)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width=width))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={int(not dark)}",
    ]
    command += ["--window-size=1300,900", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()]
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=home)  # pyright: ignore
    written = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert written, done.stderr
    found = json.loads(written[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["width"] == width
    assert found["scroll"] <= width and found["outside"] == []  # the page itself never scrolls sideways
    assert found["fetched"] == []
    colors = ["rgb(20, 24, 29)", "rgb(227, 232, 237)"] if dark else ["rgb(255, 255, 255)", "rgb(28, 35, 43)"]
    assert [found["ground"], found["text"]] == colors
    assert len(found["pictures"]) == 14
    for complete, cells, wide, high in found["pictures"]:
        assert complete and cells > 0 and wide > 100 and high > 40
    assert min(found["letters"]) >= 9
    if width == 1200:
        assert not any(found["scrolling"])
