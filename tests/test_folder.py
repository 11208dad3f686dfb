"""What step 5 says at its end, in lines and on its page."""

import re
from pathlib import Path
from typing import Any

import pytest
import scripts
from scripts import EVALUATE_CUSTOM

from clcnet.report.folder import print_summary

FIGURES: dict[str, Any] = {
    "num_images": 200,
    "num_unreadable": 0,
    "num_seen": {"shallow": 200, "deep": 50},
    "num_answered_by": {"shallow": 160, "deep": 40},
    "num_from_store": 0,
    "flops": 0.9,
    "last_flops": 2.0,
    "flops_saving": 2 / 0.9,
    "seconds": 10.0,
    "last_seconds": 18.0,
    "time_saving": 1.8,
    "images_per_second": 20.0,
    "classes": [
        {"name": "cat", "images": 60, "num_deferred": 30, "deferred": 50.0},
        {"name": "8", "images": 80, "num_deferred": 20, "deferred": 25.0},
        {"name": "ant", "images": 60, "num_deferred": 0, "deferred": 0.0},
    ],
}
ACCURACIES = {"accuracy": 91.0, "first_accuracy": 85.5, "accuracies_on_last_seen": [50.0, 74.0]}


def printed(capsys, *stage_names: str, **changes: Any) -> list[str]:
    print_summary(FIGURES | changes, stage_names or ("shallow", "deep"), Path("answers.csv"))
    return capsys.readouterr().out.splitlines()


def test_the_last_lines_say_what_was_saved_and_at_what_accuracy(capsys) -> None:
    assert printed(capsys, **ACCURACIES) == [
        "accuracy 91.00% (the shallow model alone 85.50%)",
        "deferred to the deep model: 25.0% of the images (50); its answer stands for 40",
        "on the deferred ones the shallow model has 50.00%, the deep model 74.00%",
        "classes that defer most: cat: 50% (30 of 60), 8: 25% (20 of 80)",
        "FLOPs: 0.9B an image; the deep model on every image: 2B, 2.22 times as many",
        "time: 10.0 s, 20.0 images/s; the deep model on every image: about 18.0 s by its time on the deferred ones, "
        "1.80 times as long",
        "all of it on one page: answers.csv.report.html",
        "200 images; result in answers.csv",
    ]


def test_without_labels_the_classes_that_defer_most_are_those_that_the_shallow_model_sees(capsys) -> None:
    lines = printed(capsys, num_unreadable=2, flops=2.5, flops_saving=0.8, time_saving=0.5)
    by = "by the answers of the shallow model"
    assert lines[1] == f"classes that defer most, {by}: cat: 50% (30 of 60), 8: 25% (20 of 80)"
    assert lines[2].endswith("2B, 0.80 times as many: the cascade saves nothing")
    assert lines[3].endswith("0.50 times as long: the cascade saves nothing")
    assert lines[-1] == "200 images, 2 unreadable left out (answers.csv.errors.csv); result in answers.csv"


def test_every_later_model_of_a_longer_cascade_has_its_line(capsys) -> None:
    lines = printed(
        capsys,
        *("b0", "b2", "b4"),
        **ACCURACIES | {"accuracies_on_last_seen": [40.0, 50.0, 60.0]},
        num_seen={"b0": 200, "b2": 50, "b4": 10},
        num_answered_by={"b0": 160, "b2": 35, "b4": 5},
    )
    assert lines[:4] == [
        "accuracy 91.00% (b0 alone 85.50%)",
        "deferred to b2: 25.0% of the images (50); its answer stands for 35",
        "deferred to b4: 5.0% of the images (10); its answer stands for 5",
        "on the deferred ones b0 has 40.00%, b4 60.00%",
    ]


# The page


def cells(page: str, title: str) -> list[list[str]]:
    """The rows of the table below a title."""
    text = page[page.index(f"<h2>{title}</h2>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", text[: text.index("</table>")])
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows[1:]]


@pytest.mark.usefixtures("one_thread")
def test_the_page_holds_the_lines_the_classes_and_what_was_deferred(workshop: scripts.Workshop, tmp_path: Path) -> None:
    words = [*workshop.command(EVALUATE_CUSTOM, tmp_path), "--threshold", "inf"]
    words += ["--custom-data", workshop.images / "split_part_1"]
    finished = scripts.run(EVALUATE_CUSTOM, *words)
    assert finished.code == 0, finished.err
    path = tmp_path / "custom-data-result.csv.report.html"
    page = path.read_text(encoding="utf-8")
    lines = finished.out.splitlines()
    assert f"all of it on one page: {path}" in lines
    for start in ("accuracy ", "deferred to the deep model: ", "classes that defer most: ", "FLOPs: "):
        (line,) = (line for line in lines if line.startswith(start))
        assert f">{line}</p>" in page
    assert "time: " not in page, "which differs from run to run"
    (shallow, deep), classes = cells(page, "Model by model"), cells(page, "Class by class")
    assert shallow[2] == deep[2] == "12" and int(shallow[3]) + int(deep[3]) == 12
    assert {tuple(row[:3]) for row in classes} == {(name, "4", "100%") for name in ("ant", "bee", "cat")}
    shown = re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="">\s*<figcaption>(.*?)<', page)
    assert len(set(shown)) == len(shown) == 12
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", page) and len(page) < 1_000_000
    before = path.read_bytes()
    assert scripts.run(EVALUATE_CUSTOM, *words).code == 0  # from the store
    assert path.read_bytes() == before
