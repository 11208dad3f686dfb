"""The last lines of step 5: what a cascade's run over a folder of images came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clcnet.cascade.policy import Policy
from clcnet.cascade.runner import Answers, FolderRun
from clcnet.classifiers.stream import describe_waiting
from clcnet.cli import one_line
from clcnet.data.images import errors_file
from clcnet.report.tables import format_flops


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
    calls = answers.calls
    spent = sum(share * cost for share, cost in zip(calls, flops, strict=False) if share and cost is not None)
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
        "flops_saving": last_flops / spent,
        "seconds": stopwatch.wall,
        "last_seconds": stopwatch.wall * time_saving,
        "time_saving": time_saving,
        "images_per_second": stopwatch.images_per_second,
        "waiting": describe_waiting(stopwatch.wall, stopwatch.waited),
        "most_deferred": [
            (class_names and class_names[label] or str(label), part, total)
            for label, part, total in answers.most_deferred()
        ],
    }
    if answers.has_labels:
        right = answers.own_labels == answers.targets
        asked = right[:, answers.last_seen == len(right) - 1]
        outcome["accuracy"] = 100 * float(answers.correct.mean())
        outcome["first_accuracy"] = 100 * float(right[0].mean())
        outcome["accuracies_on_last_seen"] = [100 * float(row.mean()) if asked.size else math.nan for row in asked]
    return outcome


def print_promises(policy: Policy, outcome: dict[str, Any], answers: Answers, unsure: NDArray[np.bool_] | None) -> None:
    """Print what the policy promises, whether the images are like those that it was measured on, and its doubts."""
    if unsure is not None:
        text = f"coverage {1 - unsure.mean():.1%}: unsure of {unsure.sum()} images"
        if answers.has_labels and not unsure.all():
            text += f", wrong on {1 - answers.correct[~unsure].mean():.2%} of the others"
        print(text)
    if policy.certificate:
        print(policy.certificate.describe())
    if outcome["drift"]:
        print(f"Drift: these are not images like the policy's: {'; '.join(outcome['drift'])}; promises do not hold")
    elif policy.expected and policy.expected.quantiles:
        print("no drift: shares and confidences are like those that the policy was measured on")


def print_summary(outcome: dict[str, Any], stage_names: Sequence[str], output: Path) -> None:
    """Print accuracy where known, deferral, cost and time against the last model's, and where the result is."""
    first, *later = (f"the {name} model" if name in ("shallow", "deep") else name for name in stage_names)
    if "accuracy" in outcome:
        print(f"accuracy {outcome['accuracy']:.2f}% ({first} alone {outcome['first_accuracy']:.2f}%)")
    for name, shown in zip(stage_names[1:], later, strict=True):
        seen, stands = outcome["num_seen"][name], outcome["num_answered_by"][name]
        share = seen / outcome["num_images"]
        print(f"deferred to {shown}: {share:.1%} of the images ({seen}); its answer stands for {stands}")
    if "accuracy" in outcome and not np.isnan(outcome["accuracies_on_last_seen"]).any() and later:
        on_last = outcome["accuracies_on_last_seen"]
        print(f"on the deferred ones {first} has {on_last[0]:.2f}%, {later[-1]} {on_last[-1]:.2f}%")
    if outcome["most_deferred"]:
        by = "" if "accuracy" in outcome else f", by the answers of {first}"
        shares = (
            f"{one_line(name)}: {part / total:.0%} ({part} of {total})"
            for name, part, total in outcome["most_deferred"]
        )
        print(f"classes that defer most{by}: {', '.join(shares)}")
    last = (
        later[-1] if later else "the deep model" if stage_names[0] == "shallow" else ""
    )  # a policy may hold one alone
    print(_describe_flops(outcome, last))
    print(_describe_time(outcome, last))
    left_out = (
        f", {outcome['num_unreadable']} unreadable left out ({errors_file(output)})"
        if outcome["num_unreadable"]
        else ""
    )
    print(f"{outcome['num_images']} images{left_out}; result in {output}")


def _describe_flops(outcome: dict[str, Any], last: str) -> str:
    text = f"FLOPs: {format_flops(outcome['flops'])} an image"
    if not last:
        return text
    if math.isnan(outcome["flops_saving"]):  # it was not loaded
        return f"{text}; those of {last} are not known"
    alone = format_flops(outcome["last_flops"])
    return f"{text}; {last} on every image: {alone}, {_times(outcome['flops_saving'], 'many')}"


def _describe_time(outcome: dict[str, Any], last: str) -> str:
    if outcome["num_from_store"]:
        return f"time: not compared; {outcome['num_from_store']} answers were in the store"
    text = f"time: {outcome['seconds']:.1f} s, {outcome['images_per_second']:.1f} images/s{outcome['waiting']}"
    if not last:
        return text
    if math.isnan(outcome["time_saving"]):
        return f"{text}; that of {last} is not known"
    alone = f"about {outcome['last_seconds']:.1f} s by its time on the deferred ones"
    return f"{text}; {last} on every image: {alone}, {_times(outcome['time_saving'], 'long')}"


def _times(saving: float, word: str) -> str:
    return f"{saving:.2f} times as {word}" + (": the cascade saves nothing" if saving < 1 else "")
