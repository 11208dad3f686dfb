"""report.html in a real browser: opened offline, with its slider moved, on a phone and at night."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clcnet import Outputs
from clcnet.cascade.selection import Goal
from clcnet.data.images import ImageSet, balanced_folds
from clcnet.report import plots
from clcnet.report.search_cli import SearchRequest
from clcnet.report.search_report import search_and_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NUM_IMAGES = 900
CLASSES = ["ant", "bee", "<b>cat</b>"]

# sees errors from the first line on; at the end says what it saw and what the slider did
WATCH = (
    "<script>window.seen = []; onerror = (m) => seen.push(m); console.error = (...m) => seen.push(m.join());</script>"
)
PROBE = """<script>addEventListener("load", () => {
  const slider = document.getElementById("at"), mark = document.getElementById("mark");
  const read = () => ["accuracy", "cost", "deferred", "money", "models"].map((name) =>
    document.getElementById(name).textContent).concat([mark.getAttribute("cx")]);
  const found = {before: read(), steps: []};
  for (const at of [slider.min, slider.max, START]) {
    slider.value = at; slider.dispatchEvent(new Event("input")); found.steps.push(read());
  }
  found.seen = seen; found.inner = innerWidth; found.width = document.documentElement.scrollWidth;
  found.paper = getComputedStyle(document.body).backgroundColor; found.images = document.images.length;
  found.broken = [...document.images].filter((image) => !image.naturalWidth).length;
  found.outside = performance.getEntriesByType("resource").filter((one) => !one.name.startsWith("data:")).length;
  const marked = mark.getBoundingClientRect(), curve = mark.ownerSVGElement.getBoundingClientRect();
  found.inside = marked.left > curve.left && marked.right < curve.right && marked.bottom < curve.bottom;
  parent.postMessage(JSON.stringify(found), "*");
});</script>"""
# a window is never narrower than 500 pixels, a frame in it is
FRAME = """<pre id="probe"></pre><script>onmessage = (found) => {
  document.getElementById("probe").textContent = found.data; };</script>
<iframe src="watched.html" style="border: 0; width: WIDTHpx; height: 3000px"></iframe>"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search over two models of 900 images of three classes, which are at hand."""
    folder = tmp_path_factory.mktemp("page")
    random = np.random.default_rng(0)
    targets = np.arange(NUM_IMAGES) % 3
    names = [f"{row:04d}.png" for row in range(NUM_IMAGES)]
    for name in names:
        Image.new("RGB", (8, 8), tuple(random.integers(0, 256, 3).tolist())).save(folder / name)
    noise = random.normal(size=(NUM_IMAGES, 3))
    outputs = [
        Outputs.from_logits(noise + lift * np.eye(3)[targets], names, targets, name, flops, class_names=CLASSES)
        for name, flops, lift in (("small", 0.05, 1.5), ("large", 0.5, 3.0))
    ]
    images = ImageSet(folder, names, names, targets, CLASSES, balanced_folds(names, targets))
    request = SearchRequest(Goal("match"), price_per_hour=2, images_per_month=1e6)
    places = folder / "results", folder / "cascade.json"
    search_and_report(outputs, images.folds, request, *places, images, milliseconds=[1, 8])
    return folder / "results"


@pytest.fixture(scope="module")
def page(results: Path) -> str:
    return (results / "report.html").read_text(encoding="utf-8")


def embedded(page: str, name: str) -> list[dict[str, str]]:
    """An array of the page's own script."""
    (text,) = re.findall(rf"\b{name} = (\[.*?\])[,;]", page)
    found: list[dict[str, str]] = json.loads(text)
    return found


def test_it_is_one_small_file_that_asks_nobody_for_anything(page: str) -> None:
    assert len(page.encode()) < 1_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", page)
    assert "@import" not in page and "url(#" in page and not re.findall(r"url\((?!#)", page)
    script = page[page.rindex("<script>") : page.rindex("</script>")]
    assert len(script.replace("\n", "").split(";")) < 100


def test_a_name_is_shown_as_it_is_and_never_runs(page: str) -> None:
    assert "<b>cat</b>" not in page and html.escape("<b>cat</b>") in page


