"""Tables as text and as CSV, and the plots' files."""

import numpy as np
import pandas as pd
import pytest

from clcnet.cascade.baselines import compare, confidences
from clcnet.cascade.curve import Stage, sweep
from clcnet.cascade.selection import Reference
from clcnet.report import plots
from clcnet.report import tables as report
from clcnet.report.paper_table import CrossFitted, Row, results_rows

RANDOM = np.random.default_rng(0)
NUM_IMAGES = 200
FOLDS = np.arange(NUM_IMAGES) % 5
PROBS = [-np.sort(-RANDOM.dirichlet([0.4] * 4, NUM_IMAGES).astype(np.float32), axis=1) for _ in range(2)]
STAGES = [
    Stage(probs[:, 0], RANDOM.random(NUM_IMAGES) < share * probs[:, 0] + 0.3, flops)
    for probs, share, flops in zip(PROBS, (0.5, 0.7), (1.0, 5.0), strict=True)
]

SINGLE = Row("EfficientNet-B1", "EfficientNet-B1", 77.64, None, 0.7)
BOTH = Row(
    model="CLCNet (S:B0+D:B4)",
    reference="EfficientNet-B1",
    accuracy=77.74,
    accuracy_interval=(77.37, 78.10),
    flops=0.7393,
    threshold=0.19,
    deferral=0.08,
    same=("accuracy", "flops"),
    gain=0.1,
    gain_interval=(-0.27, 0.46),
    saving=0.9468,
    saving_interval=(0.0, 1.2),
    cross_fitted=CrossFitted(77.7, (77.3, 78.1), 0.74),
)


@pytest.mark.parametrize(
    "flops, text",
    [(0.39, "0.39B"), (18.5764, "18.58B"), (0.996, "0.996B"), (37, "37B"), (0.0041, "4.1M"), (0.041, "41M"), (0, "0M")],
)
def test_flops_are_printed_as_in_the_paper(flops, text):
    assert report.format_flops(flops) == text


def test_intervals_stand_in_brackets():
    assert report.format_interval((75.957, 77.6)) == " [75.96, 77.60]"
    assert report.format_interval(None) == ""
    assert report.format_saving(2.0, (1.5, 2.6)) == "2.00x [1.50, 2.60]"
    assert report.format_saving(2.0, (0.0, 2.6)) == "2.00x [none, 2.60]"
    assert report.format_saving(2.0, None) == "2.00x"


def test_results_table_has_the_papers_columns_and_bolds_what_is_the_same():
    lines = report.results_markdown([SINGLE, BOTH]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0][:4] == ["Model name", "Top 1 Accuracy", "Threshold", "FLOPs per image"]
    assert set("".join(cells[1])) <= set("-:| ")
    assert cells[2][:4] == ["EfficientNet-B1", "77.64%", "--", "0.7B"]
    assert cells[3][:4] == ["CLCNet (S:B0+D:B4)", "**77.74%** [77.37, 78.10]", "0.19", "**0.7393B**"]
    assert cells[3][4:] == ["saves 0.95x [none, 1.20]", "77.70% [77.30, 78.10] at 0.74B"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "same, accuracy, flops, worth",
    [
        (("flops",), "77.74%", "**0.7393B**", "gains +0.10 [-0.27, 0.46]"),
        (("accuracy",), "**77.74%**", "0.7393B", "saves 0.95x [none, 1.20]"),
    ],
)
def test_row_at_the_same_flops_bolds_flops_and_row_at_the_same_accuracy_accuracy(same, accuracy, flops, worth):
    row = Row(**(BOTH.__dict__ | {"same": same}))
    cells = [cell.strip() for cell in report.results_markdown([row]).splitlines()[2].strip("|").split(" | ")]
    assert cells[1].startswith(accuracy) and cells[3] == flops and cells[4] == worth


def test_results_read_back_are_those_written(tmp_path):
    rows = results_rows(STAGES, ["s", "d"], FOLDS, [Reference("r", STAGES[0].accuracy + 1, 3.0)])
    assert len(rows) > 4
    report.write_csv(report.results_frame(rows), tmp_path / "results-table.csv")
    assert report.read_results(tmp_path / "results-table.csv") == rows


