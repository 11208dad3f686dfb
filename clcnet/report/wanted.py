"""What a user asks of the search for a cascade: the flags, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from clcnet import cli
from clcnet.cascade.guarantee import Promise
from clcnet.cascade.rules import BEST
from clcnet.cascade.selection import Goal
from clcnet.confidence import SIMPLE_CONFIDENCES

LEAST_SAVING = 10.0  # percent; less is not worth a second model


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the scripts that search for a cascade: its goal, and what it may be."""
    group = parser.add_argument_group("search for a cascade")
    add = group.add_mutually_exclusive_group().add_argument
    billions: dict[str, Any] = {"type": cli.positive_float, "metavar": "BILLIONS"}
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
    add("--most-FLOPs", **billions, help="promise: takes no more an image on average")
    add(
        "--most-risk",
        type=cli.probability,
        metavar="SHARE",
        help="promise: errs on no more of what it answers; the rest is unsure",
    )
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
class Wanted:
    """What a user asks of the search.

    Attributes:
        goal: an accuracy or a cost; the best single model's accuracy unless told otherwise.
        milliseconds: (M,) an image by each model, where they are known.
        cost: what is to be saved: "FLOPs", "time", or what a file says.
        max_stages: models in a cascade.
        least_saving: percent below which a cascade is not worth it.
        confidence: of the fused answers.
        price_per_hour, images_per_month: what turns time into money.
        promise: what is to be certified, on folds that choose nothing.
    """

    goal: Goal
    milliseconds: Sequence[float] | None = None
    cost: str | CostFile = "FLOPs"
    max_stages: int = 4
    least_saving: float = LEAST_SAVING
    confidence: str = "max softmax"
    price_per_hour: float | None = None
    images_per_month: float | None = None
    promise: Promise | None = None

    @property
    def goal_of_flops(self) -> Goal:
        """The goal of the paper's rule, which counts multiply-adds whatever is to be saved."""
        return Goal("match") if self.goal.kind == "flops" and self.cost != "FLOPs" else self.goal

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """What the flags ask for; what the models take in time is not known yet.

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
            cost=args.cost if args.cost in ("FLOPs", "time") else CostFile.read(args.cost),
            max_stages=args.max_stages,
            least_saving=args.least_saving,
            confidence=args.confidence,
            price_per_hour=args.price_per_hour,
            images_per_month=args.images_per_month,
            promise=Promise(args.guarantee or 0.95, *asked) if any(asked) else None,
        )
