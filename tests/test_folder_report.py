"""What step 5 says at its end, in lines and on its page."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scripts
from scripts import EVALUATE_CUSTOM

from clcnet.cascade.answers import Answers, run_cascade
from clcnet.cascade.rules import Surest
from clcnet.data.outputs import UNKNOWN, Outputs
from clcnet.report.folder_report import print_summary, promise_lines, summarise, write_page

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
    "waiting": "",
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
    assert lines[5] == "FLOPs: 0.9B an image; b4 on every image: 2B, 2.22 times as many"


def test_one_model_alone_is_held_against_no_other_and_an_equal_cost_saves_nothing_to_speak_of(capsys) -> None:
    alone = {"num_seen": {"b0": 200}, "num_answered_by": {"b0": 200}, "classes": [], "flops": 0.5}
    lines = printed(capsys, "b0", **ACCURACIES | {"accuracies_on_last_seen": [91.0]}, **alone)
    assert lines[:3] == [
        "accuracy 91.00% (b0 alone 85.50%)",
        "FLOPs: 0.5B an image",
        "time: 10.0 s, 20.0 images/s",
    ]
    seen = {"num_seen": {"b0": 200, "b2": 50}, "num_answered_by": {"b0": 160, "b2": 40}}
    assert printed(capsys, "b0", "b2", **seen)[2].endswith("; b2 on every image: 2B, 2.22 times as many")
    lines = printed(capsys, flops_saving=1.0, num_from_store=7)
    assert lines[2] == "FLOPs: 0.9B an image; the deep model on every image: 2B, 1.00 times as many"
    assert lines[3] == "time: not compared; 7 answers were in the store"
    lines = printed(capsys, flops_saving=math.nan, time_saving=math.nan)
    assert lines[2:4] == [
        "FLOPs: 0.9B an image; those of the deep model are not known",
        "time: 10.0 s, 20.0 images/s; that of the deep model is not known",
    ]


def test_five_classes_are_named_at_most(capsys) -> None:
    rows = [{"name": str(k), "images": 10, "num_deferred": 9 - k, "deferred": 90.0 - 10 * k} for k in range(7)]
    assert "4: 50% (5 of 10)\n" in "\n".join(printed(capsys, classes=rows)) + "\n"


# Three models, thresholds 0.625 twice: image 2 is as sure as is asked, 1 and 3 go on; the second model is surer of
# both and lets 3 go on; the third one is less sure, and does not stand. Image 5 goes on too, but
# the second model cannot read it, nor the first one image 6.
PROBS = [
    [[0.875, 0.125], [0.5625, 0.4375], [0.375, 0.625], [0.5, 0.5], [0.0625, 0.9375], [0.5, 0.5]],
    [[0.25, 0.75], [0.4375, 0.5625]],
    [[0.46875, 0.53125]],
]
TARGETS = [0, 1, 0, 1, 0, 1, 0]


def ran() -> Answers:
    def ask(stage: int, images: np.ndarray) -> tuple[Outputs, np.ndarray]:
        read = images < (6, 5, 5)[stage]
        return Outputs.from_probs(PROBS[stage], targets=np.array(TARGETS)[images[read]]), read

    answers = run_cascade(Surest("max softmax"), [0.625, 0.625], 7, ask)
    answers.targets = np.array(TARGETS)
    return answers.read()


def figures_of(answers: Answers, flops: tuple[float | None, ...] = (1.0, 10.0, 100.0), kept: int = 0) -> dict[str, Any]:
    stopwatch = SimpleNamespace(wall=20.0, waited=9.0, time_saving=1.5, images_per_second=0.25)
    found = SimpleNamespace(answers=answers, stopwatch=stopwatch, num_before=[kept, 0, kept], unreadable={5: "why"})
    return summarise(found, flops, ("a", "b", "c"), ["ant", "bee"])  # type: ignore[arg-type]


def test_figures_of_a_run_worked_out_by_hand() -> None:
    answers = ran()
    assert answers.places.tolist() == [0, 1, 2, 3, 4] and len(answers) == 5
    assert answers.labels.tolist() == [0, 1, 1, 1, 1] and answers.answered_by.tolist() == [0, 1, 0, 1, 0]
    assert [each.tolist() for each in answers.confidences] == [
        [0.875, 0.5625, 0.625, 0.5, 0.9375],
        [0.75, 0.5625],
        [0.5625],
    ]
    found = figures_of(answers)
    assert found.pop("classes") == [
        {"name": "bee", "images": 2, "num_deferred": 2, "deferred": 100.0, "right": 100.0},
        {"name": "ant", "images": 3, "num_deferred": 0, "deferred": 0.0, "right": pytest.approx(100 / 3)},
    ]
    assert found == {
        "num_images": 5,
        "num_unreadable": 1,
        "num_deferred": 2,
        "num_seen": {"a": 5, "b": 2, "c": 1},
        "num_answered_by": {"a": 3, "b": 2, "c": 0},
        "num_from_store": 0,
        "deferral": 0.4,
        "flops": pytest.approx(1 + 0.4 * 10 + 0.2 * 100),
        "last_flops": 100.0,
        "flops_saving": pytest.approx(4.0),
        "seconds": 20.0,
        "last_seconds": 30.0,
        "time_saving": 1.5,
        "images_per_second": 0.25,
        "waiting": ", 45% of the time waiting for images to be decoded",
        "accuracy": pytest.approx(60.0),
        "first_accuracy": pytest.approx(20.0),
        "accuracies_on_last_seen": [0.0, 100.0, 100.0],  # of image 3 alone
    }


def test_what_a_run_does_not_know_is_not_stated() -> None:
    answers = ran()
    found = figures_of(answers, (1.0, 10.0, None), kept=2)
    assert found["flops"] == pytest.approx(5.0) and np.isnan([found["last_flops"], found["flops_saving"]]).all()
    assert found["num_from_store"] == 4 and np.isnan([found["time_saving"], found["last_seconds"]]).all()
    alone = Answers(Surest("max softmax"), [], 5)
    alone.update(alone.places, [Outputs.from_probs(PROBS[0][:5])])
    assert figures_of(alone, (1.0, None))["flops"] == 1.0
    answers.targets[2] = UNKNOWN
    found = figures_of(answers)
    assert "accuracy" not in found
    assert [(row["name"], row["images"], row["num_deferred"]) for row in found["classes"]] == [
        ("ant", 3, 2),  # by the first model's answers
        ("bee", 2, 0),
    ]


def test_lines_of_promises_are_worked_out_by_hand() -> None:
    answers, policy = ran(), SimpleNamespace(certificate=None, expected=SimpleNamespace(quantiles=[[0.5]]))
    usual = "no drift: shares and confidences are like those that the policy was measured on"
    assert promise_lines(policy, [], answers, None) == [usual]  # type: ignore[arg-type]
    unsure = np.array([False, True, False, False, False])
    policy.certificate = SimpleNamespace(describe=lambda: "Certificate: of steel")
    assert promise_lines(policy, ["x", "y"], answers, unsure) == [  # type: ignore[arg-type]
        "coverage 80.0%: unsure of 1 images, wrong on 50.00% of the others",  # images 2 and 4 of the four
        "Certificate: of steel",
        "Drift: these are not images like the policy's: x; y; promises do not hold",
    ]
    policy.certificate, policy.expected = None, None
    every = np.ones(5, bool)
    assert promise_lines(policy, [], answers, every) == ["coverage 0.0%: unsure of 5 images"]  # type: ignore[arg-type]
    answers.targets[:] = UNKNOWN
    assert promise_lines(policy, [], answers, unsure) == ["coverage 80.0%: unsure of 1 images"]  # type: ignore[arg-type]


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
    assert f"the deep model on every image: {deep[1]}, " in finished.out and shallow[1] == deep[1]
    assert shallow[2] == deep[2] == "12" and int(shallow[3]) + int(deep[3]) == 12
    assert {tuple(row[:3]) for row in classes} == {(name, "4", "100%") for name in ("ant", "bee", "cat")}
    shown = re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="">\s*<figcaption>(.*?)<', page)
    assert len(set(shown)) == len(shown) == 12
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", page) and len(page) < 1_000_000
    before = path.read_bytes()
    assert scripts.run(EVALUATE_CUSTOM, *words).code == 0  # from the store
    assert path.read_bytes() == before


def test_the_page_names_models_that_were_loaded_forty_classes_and_images_whose_answer_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clcnet.report.html.thumbnails", lambda _, places: [(f"places {places.tolist()}", "data:x")])
    answers = ran()
    answers.labels[3] = answers.own_labels[0, 3]
    rows = [{"name": f"c{k:02}", "images": 1, "deferred": 50.0, "right": 12.345} for k in range(42)]
    outcome = {"num_seen": {"shallow": 5}, "num_answered_by": {"shallow": 4}, "classes": rows}
    models = ("small", "large"), ["accuracy 60.00%"]
    write_page(tmp_path / "r.csv", answers, None, outcome, (0.5,), ("shallow",), *models)  # type: ignore[arg-type]
    page = (tmp_path / "r.csv.report.html").read_text(encoding="utf-8")
    assert cells(page, "Model by model") == [["small", "0.5B", "5", "4"]]
    classes = cells(page, "Class by class")
    assert [row[0] for row in classes] == [f"c{k:02}" for k in range(40)] and classes[0] == ["c00", "1", "50%", "12.3%"]
    assert "2 more" in page
    otherwise, same = (page.index(words) for words in ("answered otherwise than at first", "answered as at first"))
    assert otherwise < page.index("places [1]") < same < page.index("places [3]")
