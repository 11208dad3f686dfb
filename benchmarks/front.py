"""The table of the front page: how much a cascade saves at the accuracy of the dearest model, on real images.

    python -m benchmarks.front ../shared > benchmarks/results/front.md    # a few minutes on two cores

Everything is chosen and fitted on four folds and scored on the fifth: CLCNet on the shallow model's answers,
thresholds, weights, and which models. "never": no threshold reached the accuracy on the images it was chosen on.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.fused import CIFAR_COSTS, LITE2, cifar_outputs, imagenet_outputs
from clcnet.cascade.curve import surest_steps
from clcnet.cascade.search import find_cascades
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import recommend
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.outputs import Outputs
from clcnet.network.training import fold_splits, train_many

LITE0 = "tf_efficientnet_lite0"


def confidence_of_clcnet(shallow: Outputs, deep: Outputs, folds: np.ndarray) -> list[np.ndarray]:
    """How sure five networks are of both models' answers: each learnt from the shallow one's, without its fold."""
    splits = fold_splits(folds, np.arange(len(folds)), seed=42)
    networks = train_many(shallow.sorted_probs, np.asarray(shallow.correct), splits, progress=False)
    confidence = [np.empty(len(folds)), np.empty(len(folds))]
    for each, outputs in zip(confidence, (shallow, deep), strict=True):
        for fold, network in enumerate(networks):
            each[folds == fold] = network.predict(outputs.sorted_probs[folds == fold])
    return confidence


def by_the_papers_rule(confidence: Sequence[np.ndarray], pair: Sequence[Outputs], folds: np.ndarray) -> str:
    """A cell: the saving at the deep model's accuracy where the surer answer stands."""
    steps = surest_steps(confidence, [each.correct for each in pair], [each.record.flops for each in pair])
    advice = recommend(steps, folds, Goal("match"))
    saving, _ = advice.cross_fitted.saving(pair[-1].record.flops)
    return cell(saving, advice.cross_fitted.accuracy) if advice.reached else "never"


def fused(outputs: Sequence[Outputs], folds: np.ndarray) -> tuple[str, str]:
    """A cell and the models of it: the saving at the dearest model's accuracy by fused answers."""
    dearest = outputs[-1]
    (found,) = find_cascades(outputs, folds, [Goal("accuracy", dearest.accuracy)]).goals
    saving, _ = found.cross_fitted.saving(dearest.record.flops)
    return cell(saving, found.cross_fitted.accuracy), " > ".join(outputs[k].record.model for k in found.choice.chain)


def cell(saving: float, accuracy: float) -> str:
    return f"{saving:.2f}x at {accuracy:.2f}%"


def row(about: str, all_outputs: Sequence[Outputs], shallow: Outputs, folds: np.ndarray) -> str:
    """One data set and pair, and what all of its models make of it; the dearest model stands last."""
    pair = [shallow, all_outputs[-1]]
    learnt = by_the_papers_rule(confidence_of_clcnet(*pair, folds), pair, folds)
    simple = by_the_papers_rule([SIMPLE_CONFIDENCES["max softmax"](each.sorted_probs) for each in pair], pair, folds)
    of_two, _ = fused(pair, folds)
    of_all, chain = fused(all_outputs, folds) if len(all_outputs) > 2 else ("", "")
    name = f"{shallow.record.model} > {pair[1].record.model}"
    return f"| {about} | {name} | {pair[1].accuracy:.2f}% | {learnt} | {simple} | {of_two} | {of_all} | {chain} |"


def lines(shared: Path) -> Iterator[str]:
    """The table, row by row."""
    yield (
        "| images | shallow > deep | deep alone | paper's rule, CLCNet | paper's rule, max softmax | fused | "
        "fused, up to four models | which |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    outputs, folds = cifar_outputs(shared / "cifar10")
    folds = folds - folds.min()
    several = [outputs[name] for name in CIFAR_COSTS]
    yield row("CIFAR-10, 10,000", several[:2], several[0], folds)
    yield row("CIFAR-10, 10,000", several, outputs["resnet20"], folds)
    outputs, folds = imagenet_outputs(shared / "imagenet1k")
    networks = list(outputs.values())
    assert networks[-1] is outputs[LITE2]
    yield row("ImageNet's classes, 2,300", networks, outputs[LITE0], folds)


if __name__ == "__main__":
    for line in lines(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared")):
        print(line, flush=True)
