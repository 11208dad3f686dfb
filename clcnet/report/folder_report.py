"""The last lines of step 5, and its page: what a cascade's run over a folder of images came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clcnet.cascade.answers import Answers
from clcnet.cascade.policy import Policy
from clcnet.cascade.runner import FolderRun
from clcnet.classifiers.stream import describe_waiting
from clcnet.cli import PAIR, one_line
from clcnet.data.images import ImageSet, errors_file
from clcnet.metrics import Bools, format_flops
from clcnet.report import html

MOST_NAMED = 5  # classes


def page_file(output: Path | str) -> Path:
    """Where the page of a result file lies."""
    return Path(f"{output}.report.html")


def summarise(
    found: FolderRun, flops: Sequence[float | None], stage_names: Sequence[str], class_names: Sequence[str] | None
) -> dict[str, Any]:
    """All figures: accuracies in percent, shares as fractions, FLOPs in billions of multiply-adds an image.

    Args:
        found: the run.
        flops: of each model; None for the last one where it was never asked and so never loaded.
        stage_names: what to call the models.
        class_names: of all classes, where they are known.
    """
    answers, stopwatch = found.answers, found.stopwatch
    spent = sum(share * cost for share, cost in zip(answers.calls, flops, strict=False) if share and cost is not None)
    last_flops = math.nan if flops[-1] is None else flops[-1]
    from_store = sum(found.num_before)
    time_saving = math.nan if from_store else stopwatch.time_saving
    outcome = {
        "num_images": len(answers),
        "num_unreadable": len(found.unreadable),
        "num_deferred": int(answers.deferred.sum()),
        "num_seen": {name: int((answers.last_seen >= stage).sum()) for stage, name in enumerate(stage_names)},
        "num_answered_by": {name: int((answers.answered_by == stage).sum()) for stage, name in enumerate(stage_names)},
        "num_from_store": from_store,
        "deferral": float(answers.deferred.mean()),
        "flops": spent,
        "last_flops": last_flops,
        "flops_saving": last_flops / spent if spent else math.nan,
        "seconds": stopwatch.wall,
        "last_seconds": stopwatch.wall * time_saving,
        "time_saving": time_saving,
        "images_per_second": stopwatch.images_per_second,
        "waiting": describe_waiting(stopwatch.wall, stopwatch.waited),
        "classes": _classes(answers, class_names),
    }
    if answers.has_labels:
        right = answers.own_labels == answers.targets
        asked = right[:, answers.last_seen == len(right) - 1]
        outcome["accuracy"] = 100 * float(answers.correct.mean())
        outcome["first_accuracy"] = 100 * float(right[0].mean())
        outcome["accuracies_on_last_seen"] = [100 * float(row.mean()) if asked.size else math.nan for row in asked]
    return outcome


def _classes(answers: Answers, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The classes, by the first model's answers where none are known; those with the largest share deferred first."""
    classes = answers.targets if answers.has_labels else answers.own_labels[0]
    names = np.array([class_names and class_names[label] or str(label) for label in classes], dtype=object)
    shares = {"deferred": answers.deferred.astype(float), "right": answers.correct.astype(float)}
    return html.class_rows(names, num_deferred=answers.deferred, **shares)


def promise_lines(policy: Policy, drift: Sequence[str], answers: Answers, unsure: Bools | None) -> list[str]:
    """What the policy promises, whether the images are like those that it was measured on, and its doubts."""
    lines = []
    if unsure is not None:
        lines.append(f"coverage {1 - unsure.mean():.1%}: unsure of {unsure.sum()} images")
        if answers.has_labels and not unsure.all():
            lines[0] += f", wrong on {1 - answers.correct[~unsure].mean():.2%} of the others"
    if policy.certificate:
        lines.append(policy.certificate.describe())
    if drift:
        lines.append(f"Drift: these are not images like the policy's: {'; '.join(drift)}; promises do not hold")
    elif policy.expected and policy.expected.quantiles:
        lines.append("no drift: shares and confidences are like those that the policy was measured on")
    return lines


