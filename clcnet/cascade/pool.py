"""The arithmetic of fused answers: a logarithmic opinion pool of models, one weight a model and one offset a class.

After models 1..k the answer is the top class of softmax(w_1 log p_1 + ... + w_k log p_k + b). Weights are free (a
temperature is among them, they need not sum to 1); b is shrunk towards 0 by an L2 penalty, chosen by cross-validation,
"no b" among the choices. With k = 1 this is one model with its temperature and class offsets: "corrected".

b follows the class shares of the images it was fitted on: where those to come have other shares, fit without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import block_diag, diags_array

from clcnet.confidence import SIMPLE_CONFIDENCES, margin, max_softmax
from clcnet.data.images import NUM_FOLDS, spread_folds
from clcnet.data.outputs import UNKNOWN, Outputs, sort_probs
from clcnet.metrics import Bools, Floats, Ints

Logs = NDArray[np.float32]
HeldOut = frozenset[int]  # folds that a pool was not fitted on

PENALTIES = (None, 30.0, 10.0, 3.0)  # on b, from the simplest pool to the freest; None is without b
WEIGHT_PENALTY = 1e-3  # settles what the images leave open: equal models, and a model that is always right
TOLERANCE = 1e-2  # of the fit, in standard errors of its parameters
FIT_ROWS = 8000  # images that settle weights and offsets
KEPT_CLASSES, NUM_GROUPS = 32, 8  # of an image's classes: told apart, and groups of the others
CHUNK = 2000  # images whose classes are told apart at once


@dataclass(frozen=True)
class Rows:
    """Log-probabilities of K models over N images, for the m classes of each image that matter.

    Where there are many classes, those that no model ranks high are lumped into a few groups of equal probabilities.
    On seven ImageNet networks that moves a pool's top probability by 0.001 on average and by 0.03 at most.
    """

    logs: Logs  # (K, m, N), class first; the last rows are the groups' mean probabilities, if there are any
    positions: Ints  # (N,) row of the target; UNKNOWN where there is none
    num_classes: int  # n
    classes: Ints | None = None  # (m, N) the class of each row, n + g for group g; None where all are kept, in order
    groups: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (G,) how many classes each one holds

    def __len__(self) -> int:
        return self.logs.shape[2]

    @property
    def kept(self) -> int:
        """How many classes of an image are told apart."""
        return self.logs.shape[1] - len(self.groups)

    @property
    def targets(self) -> Ints:
        """(N,) classes, UNKNOWN where one is not known."""
        if self.classes is None:
            return self.positions
        return np.where(self.positions == UNKNOWN, UNKNOWN, self.classes[self.positions, np.arange(len(self))])

    def take(self, models: Sequence[int], images: NDArray[Any] | slice = slice(None)) -> Rows:
        """Some of the models, over some of the images."""
        classes = None if self.classes is None else self.classes[:, images]
        logs = np.ascontiguousarray(self.logs[list(models)][:, :, images])
        return Rows(logs, self.positions[images], self.num_classes, classes, self.groups)


def log_clipped(probs: ArrayLike) -> Logs:
    """Logarithms in float32; a probability of exactly 0 counts as the smallest normal number, whose log is -87.3."""
    return np.log(np.maximum(np.asarray(probs, dtype=np.float32), np.finfo(np.float32).tiny))


def keep_classes(probs: Sequence[NDArray[np.float32]], targets: Ints, kept: int = KEPT_CLASSES) -> Rows:
    """Tell apart the classes of (N, n) probabilities that some model ranks high and the target, and lump the others.

    All are kept where n is not above twice `kept`.
    """
    rows = np.stack([model.T for model in probs])  # (K, n, N)
    num_classes = rows.shape[1]
    if num_classes <= 2 * kept:
        return Rows(log_clipped(rows), targets, num_classes)
    highest = rows.max(axis=0)
    known = np.flatnonzero(targets != UNKNOWN)
    highest[targets[known], known] = np.inf
    order = np.argsort(-highest.T, axis=1).T
    starts = np.unique(np.geomspace(1, num_classes - kept + 1, NUM_GROUPS + 1).astype(np.int64))[:-1] - 1
    sizes = np.diff(np.append(starts, num_classes - kept))
    lumped = np.add.reduceat(np.take_along_axis(rows, order[None, kept:], 1), starts, axis=1) / sizes[:, None]
    numbers = num_classes + np.arange(len(sizes))
    classes = np.vstack([order[:kept], np.repeat(numbers[:, None], len(targets), axis=1)])
    positions = np.where(targets == UNKNOWN, UNKNOWN, (classes == targets).argmax(axis=0))
    logs = log_clipped(np.concatenate([np.take_along_axis(rows, order[None, :kept], 1), lumped], axis=1))
    return Rows(logs, positions, num_classes, classes, sizes)


def rows_of(outputs: Sequence[Outputs]) -> Rows:
    """The rows of K models' outputs over the same images, a few thousand images at a time."""
    check_same(outputs)
    size = len(outputs[0])
    targets = next((out.targets for out in outputs if out.targets is not None), np.full(size, UNKNOWN))
    parts = [
        keep_classes([out.subset(images).probs for out in outputs], targets[images])
        for images in np.split(np.arange(size), range(CHUNK, size, CHUNK))
    ]
    classes = [part.classes for part in parts if part.classes is not None]
    return replace(
        parts[0],
        logs=np.concatenate([part.logs for part in parts], axis=-1),
        positions=np.concatenate([part.positions for part in parts]),
        classes=np.concatenate(classes, axis=1) if classes else None,
    )