def test_performance_has_exact_intervals_and_time():
    curve = sweep([Stage([0.9, 0.2, 0.5, 0.5], [1, 0, 0, 1], 1.0), Stage([0.1, 0.8, 0.4, 0.6], [0, 1, 1, 0], 10.0)])
    frame = report.performance_frame(curve, [2, 4])
    assert frame.columns[:3].tolist() == ["threshold", "accuracy", "FLOPs"]
    assert frame.num_deferred.tolist() == [0, 1, 3, 4]
    assert frame.milliseconds.tolist() == [2, 3, 5, 6]
    low, high = frame.accuracy_low[1], frame.accuracy_high[1]
    assert (low, high) == pytest.approx((19.41, 99.37), abs=0.01)  # 3 of 4
    assert frame.FLOPs_low.tolist()[0] == 1 and frame.FLOPs_high.tolist()[3] == 11
    assert "milliseconds" not in report.performance_frame(curve)


def test_performance_of_three_stages_leaves_out_what_two_alone_have():
    stage = Stage([0.1, 0.2], [1, 0], 1.0)
    assert "FLOPs_low" not in report.performance_frame(sweep([stage] * 3))


def test_comparison_names_every_rule_with_its_figures():
    rules = compare(STAGES, PROBS, FOLDS)
    frame = report.comparison_frame(rules, STAGES[1])
    random = frame.set_index("rule").loc["random deferral"]
    assert random["accuracy_at_20%"] == pytest.approx(0.8 * STAGES[0].accuracy + 0.2 * STAGES[1].accuracy)
    assert random["area"] == pytest.approx((STAGES[0].accuracy + STAGES[1].accuracy) / 2)
    text = report.comparison_markdown(frame)
    assert text.splitlines()[0].split(" | ")[1].strip() == "10% deferred"
    assert len(text.splitlines()) == 2 + len(rules)


def test_confidences_without_a_probability_show_dashes():
    scores = {"max softmax": [PROBS[0][:, 0], PROBS[1][:, 0]], "entropy": [-PROBS[0][:, 1], -PROBS[1][:, 1]]}
    frame = report.confidence_frame(["a", "b"], scores, STAGES)
    assert frame[["model", "confidence"]].to_numpy().tolist() == [
        ["a", "max softmax"],
        ["a", "entropy"],
        ["b", "max softmax"],
        ["b", "entropy"],
    ]
    lines = report.confidence_markdown(frame).splitlines()
    assert "--" in lines[3] and "--" not in lines[2]


def test_tables_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    report.write_csv(pd.DataFrame({"a": [1.5]}), path)
    assert path.read_bytes() == b"a\n1.5\n"
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_csv(pd.DataFrame({"a": [2.5]}), path)
    assert path.read_bytes() == b"a\n1.5\n"
    assert [name.name for name in tmp_path.iterdir()] == ["table.csv"]


def test_plots_are_written_as_png_and_svg_and_the_same_each_time(tmp_path):
    rules = compare(STAGES, PROBS, FOLDS, STAGES[0].correct | STAGES[1].correct)
    correct = STAGES[0].correct
    scores = {"CLCNet": STAGES[0].confidence} | {
        name: by_model[0] for name, by_model in confidences(PROBS, [stage.correct for stage in STAGES], FOLDS).items()
    }

    def figures():
        yield plots.plot_accuracy_and_cost(rules, STAGES, ["s", "d"], [Reference("r", 60, 3)], [1.0, 3.0])
        yield plots.plot_risk_coverage(scores, correct, "s")
        yield plots.plot_reliability(scores, correct, "s")
        yield plots.plot_histogram(scores["entropy"], correct, "s")

    contents = []
    for attempt in ("first", "second"):
        for number, figure in enumerate(figures()):
            png, svg = plots.save(figure, tmp_path / attempt, str(number))
            contents.append(svg.read_bytes())
            assert png.read_bytes()[:4] == b"\x89PNG" and b"<svg" in svg.read_bytes()
    assert contents[:4] == contents[4:]


def test_time_gets_a_panel_of_its_own():
    rules = compare(STAGES, PROBS, FOLDS)
    assert len(plots.plot_accuracy_and_cost(rules, STAGES, ["s", "d"]).axes) == 1
    flops, time = plots.plot_accuracy_and_cost(rules, STAGES, ["s", "d"], milliseconds=[1.0, 2.0]).axes
    assert (flops.get_xlabel(), time.get_xlabel()) == ("billion multiply-adds an image", "milliseconds an image")
    assert flops.lines[0].get_xdata()[-1] == 6.0 and time.lines[0].get_xdata()[-1] == 3.0


def test_reliability_leaves_out_scores_that_are_no_probabilities():
    scores = {"CLCNet": STAGES[0].confidence * 3, "max softmax": STAGES[0].confidence}
    labels = plots.plot_reliability(scores, STAGES[0].correct, "s").axes[0].get_legend_handles_labels()[1]
    assert len(labels) == 1 and labels[0].startswith("max softmax (ECE ")
