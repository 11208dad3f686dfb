"""What step 4 writes, draws and says of an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from clcnet.cascade.comparison import compare
from clcnet.cascade.curve import Curve, Steps, oracle, sweep
from clcnet.cascade.evaluation import Evaluation, with_rivals
from clcnet.cascade.rules import know_classes, known
from clcnet.cascade.selection import Reference
from clcnet.cascade.verdict import Recommendation
from clcnet.data.outputs import Outputs
from clcnet.metrics import format_flops
from clcnet.report import plots, tables


def write_report(
    evaluation: Evaluation,
    steps: Steps,
    references: Sequence[Reference],
    joined: Sequence[pd.DataFrame],
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Write tables and plots, print the tables, and return their figures.

    Args:
        evaluation: of all models over all images.
        steps: of the rule whose results are tabled.
        references: single models to stand beside the cascade.
        joined: results of other cascades, for the same table.
        folder, seed: for the files, and of the bootstrap.
    """
    outputs = [with_rivals(each, evaluation.folds) for each in evaluation.outputs]
    models = evaluation.models
    names = tables.distinct_names(models)
    contenders, left_out = compare(outputs, evaluation.folds)
    comparison = tables.comparison_frame(contenders, seed)
    confidences = tables.confidence_frame(names, outputs)
    results = tables.results_frame(steps, models, evaluation.folds, references, seed, contenders[0].name)
    results = tables.merge_frames([*joined, results])
    texts = {
        "confidences": (confidences, tables.confidence_markdown(confidences)),
        "comparison": (comparison, tables.comparison_markdown(comparison)),
        "results-table": (results, tables.results_markdown(results)),
    }
    for name, (frame, text) in texts.items():
        tables.write_csv(frame, folder / f"{name}.csv")
        tables.write_text(text, folder / f"{name}.md")
    if not know_classes(outputs):  # else the search for a cascade has drawn it
        plots.save(plots.plot_contenders(contenders, names, references), folder, "accuracy-cost")
    _draw_confidences(outputs[0], names[0], folder)
    print(f"How well each confidence tells right from wrong:\n\n{texts['confidences'][1]}\n")
    print(f"Accuracy (%) when a share of the images goes on to {names[-1]}:\n\n{texts['comparison'][1]}\n")
    if left_out:
        print(f"{_describe_left_out(left_out, evaluation)}\n")
    print(f"Results, with 95% intervals:\n\n{texts['results-table'][1]}\n")
    return {"contenders": contenders, "confidences": confidences, "results": results}


def _draw_confidences(outputs: Outputs, model: str, folder: Path) -> None:
    """Draw how the confidences in the shallow model's answers tell right from wrong."""
    scores, correct = outputs.scores, known(outputs.correct, outputs)
    first = next(iter(scores))  # CLCNet, where it has judged
    plots.save(plots.plot_risk_coverage(scores, correct, model), folder, "risk-coverage")
    plots.save(plots.plot_reliability(scores, correct, model), folder, "reliability")
    plots.save(plots.plot_histogram(scores[first], first, correct, model), folder, "confidence-histogram")


def _describe_left_out(labels: Sequence[str], evaluation: Evaluation) -> str:
    pairs = zip(evaluation.sources, evaluation.outputs, strict=True)
    lacking = [source for source, each in pairs if each.classes is None or each.targets is None]
    why = "the models number their classes differently."
    if lacking:
        why = f"no classes in {' and '.join(lacking)}; generate_data_for_CLCNet.py writes them where --output ends in "
        why += ".parquet."
    return f"Left out ({'; '.join(labels)}): {why}"


def describe_threshold(curve: Curve, evaluation: Evaluation) -> str:
    """What the one threshold asked for gives, beside the models whose answers on all images are known."""
    alone = ", ".join(
        f"{name} alone {each.accuracy:.2f}% at {format_flops(each.record.flops or 0)}"
        for name, each in zip(tables.distinct_names(evaluation.models), evaluation.outputs, strict=True)
        if len(each) == len(evaluation.folds)
    )
    interval = tables.accuracy_interval(curve.accuracy[0], curve.num_images)
    return (
        f"Threshold {curve.thresholds[0]:g}: accuracy {curve.accuracy[0]:.2f}%{tables.format_interval(interval)}, "
        f"{100 * curve.deferral[0]:.2f}% deferred, {format_flops(curve.flops[0])} FLOPs an image "
        f"({alone})."
    )


def describe_recommendation(recommendation: Recommendation, evaluation: Evaluation, steps: Steps) -> str:
    """The threshold to take, what it gives, and the verdict."""
    scored, fitted, verdict = recommendation.scored, recommendation.cross_fitted, recommendation.verdict
    models, last = tables.distinct_names(evaluation.models), float(steps.flops[-1])
    ceiling = sweep(oracle(steps.own, steps.flops), [0.1])  # sends on exactly the images that a later model gets right
    ceiling_interval = tables.accuracy_interval(ceiling.accuracy[0], ceiling.num_images)
    nearest = "" if recommendation.reached else " No threshold gets there; this one comes nearest."
    lines = [
        f"For {recommendation.goal.describe()}, take threshold {recommendation.threshold:g}: accuracy "
        f"{scored.accuracy:.2f}%{tables.format_interval(scored.accuracy_interval)}, "
        f"{100 * recommendation.deferral:.1f}% deferred, {format_flops(scored.costs[0])} FLOPs an image, "
        f"{tables.format_saving(last / scored.costs[0], recommendation.saving_interval)} fewer than {models[-1]}."
        f"{nearest}",
        f"With the threshold chosen on four folds and scored on the fifth: accuracy {fitted.accuracy:.2f}%"
        f"{tables.format_interval(fitted.accuracy_interval)}, {format_flops(fitted.costs[0])}, "
        f"{tables.format_saving(*fitted.saving(last))} fewer.",
        f"The best possible choice between the {'two ' * (len(models) == 2)}models (oracle): "
        f"{ceiling.accuracy[0]:.2f}%{tables.format_interval(ceiling_interval)} at "
        f"{format_flops(ceiling.flops[0])}.",
    ]
    milliseconds = evaluation.milliseconds
    if milliseconds is not None:
        cost = float(recommendation.calls @ milliseconds)
        lines.append(
            f"In time: {cost:.3g} ms an image against {milliseconds[-1]:.3g} ms for {models[-1]}, "
            f"{milliseconds[-1] / cost:.2f}x less ({milliseconds[0]:.3g} ms for {models[0]})."
        )
    choice = "the cascade" if verdict.cascade else f"{verdict.choice} alone"
    return "\n".join([*lines, f"By the paper's rule alone: use {choice}: {verdict.reason}."])
