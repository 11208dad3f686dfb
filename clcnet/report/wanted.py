"""What a user asks of the search for a cascade, by the flags of `cli.add_search_arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from clcnet.cascade.promises import Promise
from clcnet.cascade.selection import Goal

LEAST_SAVING = 10.0  # percent; less is not worth a second model


@dataclass(frozen=True)
class Wanted:
    """What a user asks of the search.

    Attributes:
        goal: an accuracy or a cost.
        milliseconds: (M,) an image by each model, where they are known.
        save_time: whether time is to be saved, not multiply-adds.
        max_stages: models in a cascade.
        least_saving: percent below which a cascade is not worth it.
        confidence: of the fused answers.
        price_per_hour, images_per_month: what turns time into money.
        promise: what is to be certified, on folds that choose nothing.
    """

    goal: Goal
    milliseconds: Sequence[float] | None = None
    save_time: bool = False
    max_stages: int = 4
    least_saving: float = LEAST_SAVING
    confidence: str = "max softmax"
    price_per_hour: float | None = None
    images_per_month: float | None = None
    promise: Promise | None = None


def goal_of(args: argparse.Namespace) -> Goal:
    """What the flags of `cli.add_search_arguments` ask for; the best single model's accuracy unless told otherwise."""
    if args.target_accuracy is not None:
        return Goal("accuracy", args.target_accuracy)
    return Goal("match") if args.target_FLOPs is None else Goal("flops", args.target_FLOPs)


def promise_of(args: argparse.Namespace) -> Promise | None:
    """What these flags have promised, if anything.

    Raises:
        ValueError: a probability without anything that is to hold with it.
    """
    asked = args.most_drop, args.most_FLOPs, args.most_risk
    if args.guarantee is not None and not any(asked):
        raise ValueError("--guarantee needs a promise; give --most-drop, --most-FLOPs or --most-risk")
    return Promise(args.guarantee or 0.95, *asked) if any(asked) else None


def wanted_of(args: argparse.Namespace, milliseconds: Sequence[float] | None) -> Wanted:
    """All that these flags ask for."""
    return Wanted(
        goal_of(args),
        milliseconds,
        args.cost == "time",
        args.max_stages,
        args.least_saving,
        args.confidence,
        args.price_per_hour,
        args.images_per_month,
        promise_of(args),
    )
