"""The search that was asked for: its costs, cascades, promises and verdict, before any of it is written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clcnet.cascade.guarantee import Promised, certified, choosing_images
from clcnet.cascade.pool import folds_of_classes
from clcnet.cascade.search import Cascades, Found, find_cascades
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import Single, Units, Verdict, judge
from clcnet.data.outputs import Outputs
from clcnet.metrics import Ints
from clcnet.report.paper_table import distinct_names
from clcnet.report.wanted import CostFile, Wanted

GIVE_UP = (0.0, 0.5, 1.0, 2.0)  # points of accuracy in the table of what they save
_UNITS = {"FLOPs": "FLOPs", "time": "milliseconds"}  # by what is to be saved


@dataclass(frozen=True)
class Searched:
    """What a search came to.

    Attributes:
        outputs: of all models, over the N images that the figures are of.
        folds: (N,), each answered by what was chosen and fitted without it; one number where that were other images.
        num_choosing: how many images chose and fitted.
        names: of the models, as printed.
        units: of the costs.
        cascades: the first goal's is the one that the verdict is on, then those that give up accuracy.
        singles: the models alone.
        verdict: what to use.
        promised: what is certified, where that was asked for.
    """

    outputs: Sequence[Outputs]
    folds: Ints
    num_choosing: int
    names: Sequence[str]
    units: Units
    cascades: Cascades
    singles: Sequence[Single]
    verdict: Verdict
    promised: Promised | None = None

    @property
    def found(self) -> Found:
        """The cascade that the verdict is on."""
        return self.cascades.goals[0]

    @property
    def chain(self) -> str:
        """Its models, as printed."""
        return self.chain_of(self.found)

    def chain_of(self, found: Found) -> str:
        """The models of a cascade, as printed."""
        return " > ".join(self.names[model] for model in found.choice.chain)

    @property
    def best(self) -> Single:
        """The most accurate model as it is."""
        return max(self.singles[: len(self.names)], key=lambda single: single.scored.accuracy)


def search(outputs: Sequence[Outputs], folds: Ints, wanted: Wanted) -> Searched:
    """Search for what is wanted.

    Args:
        outputs: of two models or more over the same images, with classes and targets.
        folds: (N,).
        wanted: what is asked for.

    Raises:
        ValueError: a cost is not known; see `find_cascades` for more.
    """
    names = distinct_names([out.record.model for out in outputs])
    units, costs = _costs(outputs, names, wanted)
    held = list[Outputs]()
    if wanted.promise:
        chosen = choosing_images(folds)
        outputs, held = ([out.subset(places) for out in outputs] for places in (chosen, ~chosen))
        folds = folds_of_classes(np.asarray(outputs[0].targets))
    best = max(out.accuracy for out in outputs)
    goals = [wanted.goal, *(Goal("accuracy", best - points) for points in GIVE_UP)]
    cascades = find_cascades(
        outputs, folds, goals, costs, wanted.max_stages, confidence=wanted.confidence, progress=True
    )
    if wanted.promise is None:
        singles, found = cascades.singles(names), cascades.goals[0]
        verdict = judge(found.cross_fitted, wanted.goal, found.target, singles, units, wanted.least_saving)
        return Searched(outputs, folds, len(folds), names, units, cascades, singles, verdict)
    cascades, promised = certified(cascades, outputs, held, costs, wanted.promise, wanted.confidence)
    singles = cascades.singles(names)
    verdict = promised.judge(singles[promised.deep], units, wanted.least_saving)
    elsewhere = np.zeros(len(held[0]), dtype=np.int64)
    return Searched(held, elsewhere, len(folds), names, units, cascades, singles, verdict, promised)


def _costs(outputs: Sequence[Outputs], names: Sequence[str], wanted: Wanted) -> tuple[Units, np.ndarray]:
    """What the models cost an image, (U, M), the unit that is to be saved first."""
    table = {"FLOPs": [out.record.flops for out in outputs]}
    if wanted.milliseconds is not None:
        table["milliseconds"] = list(wanted.milliseconds)
    if isinstance(wanted.cost, CostFile):
        saved = wanted.cost.unit
        table[saved] = [*wanted.cost.of([out.record.model for out in outputs], names)]
    else:
        saved = _UNITS[wanted.cost]
    if saved not in table:
        raise ValueError("what the models take in time is not known; run them (step 4 with their names) to measure it")
    units = Units((saved, *(name for name in table if name != saved)))
    return units, np.array([table[name] for name in units.names], dtype=np.float64)
