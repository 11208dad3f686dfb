"""The threshold to suggest for the paper's rule, from two tables that know no classes, as CSV."""

import numpy as np
from numpy.typing import NDArray

from clcnet.cascade.curve import surest_steps
from clcnet.cascade.rule import known
from clcnet.cascade.selection import Goal, choose, short_threshold
from clcnet.data.outputs import Outputs


def suggest_threshold(outputs: Outputs, source: NDArray[np.int64], confidence: NDArray[np.float32]) -> float | None:
    """The lowest threshold at which the cascade is as accurate as the deep model on held-out images of both tables.

    The more accurate table is taken to be the deep model's. Prints the threshold with what it gives; where there is
    none, the one that comes nearest.

    Args:
        outputs: N held-out rows of both tables.
        source: (N,) the table of each row, 0 or 1.
        confidence: (N,) in the answers.

    Returns:
        The shortest decimal with that effect; None where no threshold is accurate enough, or no image in both tables.
    """
    row_of = [{name: row for row, name in enumerate(outputs.names) if source[row] == table} for table in (0, 1)]
    both = [name for name in row_of[0] if name in row_of[1]]
    if not both:
        print("no threshold suggested: the two tables share no held-out image")
        return None
    rows, correct = np.array([[place[name] for name in both] for place in row_of]), known(outputs.correct, outputs)
    rows = rows[order := np.argsort(correct[rows].sum(axis=1), kind="stable")]
    steps = surest_steps(confidence[rows], correct[rows], [0, 0])
    shallow, deep = order + 1
    print(
        f"on the {len(steps)} held-out images of both tables the shallow model (table {shallow}) has "
        f"{steps.own_accuracy[0]:.2f}%, the deep one (table {deep}) {steps.own_accuracy[1]:.2f}%"
    )
    curve, point, serves = choose(steps, Goal("match"))
    threshold = short_threshold(curve, point)
    gives = f"{threshold}: {curve.accuracy[point]:.2f}% with {curve.deferral[point]:.1%} deferred"
    if not serves:
        print(f"no threshold reaches the deep model's accuracy: use it alone, or the nearest threshold {gives}")
        return None
    print(f"suggested threshold {gives}")
    return threshold
