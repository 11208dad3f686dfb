"""What the two scripts that search for a cascade share: their flags, what is asked by them, and the search itself.

`search_report` writes down what it came to.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from clcnet import cli
from clcnet.cascade.guarantee import Promise, Promised, certified, choosing_images
from clcnet.cascade.pool import folds_of_classes
from clcnet.cascade.rules import BEST
from clcnet.cascade.search import Cascades, Found, find_cascades
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import Scored, Single, Units, Verdict, judge
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.outputs import Outputs
from clcnet.metrics import Floats, Ints
from clcnet.report.tables import distinct_names

GIVE_UP = (0.0, 0.5, 1.0, 2.0)  # points of accuracy in the table of what they save
LEAST_SAVING = 10.0  # percent; less is not worth a second model
_UNITS = {"FLOPs": "FLOPs", "time": "milliseconds"}  # by what is to be saved
_HOUR = 3.6e6  # milliseconds


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the scripts that search for a cascade: its goal, and what it may be."""
    group = parser.add_argument_group("search for a cascade")
    add = group.add_mutually_exclusive_group().add_argument
    add("--match", choices=["deep"], help="reach the best model's accuracy for the least cost (the default)")
    add("--target-accuracy", type=cli.positive_float, metavar="PERCENT", help="reach this for the least cost")
    most = "be as accurate as can be for no more than this, in the unit of --cost"
    add("--target-FLOPs", "--target-cost", type=cli.positive_float, metavar="COST", help=most)
    add = group.add_argument
    add("--max-stages", type=cli.stages, default=4, metavar="K", help="models in a cascade, 1 to 4")
    unit = "what to save: FLOPs, time, or a column of a CSV file with models in its first (default: its second column)"
    add("--cost", default="FLOPs", metavar="FLOPs|time|FILE[:COLUMN]", help=unit)
    less = "below it a single model is advised"
    add("--least-saving", type=cli.finite_float, default=LEAST_SAVING, metavar="PERCENT", help=less)
    scores = f"of fused answers: {', '.join(SIMPLE_CONFIDENCES)}, or best, the one that cross-validates best"
    add("--confidence", choices=(*SIMPLE_CONFIDENCES, BEST), default="max softmax", metavar="NAME", help=scores)
    surely = "that all promises hold, for images like these (default: 0.95)"
    add("--guarantee", type=cli.probability, metavar="PROBABILITY", help=surely)
    add("--most-drop", type=cli.positive_float, metavar="POINTS", help="promise: loses no more against the best model")
    takes = "promise: takes no more an image on average"
    add("--most-FLOPs", type=cli.positive_float, metavar="BILLIONS", help=takes)
    errs = "promise: errs on no more of what it answers; the rest is unsure"
    add("--most-risk", type=cli.probability, metavar="SHARE", help=errs)
    money = "of the machine; with --images-per-month, tells money"
    add("--price-per-hour", type=cli.positive_float, metavar="MONEY", help=money)
    add("--images-per-month", type=cli.positive_float, metavar="N", help="what the service sees")


@dataclass(frozen=True)
class CostFile:
    """What models cost in a unit of the user's, by a CSV file with a header and models in its first column."""

    path: str
    unit: str  # a column's name
    known: dict[str, Any]

    @classmethod
    def read(cls, text: str) -> Self:
        """Read FILE, whose second column is taken, or FILE:COLUMN."""
        path, column = text, ""
        if not Path(text).is_file() and ":" in text:
            path, _, column = text.rpartition(":")
        if not Path(path).is_file():
            raise FileNotFoundError(f"--cost {text} is neither FLOPs, nor time, nor a CSV file model,cost")
        try:
            frame = pd.read_csv(path, skipinitialspace=True)
        except ValueError as error:
            raise ValueError(f"--cost {path} is no CSV file of models and their costs ({error})") from None
        unit = column or str(frame.columns[min(1, len(frame.columns) - 1)])
        if unit not in frame.columns[1:]:
            raise ValueError(
                f"--cost {path} has no column {unit!r} beside that of the models; it has {list(frame.columns)}"
            )
        costs = pd.to_numeric(frame[unit], errors="coerce")
        return cls(path, unit, dict(zip(frame.iloc[:, 0].astype(str), costs, strict=True)))

    def of(self, models: Sequence[str], names: Sequence[str]) -> list[float]:
        """What models cost, by the name in their tables, the printed one, or their architecture without a tag."""
        costs = []
        for model, name in zip(models, names, strict=True):
            cost = next((self.known[each] for each in (model, name, model.split(".")[0]) if each in self.known), None)
            if cost is None:
                raise ValueError(f"--cost {self.path} has no row for {model}; add one, under that name or {name}")
            if not 0 < cost < np.inf:
                raise ValueError(f"--cost {self.path}: the {self.unit} of {model} is no number above 0")
            costs.append(float(cost))
        return costs