def test_its_figures_are_those_of_the_files_beside_it(results: Path, page: str) -> None:
    recommended = json.loads((results / "recommendation.json").read_text())
    assert recommended["choice"] == "cascade"
    (start,) = map(int, re.findall(r'max="\d+" value="(\d+)"', page))
    row = embedded(page, "rows")[start]
    low, high = recommended["cross_fitted_accuracy_interval"]
    assert row["accuracy"] == f"{recommended['cross_fitted_accuracy']:.2f}% [{low:.2f}, {high:.2f}]"
    assert row["models"] == " > ".join(recommended["models"]) == "small > large"
    assert row["cost"] == f"{recommended['cross_fitted_FLOPs']:.4g}B"
    assert row["deferred"] == f"{100 * recommended['shares'][1]:.1f}%"
    # a million images at so many milliseconds each, at 2 an hour
    assert row["money"] == f"{recommended['cross_fitted_milliseconds'] * 1e6 / 3600 / 1000 * 2:,.2f}"
    assert len(embedded(page, "rows")) <= 500


def test_without_javascript_the_recommended_cascade_and_all_others_stand_there(page: str) -> None:
    static = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    rows = embedded(page, "rows")
    (start,) = map(int, re.findall(r'max="\d+" value="(\d+)"', page))
    assert f'<dd id="accuracy">{rows[start]["accuracy"]}</dd>' in static
    assert all(f"<td>{row['accuracy']}</td>" in static for row in rows)
    assert re.search(r'<input type="range"[^>]* hidden>', static)  # which would move nothing


def test_thumbnails_are_at_most_24_and_say_which_images_they_are(page: str) -> None:
    pictures = re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="">\s*<figcaption>(\d{4}\.png)', page)
    assert 2 <= len(pictures) == page.count("<img") <= 24
    assert "Rescued: small is wrong" in page and "Lost: " in page


def look(page: str, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """Open the page in a window of this width, move the slider, and tell what there is to see."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    (start,) = re.findall(r'max="\d+" value="(\d+)"', page)
    probe = PROBE.replace("START", start)
    watched = page.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{probe}</body>", 1)
    (folder / "watched.html").write_text(watched, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=3000"]
    words += ["--window-size=1500,3100", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    seen: dict[str, Any] = json.loads(html.unescape(found))
    return seen


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1400, True)])
def test_in_a_browser_the_slider_moves_the_figures_at_any_width_by_day_and_by_night(
    page: str, tmp_path: Path, width: int, dark: bool
) -> None:
    seen = look(page, tmp_path, width, dark)
    rows, places = embedded(page, "rows"), re.findall(r"places = \[\[([\d.]+),", page)
    assert seen["seen"] == [] and seen["outside"] == 0 and seen["broken"] == 0 and seen["inside"]
    assert seen["width"] <= seen["inner"] == width
    assert seen["paper"] == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")
    steps = seen["steps"]
    for step, row in zip(steps, (rows[0], rows[-1]), strict=False):
        assert step[:5] == [row[name] for name in ("accuracy", "cost", "deferred", "money", "models")]
    assert steps[0][5] == places[0] and float(steps[0][5]) < float(steps[1][5])
    assert steps[2] == seen["before"]


def test_the_picture_marks_what_is_recommended_and_names_its_lines_and_units(results: Path) -> None:
    text = (results / "accuracy-cost.svg").read_text(encoding="utf-8")
    for words in ("cascades found", "95% interval", "max softmax", "oracle", "small", "large", "recommended"):
        assert f"<!-- {words} -->" in text, words
    assert "<!-- multiply-adds an image -->" in text and "<!-- 0.5B -->" in text and "M -->" not in text
    assert (results / "accuracy-cost.png").stat().st_size > 10_000


def test_a_bin_of_fewer_than_20_images_is_not_drawn() -> None:
    confidence = np.repeat([0.15, 0.55, 0.95], [19, 20, 400])
    figure = plots.plot_reliability({"max softmax": confidence}, np.ones(439, bool), "model")
    (line,) = (line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    np.testing.assert_allclose(line.get_xdata(), [0.55, 0.95])


def test_where_a_single_model_is_recommended_the_page_says_so(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    targets = np.arange(600) % 3
    logits = random.normal(size=(600, 3)) + 2 * np.eye(3)[targets]
    one = Outputs.from_logits(logits, None, targets, "one", 1.0)
    same = dataclasses.replace(one, record=dataclasses.replace(one.record, model="same", flops=1.02))
    folds = balanced_folds(one.names, targets)
    search_and_report([one, same], folds, SearchRequest(Goal("match")), tmp_path, tmp_path / "cascade.json")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No cascade is recommended" in page and "Verdict: use one" in page
    assert "<figure>" not in page  # no images at hand
