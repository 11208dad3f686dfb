"""Which answer stands, the result file and the figures drawn from it, on arrays worked out by hand."""

import csv
from pathlib import Path

import numpy as np
import pytest

from clcnet.cascade.predictions import COLUMNS, UNKNOWN, Answers, Verdicts, decide, write_result
from clcnet.cascade.schedule import DEEP, NOTHING, SHALLOW, Outcome, Task

NAMES = ["a.png", "b.png", "c.png", "d.png", "e.png"]


def outcome(stage: int, answers: dict[int, tuple[int, float]], unreadable: tuple[tuple[int, str], ...] = ()) -> Outcome:
    top1, confidence = zip(*answers.values(), strict=True) if answers else ((), ())
    task = Task(stage, tuple(sorted([*answers, *(index for index, _ in unreadable)])))
    return Outcome(task, np.array([*answers], np.int64), np.array(top1), np.array(confidence, np.float32), unreadable)


@pytest.fixture
def answers() -> Answers:
    """At 0.5: one kept, one deferred and overruled, one deferred and upheld, one unreadable, one deferred in a tie."""
    answers = Answers(5)
    answers.add(outcome(SHALLOW, {0: (0, 0.75), 1: (1, 0.25), 2: (1, 0.375)}, ((3, "no image"),)))
    answers.add(outcome(NOTHING, {}))
    answers.add(outcome(SHALLOW, {4: (2, 0.125)}))
    answers.add(outcome(DEEP, {1: (2, 0.5), 2: (0, 0.25), 4: (0, 0.125)}))
    return answers


@pytest.fixture
def verdicts(answers: Answers) -> Verdicts:
    return answers.decide(0.5)


def test_the_deep_answer_stands_only_where_it_is_the_surer_of_the_two(verdicts: Verdicts) -> None:
    assert verdicts.places.tolist() == [0, 1, 2, 4]
    assert verdicts.deferred.tolist() == [False, True, True, True]
    assert verdicts.answered_by.tolist() == [SHALLOW, DEEP, SHALLOW, SHALLOW]
    assert verdicts.predict.tolist() == [0, 2, 1, 2]
    assert verdicts.sureness.tolist() == [0.75, 0.5, 0.375, 0.125]


def test_an_image_that_only_the_deep_model_could_not_read_is_left_out_too() -> None:
    answers = Answers(2)
    answers.add(outcome(SHALLOW, {0: (0, 0.1), 1: (0, 0.9)}))
    answers.add(outcome(DEEP, {}, ((0, "gone"),)))
    assert answers.decide(0.5).places.tolist() == [1]
    assert answers.unreadable == {0: "gone"}


def test_no_readable_image_leaves_nothing_to_decide() -> None:
    answered_by, deferred = decide(np.zeros(0), np.zeros(0), 0.5)
    assert len(answered_by) == len(deferred) == 0


def test_the_rule_is_the_literal_one_image_by_image() -> None:
    generator = np.random.default_rng(0)
    shallow, deep = generator.integers(0, 6, (2, 500)).astype(np.float32) / 4  # many ties
    answered_by, deferred = decide(shallow, deep, 0.75)
    for index in range(500):
        goes_on = shallow[index] < 0.75
        assert deferred[index] == goes_on
        assert answered_by[index] == (DEEP if goes_on and deep[index] > shallow[index] else SHALLOW)


def test_the_result_file_has_a_row_an_image_in_order_and_leaves_empty_what_is_not_known(
    verdicts: Verdicts, tmp_path: Path
) -> None:
    write_result(tmp_path / "r.csv", NAMES, np.array([0, UNKNOWN, 1, 1, 1]), verdicts, ["ant", "bee", "cat"])
    assert (tmp_path / "r.csv").read_text() == (
        "file,predict,GT,class_name,confidence,answered_by,"
        "shallow_predict,shallow_confidence,deep_predict,deep_confidence\n"
        "a.png,0,0,ant,0.75,shallow,0,0.75,,\n"
        "b.png,2,,cat,0.5,deep,1,0.25,2,0.5\n"
        "c.png,1,1,bee,0.375,shallow,1,0.375,0,0.25\n"
        "e.png,2,1,cat,0.125,shallow,2,0.125,0,0.125\n"
    )


def test_without_class_names_that_column_is_empty(verdicts: Verdicts, tmp_path: Path) -> None:
    write_result(tmp_path / "r.csv", NAMES, np.zeros(5, np.int64), verdicts, None)
    with open(tmp_path / "r.csv", newline="") as file:
        assert [row["class_name"] for row in csv.DictReader(file)] == ["", "", "", ""]


def test_any_file_name_comes_back_from_the_result(verdicts: Verdicts, tmp_path: Path) -> None:
    names = ['with "quotes", commas.png', "line\nbreak.png", "späce .png", "unreadable", "not-utf8-\udcff.png"]
    write_result(tmp_path / "r.csv", names, np.zeros(5, np.int64), verdicts, None)
    with open(tmp_path / "r.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [names[index] for index in (0, 1, 2, 4)]


def test_confidences_come_back_as_the_same_float32(tmp_path: Path) -> None:
    confidence = np.random.default_rng(0).random((2, 50)).astype(np.float32)
    both = np.zeros(50, np.int64), np.ones(50, bool)
    verdicts = Verdicts(np.arange(50), np.zeros((2, 50), np.int64), confidence, *both)
    write_result(tmp_path / "r.csv", [str(index) for index in range(50)], both[0], verdicts, None)
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    for stage, column in enumerate(("shallow_confidence", "deep_confidence")):
        np.testing.assert_array_equal(np.array([row[column] for row in rows], np.float32), confidence[stage])


def test_accuracies_of_the_cascade_and_of_both_models(verdicts: Verdicts) -> None:
    # answers 0 2 1 2; shallow 0 1 1 2; on the deferred images 1, 2 and 4 the deep model says 2 0 0
    assert verdicts.accuracies(np.array([0, 2, 1, 1])) == {
        "accuracy": 75.0,
        "shallow_accuracy": 50.0,
        "shallow_accuracy_on_deferred": pytest.approx(100 / 3),
        "deep_accuracy_on_deferred": pytest.approx(100 / 3),
    }


def test_with_nothing_deferred_the_accuracies_there_are_not_a_number(answers: Answers) -> None:
    accuracies = answers.decide(-999).accuracies(np.array([0, 1, 1, 2]))
    assert accuracies["accuracy"] == accuracies["shallow_accuracy"] == 100
    assert np.isnan(accuracies["deep_accuracy_on_deferred"])


def test_classes_that_defer_most_come_first_and_those_that_never_do_not_at_all() -> None:
    deferred = np.array([1, 0, 1, 1, 0, 1, 1, 0, 0], bool)
    classes = np.array([4, 4, 7, 7, 9, 2, 2, 3, 3])  # 1 of 2, 2 of 2, 0 of 1, 2 of 2, 0 of 2
    verdicts = Verdicts(np.arange(9), np.zeros((2, 9)), np.zeros((2, 9)), np.zeros(9, np.int64), deferred)
    assert verdicts.most_deferred(classes) == [(2, 2, 2), (7, 2, 2), (4, 1, 2)]
    assert verdicts.most_deferred(classes, count=1) == [(2, 2, 2)]