def check_same(outputs: Sequence[Outputs]) -> None:
    """Refuse outputs that are not of the same images and classes."""
    first = outputs[0]
    for out in outputs[1:]:
        if out.names != first.names or out.num_classes != first.num_classes:
            raise ValueError(
                f"{first.record.model or 'the first model'} has {len(first)} images of {first.num_classes} classes, "
                f"{out.record.model or 'another'} {len(out)} of {out.num_classes}, or in another order; give outputs "
                "of the same images"
            )


@dataclass(frozen=True)
class Pool:
    """Weights (K,), and class offsets (n,) or None."""

    weights: Floats
    offsets: Floats | None = None

    def scores(self, rows: Rows) -> Logs:
        """(m, N) logits of the pool."""
        weights = self.weights.astype(np.float32)
        scores = (weights @ rows.logs.reshape(len(weights), -1)).reshape(rows.logs.shape[1:])
        offsets = np.zeros(rows.num_classes) if self.offsets is None else self.offsets
        if rows.classes is None:
            scores += offsets.astype(np.float32)[:, None]
        else:
            scores += np.append(offsets, np.log(rows.groups)).astype(np.float32)[rows.classes]
        return scores

    def probs(self, rows: Rows) -> tuple[Logs, Logs]:
        """(m, N) probabilities of the pool, and (N,) the logarithm of the target's, arbitrary where it is unknown."""
        scores = self.scores(rows)
        scores -= scores.max(axis=0)
        target = scores[rows.positions, np.arange(len(rows))]
        np.exp(scores, out=scores)
        total = scores.sum(axis=0)
        scores /= total
        return scores, target - np.log(total)

    def sorted(self, outputs: Sequence[Outputs]) -> tuple[NDArray[np.float32], Ints]:
        """(N, n) sorted probabilities, and (N,) the classes of the first ones; of equal ones the lowest class."""
        rows = np.stack([log_clipped(out.probs).T for out in outputs])
        probs, _ = self.probs(Rows(rows, np.zeros(rows.shape[2], dtype=np.int64), rows.shape[1]))
        sorted_probs, classes = sort_probs(np.ascontiguousarray(probs.T))
        return sorted_probs, classes[:, 0].astype(np.int64)


def fit_rows(rows: Rows, penalty: float | None, start: Pool | None = None) -> Pool:
    """The pool that minimises summed cross-entropy + penalty * |b|^2, over images that all have a target.

    The penalty is above 0, so that the offset of a class without images stays finite, or None for no offsets.
    """
    num_models, num_classes = len(rows.logs), rows.num_classes
    flat = rows.logs.reshape(num_models, -1)
    observed = rows.logs[:, rows.positions, np.arange(len(rows))].sum(axis=1, dtype=np.float64)
    if penalty is not None:
        observed = np.append(observed, np.bincount(rows.targets, minlength=num_classes))
    ridge = np.append(np.full(num_models, WEIGHT_PENALTY), np.full(len(observed) - num_models, penalty or 0.0))
    origin = np.zeros(len(observed))
    origin[:num_models] = 1 / num_models if start is None else start.weights
    if start is not None and start.offsets is not None and penalty is not None:
        origin[num_models:] = start.offsets

    def pool_at(point: Floats) -> Pool:
        return Pool(point[:num_models], None if penalty is None else point[num_models:])

    def loss(step: Floats) -> tuple[float, Floats]:
        point = origin + scale @ step
        probs, logs = pool_at(point).probs(rows)
        expected = (flat @ probs.ravel()).astype(np.float64)  # were the targets drawn from the pool
        if penalty is not None:
            expected = np.append(expected, _class_sums(rows, probs))
        slope = expected - observed + 2 * ridge * point
        return float(ridge @ point**2 - logs.sum(dtype=np.float64)), slope @ scale

    from scipy.optimize import minimize  # takes half a second to import, and a fitted rule needs none of it

    scale = _whitening(rows, pool_at(origin).probs(rows)[0], ridge)
    options = {"gtol": TOLERANCE, "ftol": 1e-12}
    result = minimize(loss, np.zeros(len(origin)), jac=True, method="L-BFGS-B", options=options)
    return pool_at(origin + scale @ result.x)


def _class_sums(rows: Rows, values: Logs) -> Floats:
    """(n,) sums by class, of the classes that are told apart."""
    if rows.classes is None:
        return values.sum(axis=1, dtype=np.float64)
    sums = np.bincount(rows.classes.ravel(), values.ravel(), rows.num_classes + len(rows.groups)).astype(np.float64)
    return sums[: rows.num_classes]