def summary_lines(outcome: dict[str, Any], stage_names: Sequence[str]) -> list[str]:
    """Accuracy where known, deferral, and cost against the last model's."""
    first, *later = _called(stage_names)
    lines = []
    if "accuracy" in outcome:
        lines.append(f"accuracy {outcome['accuracy']:.2f}% ({first} alone {outcome['first_accuracy']:.2f}%)")
    for name, shown in zip(stage_names[1:], later, strict=False):
        seen, stands = outcome["num_seen"][name], outcome["num_answered_by"][name]
        share = seen / outcome["num_images"]
        lines.append(f"deferred to {shown}: {share:.1%} of the images ({seen}); its answer stands for {stands}")
    if "accuracy" in outcome and not np.isnan(outcome["accuracies_on_last_seen"]).any() and len(stage_names) > 1:
        on_last = outcome["accuracies_on_last_seen"]
        lines.append(f"on the deferred ones {first} has {on_last[0]:.2f}%, {later[-1]} {on_last[-1]:.2f}%")
    most = [row for row in outcome["classes"][:MOST_NAMED] if row["num_deferred"]]
    if most:
        by = "" if "accuracy" in outcome else f", by the answers of {first}"
        parts = [f"{row['name']}: {row['deferred']:.0f}% ({row['num_deferred']} of {row['images']})" for row in most]
        lines.append(f"classes that defer most{by}: {', '.join(map(one_line, parts))}")
    flops = f"FLOPs: {format_flops(outcome['flops'])} an image"
    if later and math.isnan(outcome["flops_saving"]):  # it was not loaded
        flops += f"; those of {later[-1]} are not known"
    elif later:
        alone, saving = format_flops(outcome["last_flops"]), _times(outcome["flops_saving"], "many")
        flops += f"; {later[-1]} on every image: {alone}, {saving}"
    return [*lines, flops]


def print_summary(outcome: dict[str, Any], stage_names: Sequence[str], output: Path) -> None:
    """Print that, the time against the last model's, and where the page and the result are."""
    print(*summary_lines(outcome, stage_names), _describe_time(outcome, _called(stage_names)[1:]), sep="\n")
    print(f"all of it on one page: {page_file(output)}")
    unreadable = outcome["num_unreadable"]
    left_out = f", {unreadable} unreadable left out ({errors_file(output)})" if unreadable else ""
    print(f"{outcome['num_images']} images{left_out}; result in {output}")


def _called(stage_names: Sequence[str]) -> list[str]:
    """What to call the models: the deep one of the specification's two as well, which a threshold may leave unasked."""
    is_pair = tuple(stage_names) in (tuple(PAIR), tuple(PAIR)[:1])
    return [f"the {name} model" for name in PAIR] if is_pair else [*stage_names]


def _describe_time(outcome: dict[str, Any], later: Sequence[str]) -> str:
    if outcome["num_from_store"]:
        return f"time: not compared; {outcome['num_from_store']} answers were in the store"
    text = f"time: {outcome['seconds']:.1f} s, {outcome['images_per_second']:.1f} images/s{outcome['waiting']}"
    if not later:
        return text
    if math.isnan(outcome["time_saving"]):
        return f"{text}; that of {later[-1]} is not known"
    alone = f"about {outcome['last_seconds']:.1f} s by its time on the deferred ones"
    return f"{text}; {later[-1]} on every image: {alone}, {_times(outcome['time_saving'], 'long')}"


def _times(saving: float, word: str) -> str:
    return f"{saving:.2f} times as {word}" + (": the cascade saves nothing" if saving < 1 else "")


def write_page(
    output: Path,
    answers: Answers,
    images: ImageSet,
    outcome: dict[str, Any],
    flops: Sequence[float | None],
    stage_names: Sequence[str],
    model_names: Sequence[str],
    lines: Sequence[str],
) -> None:
    """Write the page of a result file: the lines, models, classes, and thumbnails of deferred images.

    What a run took in time is left out: the page of a run that was interrupted is that of one that was not.
    """
    models = [
        (model, format_flops(cost) if cost else "", outcome["num_seen"][name], outcome["num_answered_by"][name])
        for name, model, cost in zip(stage_names, model_names, flops, strict=False)
    ]
    labelled = answers.has_labels
    classes = [
        (row["name"], row["images"], f"{row['deferred']:.0f}%", *([f"{row['right']:.1f}%"] if labelled else []))
        for row in outcome["classes"]
    ]
    changed = answers.deferred & (answers.labels != answers.own_labels[0])
    kinds = {"Deferred, and answered otherwise than at first": changed}
    kinds |= {"Deferred, and answered as at first": answers.deferred & ~changed}
    html.write_page(
        page_file(output),
        "folder.html",
        lines=lines,
        models=models,
        labelled=labelled,
        classes=classes,
        thumbnails=[(title, html.thumbnails(images, answers.places[of])) for title, of in kinds.items()],
        result=output.name,
    )