@dataclass(frozen=True)
class SearchRequest:
    """What a user asks of the search.

    Attributes:
        goal: an accuracy or a cost; the best single model's accuracy unless told otherwise.
        cost: what is to be saved: "FLOPs", "time", or what a file says.
        max_stages: models in a cascade.
        least_saving: percent below which a cascade is not worth it.
        confidence: of the fused answers.
        price_per_hour, images_per_month: what turns time into money.
        promise: what is to be certified, on folds that choose nothing.
    """

    goal: Goal
    cost: str | CostFile = "FLOPs"
    max_stages: int = 4
    least_saving: float = LEAST_SAVING
    confidence: str = "max softmax"
    price_per_hour: float | None = None
    images_per_month: float | None = None
    promise: Promise | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """What the flags ask for.

        Raises:
            ValueError, OSError: a probability without anything that is to hold with it; one half of what tells money;
                no file of costs.
        """
        if (args.price_per_hour is None) != (args.images_per_month is None):
            raise ValueError("--price-per-hour and --images-per-month tell money together; give both")
        asked = args.most_drop, args.most_FLOPs, args.most_risk
        if args.guarantee is not None and not any(asked):
            raise ValueError("--guarantee needs a promise; give --most-drop, --most-FLOPs or --most-risk")
        goal = Goal("match") if args.target_FLOPs is None else Goal("flops", args.target_FLOPs)
        return cls(
            goal if args.target_accuracy is None else Goal("accuracy", args.target_accuracy),
            args.cost if args.cost in _UNITS else CostFile.read(args.cost),
            args.max_stages,
            args.least_saving,
            args.confidence,
            args.price_per_hour,
            args.images_per_month,
            Promise(args.guarantee or 0.95, *asked) if any(asked) else None,
        )

    @property
    def goal_of_flops(self) -> Goal:
        """The goal of the paper's rule, which counts multiply-adds whatever is to be saved."""
        return Goal("match") if self.goal.kind == "flops" and self.cost != "FLOPs" else self.goal

    def costs(
        self, outputs: Sequence[Outputs], names: Sequence[str], milliseconds: Sequence[float] | None
    ) -> tuple[Units, Floats]:
        """What the models cost an image, (U, M), the unit that is to be saved first; for the arguments see `search`."""
        table = {"FLOPs": [out.record.flops for out in outputs]}
        if milliseconds is not None:
            table["milliseconds"] = list(milliseconds)
        if isinstance(self.cost, CostFile):
            saved = self.cost.unit
            table[saved] = [*self.cost.of([out.record.model for out in outputs], names)]
        else:
            saved = _UNITS[self.cost]
        if saved not in table:
            raise ValueError(
                "what the models take in time is not known; run them (step 4 with their names) to measure it"
            )
        units = Units((saved, *(name for name in table if name != saved)))
        return units, np.array([table[name] for name in units.names], dtype=np.float64)


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        request: what was asked for.
        outputs: of all models, over the N images that the figures are of.
        folds: (N,), each answered by what was chosen and fitted without it; one number where that were other images.
        num_choosing: how many images chose and fitted.
        names: of the models, as printed.
        units: of the costs.
        cascades: the first goal's is the one that the verdict is on, then those that give up accuracy.
        singles: the models alone.
        verdict: what to use.
        promised: what is certified, nothing where that was not asked for.
    """

    request: SearchRequest
    outputs: Sequence[Outputs]
    folds: Ints
    num_choosing: int
    names: Sequence[str]
    units: Units
    cascades: Cascades
    singles: Sequence[Single]
    verdict: Verdict
    promised: Promised = Promised()

    @property
    def found(self) -> Found:
        """The cascade that the verdict is on."""
        return self.cascades.goals[0]

    @property
    def raw(self) -> Sequence[Single]:
        """The models as they are."""
        return self.singles[: len(self.names)]

    @property
    def best(self) -> Single:
        """The most accurate model as it is."""
        return max(self.raw, key=lambda single: single.scored.accuracy)

    def chain_of(self, found: Found) -> str:
        """The models of a cascade, as printed."""
        return " > ".join(self.names[model] for model in found.choice.chain)

    def a_month(self, scored: Scored) -> tuple[float, float] | None:
        """Hours, and money, that the images of a month take; None where the time or the price is not known."""
        price, images = self.request.price_per_hour, self.request.images_per_month
        milliseconds = self.units.of(scored.costs, "milliseconds")
        if milliseconds is None or price is None or images is None:
            return None
        hours = milliseconds * images / _HOUR
        return hours, hours * price


def search(
    outputs: Sequence[Outputs], folds: Ints, request: SearchRequest, milliseconds: Sequence[float] | None = None
) -> SearchResult:
    """Search for what is asked for.

    Args:
        outputs: of M models, two or more, over the same N images, with classes and targets.
        folds: (N,).
        request: what is asked for.
        milliseconds: (M,) an image by each model, where they are known.

    Raises:
        ValueError: a cost is not known; see `find_cascades` for more.
    """
    names = distinct_names([out.record.model for out in outputs])
    units, costs = request.costs(outputs, names, milliseconds)
    held = list[Outputs]()
    if request.promise:
        chosen = choosing_images(folds)
        outputs, held = ([out.subset(places) for out in outputs] for places in (chosen, ~chosen))
        folds = folds_of_classes(np.asarray(outputs[0].targets))
    best = max(out.accuracy for out in outputs)
    goals = [request.goal, *(Goal("accuracy", best - points) for points in GIVE_UP)]
    cascades = find_cascades(
        outputs, folds, goals, costs, request.max_stages, confidence=request.confidence, progress=True
    )
    num_choosing, promised = len(folds), Promised()
    if request.promise is None:
        singles, found = cascades.singles(names), cascades.goals[0]
        verdict = judge(found.cross_fitted, request.goal, found.target, singles, units, request.least_saving)
    else:
        best = int(np.argmax([scored.accuracy for scored in cascades.raw]))
        cascades, promised = certified(cascades, outputs, held, costs, best, request.promise, request.confidence)
        singles = cascades.singles(names)
        verdict = promised.judge(singles[best], units, request.least_saving)
        outputs, folds = held, np.zeros(len(held[0]), dtype=np.int64)
    return SearchResult(request, outputs, folds, num_choosing, names, units, cascades, singles, verdict, promised)
