"""Tables as text and as CSV, and the plots' files."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from clcnet.cascade.comparison import compare
from clcnet.cascade.curve import Steps, sweep
from clcnet.cascade.evaluation import with_rivals
from clcnet.cascade.rules import Surest, steps_of
from clcnet.cascade.selection import Reference
from clcnet.confidence import CLCNET, SIMPLE_CONFIDENCES
from clcnet.data.outputs import Outputs, Record
from clcnet.report import plots
from clcnet.report import tables as report
from clcnet.report.tables import COLUMNS, results_frame

RANDOM = np.random.default_rng(0)
NUM_IMAGES = 200
FOLDS = np.arange(NUM_IMAGES) % 5
PROBS = [-np.sort(-RANDOM.dirichlet([0.4] * 4, NUM_IMAGES).astype(np.float32), axis=1) for _ in range(2)]
OUTPUTS = [
    Outputs(
        [str(image) for image in range(NUM_IMAGES)],
        probs,
        correct=RANDOM.random(NUM_IMAGES) < share * probs[:, 0] + 0.3,
        record=Record(name, flops=flops),
    )
    for probs, share, name, flops in zip(PROBS, (0.5, 0.7), "sd", (1.0, 5.0), strict=True)
]


def judged():
    return [
        with_rivals(replace(outputs, scores={CLCNET: outputs.sorted_probs[:, 0].astype(float)}), FOLDS)
        for outputs in OUTPUTS
    ]


STEPS = steps_of(Surest("max softmax"), OUTPUTS)

SINGLE = {"model": "EfficientNet-B1", "reference": "EfficientNet-B1", "same": "", "accuracy": 77.64, "FLOPs": 0.7}
BOTH = {
    "model": "CLCNet (S:B0+D:B4)",
    "reference": "EfficientNet-B1",
    "accuracy": 77.74,
    "accuracy_low": 77.37,
    "accuracy_high": 78.10,
    "FLOPs": 0.7393,
    "threshold": 0.19,
    "deferral": 0.08,
    "same": "accuracy+flops",
    "gain": 0.1,
    "gain_low": -0.27,
    "gain_high": 0.46,
    "saving": 0.9468,
    "saving_low": 0.0,
    "saving_high": 1.2,
    "cross_fitted_accuracy": 77.7,
    "cross_fitted_accuracy_low": 77.3,
    "cross_fitted_accuracy_high": 78.1,
    "cross_fitted_FLOPs": 0.74,
}


def table(*records):
    """Cells of the printed results table, its heading included."""
    lines = report.results_markdown(pd.DataFrame(records, columns=list(COLUMNS))).splitlines()
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize(
    "flops, text",
    [(0.39, "0.39B"), (18.5764, "18.58B"), (0.996, "0.996B"), (37, "37B"), (0.0041, "4.1M"), (0.041, "41M"), (0, "0M")],
)
def test_flops_are_printed_as_in_the_paper(flops, text):
    assert report.format_flops(flops) == text


def test_intervals_stand_in_brackets():
    assert report.format_interval((75.957, 77.6)) == " [75.96, 77.60]"
    assert report.format_interval(None) == ""
    assert report.format_saving(0.9, (0.5, 1.2)) == "0.90x [0.50, 1.20]"
    assert report.format_saving(2.0, (0.0, 2.6)) == "2.00x [none, 2.60]"
    assert report.format_saving(2.0, None) == "2.00x"


def test_results_table_has_the_papers_columns_and_bolds_what_is_the_same():
    cells = table(SINGLE, BOTH)
    assert cells[0][:4] == ["Model name", "Top 1 Accuracy", "Threshold", "FLOPs per image"]
    assert set("".join(cells[1])) <= set("-:| ")
    assert cells[2][:4] == ["EfficientNet-B1", "77.64%", "--", "0.7B"]
    assert cells[3][:4] == ["CLCNet (S:B0+D:B4)", "**77.74%** [77.37, 78.10]", "0.19", "**0.7393B**"]
    assert cells[3][4:] == ["saves 0.95x [none, 1.20]", "77.70% [77.30, 78.10] at 0.74B"]


@pytest.mark.parametrize(
    "same, accuracy, flops, worth",
    [
        ("flops", "77.74%", "**0.7393B**", "gains +0.10 [-0.27, 0.46]"),
        ("accuracy", "**77.74%**", "0.7393B", "saves 0.95x [none, 1.20]"),
    ],
)
def test_row_at_the_same_flops_bolds_flops_and_row_at_the_same_accuracy_accuracy(same, accuracy, flops, worth):
    cells = table(BOTH | {"same": same})[2]
    assert cells[1].startswith(accuracy) and cells[3] == flops and cells[4] == worth


def test_results_read_back_are_those_written(tmp_path):
    frame = results_frame(STEPS, ["s", "d"], FOLDS, [Reference("r", OUTPUTS[0].accuracy + 1, 3.0)])
    assert len(frame) > 4
    report.write_csv(frame, tmp_path / "results-table.csv")
    pd.testing.assert_frame_equal(report.read_results(tmp_path / "results-table.csv"), frame)


def test_performance_of_one_model_and_of_three():
    alone = report.performance_frame(sweep(Steps([[0.1, 0.2]], [[1, 0]], [3])))
    assert alone[["accuracy", "FLOPs", "deferral", "FLOPs_low", "FLOPs_high"]].to_numpy().tolist() == [[50, 3, 0, 3, 3]]
    assert "FLOPs_low" not in report.performance_frame(sweep(Steps([[0.1, 0.2]] * 3, [[1, 0]] * 3, [1, 1, 1])))


def test_comparison_names_every_rule_with_its_figures():
    contenders, _ = compare(judged(), FOLDS)
    frame = report.comparison_frame(contenders)
    random = frame.set_index("rule").loc["random deferral"]
    shallow, deep = (outputs.accuracy for outputs in OUTPUTS)
    assert random["accuracy_at_20%"] == pytest.approx(0.8 * shallow + 0.2 * deep)
    assert random["area"] == pytest.approx((shallow + deep) / 2)
    assert random["area_50"] == pytest.approx(0.75 * shallow + 0.25 * deep)
    assert random["area_gain"] == pytest.approx(random["area"] - frame["area"][0])
    assert (frame["area_50_low"] <= frame["area_50"]).all() and (frame["area_50"] <= frame["area_50_high"]).all()
    text = report.comparison_markdown(frame)
    assert text.splitlines()[0].split(" | ")[1].strip() == "10% deferred"
    assert len(text.splitlines()) == 2 + len(contenders)


def test_confidences_without_a_probability_show_dashes():
    outputs = [
        replace(each, scores={"max softmax": each.sorted_probs[:, 0], "entropy": -each.sorted_probs[:, 1]})
        for each in OUTPUTS
    ]
    frame = report.confidence_frame(["a", "b"], outputs)
    assert frame[["model", "confidence"]].to_numpy().tolist() == [
        ["a", "max softmax"],
        ["a", "entropy"],
        ["b", "max softmax"],
        ["b", "entropy"],
    ]
    lines = report.confidence_markdown(frame).splitlines()
    assert "--" in lines[3] and "--" not in lines[2]


@pytest.fixture
def contenders():
    return compare(judged(), FOLDS)[0]


def test_plots_are_written_as_png_and_svg_and_the_same_each_time(tmp_path, contenders):
    outputs = judged()[0]

    def figures():
        yield plots.plot_contenders(contenders, ["s", "d"], [Reference("r", 60, 3)])
        yield plots.plot_risk_coverage(outputs.scores, outputs.correct, "s")
        yield plots.plot_reliability(outputs.scores, outputs.correct, "s")
        yield plots.plot_histogram(outputs.scores["entropy"], "entropy", outputs.correct, "s")

    contents = []
    for attempt in ("first", "second"):
        for number, figure in enumerate(figures()):
            png, svg = plots.save(figure, tmp_path / attempt, str(number))
            contents.append(svg.read_bytes())
            assert png.read_bytes()[:4] == b"\x89PNG" and b"<svg" in svg.read_bytes()
    assert contents[:4] == contents[4:]


def labels_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_plot_shows_the_papers_rule_its_rivals_and_the_models(contenders):
    figure = plots.plot_contenders(contenders, ["s", "d"])
    (axes,) = figure.axes
    assert axes.get_title() == "What accuracy costs, on 200 images"
    scores = [*SIMPLE_CONFIDENCES, "oracle"]
    assert labels_of(figure) == [*scores, "CLCNet", "95% interval", "s", "d"]
    assert axes.get_xlabel() == "multiply-adds an image" and axes.lines[0].get_xdata()[-1] == 6.0
    assert (axes.xaxis.get_major_formatter()(2.0), axes.xaxis.get_major_formatter()(0.05)) == ("2B", "50M")


def test_a_new_score_is_in_every_table_and_plot_by_itself(monkeypatch):
    monkeypatch.setitem(SIMPLE_CONFIDENCES, "second best", lambda probs: 1 - probs[:, 1].astype(float))
    outputs = judged()
    contenders, _ = compare(outputs, FOLDS)
    assert "second best" in report.comparison_frame(contenders)["rule"].tolist()
    assert "second best" in report.confidence_frame(["s", "d"], outputs)["confidence"].tolist()
    for plot in (plots.plot_risk_coverage, plots.plot_reliability):
        labels = plot(outputs[0].scores, outputs[0].correct, "s").axes[0].get_legend_handles_labels()[1]
        assert any(label.startswith("second best (") for label in labels)
    assert "second best" in labels_of(plots.plot_contenders(contenders, ["s", "d"]))


def test_reliability_leaves_out_scores_that_are_no_probabilities():
    scores = {"CLCNet": STEPS.confidence[0] * 3, "max softmax": STEPS.confidence[0]}
    labels = plots.plot_reliability(scores, STEPS.own[0], "s").axes[0].get_legend_handles_labels()[1]
    assert len(labels) == 1 and labels[0].startswith("max softmax (ECE ")