def _whitening(rows: Rows, probs: Logs, ridge: Floats) -> Any:
    """(D, D) units in which the loss has curvature 1 at the start: there L-BFGS needs few steps.

    The curvature is exact where all classes are kept; else the offsets' is taken as diagonal.
    """
    num_models = len(rows.logs)
    weighted = rows.logs * probs
    means = weighted.sum(axis=1)
    curvature = weighted.reshape(num_models, -1) @ rows.logs.reshape(num_models, -1).T - means @ means.T
    exact = rows.classes is None and len(ridge) > num_models
    if exact:
        cross = weighted.sum(axis=2) - means @ probs.T
        among = np.diag(probs.sum(axis=1)) - probs @ probs.T
        curvature = np.block([[curvature, cross], [cross.T, among]])
    curvature = curvature.astype(np.float64) + np.diag(2 * ridge[: len(curvature)])
    values, vectors = np.linalg.eigh(curvature)
    scale = vectors / np.sqrt(np.maximum(values, 1e-6 * values.max() + 1e-12))
    if exact or len(ridge) == num_models:
        return scale
    widths = 1 / np.sqrt(_class_sums(rows, probs * (1 - probs)) + 2 * ridge[num_models:])
    return block_diag([scale, diags_array(widths)], format="csr")


class CrossFit:
    """The pools of a set of models: on all images, without each fold, and, `deep`, without each pair of folds.

    The penalty of a pool is chosen on folds that it was fitted on, each scored by the pool fitted without it too; of
    those that no more than a standard error of the paired difference separates from the best the simplest is taken.
    """

    def __init__(
        self, rows: Rows, folds: Ints, penalties: Sequence[float | None] = PENALTIES, deep: bool = False
    ) -> None:
        """Fit N images with targets in folds (N,)."""
        self.numbers = [int(fold) for fold in np.unique(folds)]
        models = range(len(rows.logs))
        self.parts = {fold: rows.take(models, folds == fold) for fold in self.numbers}
        self.penalties = penalties
        self.paths: dict[HeldOut, list[Pool]] = {}
        for out in (some for size in range(3 if deep else 2) for some in combinations(self.numbers, size)):
            images = _spread_evenly(rows.targets, np.flatnonzero(~np.isin(folds, out)))
            if len(images):
                chosen, pools = rows.take(models, images), list[Pool]()
                for penalty in penalties:
                    pools.append(fit_rows(chosen, penalty, pools[-1] if pools else None))
                self.paths[frozenset(out)] = pools

    def pool(self, out: Iterable[int] = ()) -> Pool:
        """The pool fitted without the folds `out`, its penalty chosen without them."""
        return self.paths[frozenset(out)][self.choice(out)]

    def choice(self, out: Iterable[int] = ()) -> int:
        """Index of the penalty that cross-validates best on all folds but `out`."""
        held = frozenset(out)
        inner = [fold for fold in self.numbers if fold not in held and held | {fold} in self.paths]
        if len(self.penalties) == 1 or not inner:
            return 0
        losses = [
            np.concatenate([-self.paths[held | {fold}][index].probs(self.parts[fold])[1] for fold in inner])
            for index in range(len(self.penalties))
        ]
        return simplest_of_best(np.array(losses, dtype=np.float64))


def simplest_of_best(losses: Floats) -> int:
    """The first of the rows (D, N) whose mean is within a standard error (of the paired difference) of the lowest."""
    excess = losses - losses[losses.mean(axis=1).argmin()]
    near = excess.mean(axis=1) <= excess.std(axis=1) / np.sqrt(losses.shape[1])
    return int(near.argmax())


def _spread_evenly(targets: Ints, images: Ints, most: int = FIT_ROWS) -> Ints:
    """At most so many of the images, of every class in proportion."""
    ordered = images[np.argsort(targets[images], kind="stable")]
    return ordered if len(ordered) <= most else ordered[np.linspace(0, len(ordered) - 1, most).astype(np.int64)]


def standing(pool: Pool, rows: Rows, confidence: str = "max softmax") -> tuple[Floats, Bools]:
    """How sure the pool is of its answers by a one-line confidence, (N,), and whether they are right, (N,)."""
    probs, _ = pool.probs(rows)
    told = probs[: rows.kept]
    correct = told.argmax(axis=0) == rows.positions
    function = SIMPLE_CONFIDENCES[confidence]
    if function is max_softmax:
        return told.max(axis=0).astype(np.float64), correct
    sorted_probs = -np.sort(-told.T, axis=1)
    if function is not margin:  # which looks at two classes alone
        lumped = np.repeat(probs[rows.kept :].T / rows.groups, rows.groups, axis=1)
        sorted_probs = np.hstack([sorted_probs, lumped])
    return function(sorted_probs), correct


def folds_of_classes(targets: Ints, num_folds: int = NUM_FOLDS) -> Ints:
    """(N,) fold numbers, every class spread evenly, in the order of the images."""
    return spread_folds(np.argsort(targets, kind="stable"), num_folds)
