"""Whether the images that come are like those that a policy was measured on: shares that go on, and confidences.

A share is held against the one measured by Fisher's exact test: the binomial one, knowing that the share expected was
counted on finitely many images too. Confidences are held against their quantiles by the two-sample Kolmogorov-Smirnov
distance, its probability bounded by e * exp(-2 n d^2). The tests of a look share its level, and looks share the
watch's: all of them together raise a false alarm with probability `level` at most.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clcnet.intervals import Interval
from clcnet.strangers import is_number

Confidences = Sequence[NDArray[np.floating]]  # of each step, over the images that reached it

LEVEL = 0.01
MOST = 1e15  # of any number in a policy: sums of a dozen such stay finite in float32
NUM_QUANTILES = 100
OnDrift = Literal["warn", "stop"]


@dataclass(frozen=True)
class Expected:
    """What a policy was measured to do, on images that nothing in it was chosen on.

    Attributes:
        num_images: how many images that were.
        accuracy: percent, with its 95% interval.
        shares: (K,) fraction of the images that each model sees.
        flops: billions of multiply-adds an image.
        milliseconds: an image, where every model's time was measured.
        quantiles: of how sure each step is, over the images that reach it, as of `quantiles`.
    """

    num_images: int
    accuracy: float
    accuracy_interval: Interval
    shares: list[float]
    flops: float
    milliseconds: float | None = None
    quantiles: list[list[float]] | None = None

    def is_sound_for(self, num_models: int) -> bool:
        """Whether a run can be held against it: counts of images, and shares and rising quantiles of every model."""
        measured = [[0.0]] * num_models if self.quantiles is None else self.quantiles
        return (
            len(self.shares) == len(measured) == num_models
            and all(is_number(share, 0, 1) for share in self.shares)
            and all(is_number(number, -MOST, MOST) for each in measured for number in each)
            and all(each == sorted(each) for each in measured)
            and is_number(self.num_images, 0, MOST)
        )


class DriftError(ValueError):
    """The images are not like those that the policy was measured on."""


def quantiles(confidences: Confidences) -> list[list[float]]:
    """The 1st to 99th of every step's confidences; each is one of them, in float32. Empty where no image came."""
    shares = np.arange(1, NUM_QUANTILES) / NUM_QUANTILES
    return [
        np.quantile(np.asarray(each, dtype=np.float32), shares, method="inverted_cdf").tolist() if len(each) else []
        for each in confidences
    ]


def share_chance(count: int, total: int, expected_count: int, expected_total: int) -> float:
    """The probability of shares at least so different, were both of images drawn alike (Fisher's exact test)."""
    from scipy.stats import hypergeom

    drawn = hypergeom(total + expected_total, count + expected_count, total)
    return float(min(1.0, 2 * min(drawn.cdf(count), drawn.sf(count - 1))))


def confidence_chance(confidence: NDArray[np.floating], expected: Sequence[float], expected_total: int) -> float:
    """A bound of the probability of confidences so different from those with these quantiles."""
    limits, shares = np.array(expected, dtype=np.float32), np.arange(1, len(expected) + 1) / (len(expected) + 1)
    rising = np.sort(np.asarray(confidence, dtype=np.float32))
    below = np.searchsorted(rising, limits, side="left") / len(rising)
    up_to = np.searchsorted(rising, limits, side="right") / len(rising)
    distance = max((shares - up_to).max(), (below - shares).max(), 0.0)
    size = len(rising) * expected_total / (len(rising) + expected_total)
    return float(min(1.0, math.e * np.exp(-2 * size * distance**2)))


def find_drift(confidences: Confidences, expected: Expected, level: float = LEVEL) -> list[str]:
    """What differs from what a policy expects; nothing, with probability 1 - level, of images like its own.

    Args:
        confidences: of K steps, over the images that reached each; the first is all of them.
        expected: what the policy was measured to do.
        level: probability of a false alarm.
    """
    total = len(confidences[0])
    if not total:
        return []
    each, found = level / (2 * len(confidences) - 1), []
    measured = expected.quantiles or [[]] * len(expected.shares)
    for k, (sure, share, limits) in enumerate(zip(confidences, expected.shares, measured, strict=True)):
        reached = round(share * expected.num_images)
        if k and share_chance(len(sure), total, reached, expected.num_images) < each:
            found.append(f"{len(sure) / total:.1%} of {total:,} images go on past model {k}, {share:.1%} were expected")
        if len(sure) and limits and confidence_chance(sure, limits, reached) < each:
            found.append(
                f"model {k + 1}'s confidences differ: their median is {np.median(sure):.3f}, "
                f"{limits[len(limits) // 2]:.3f} was expected"
            )
    return found


class Watch:
    """Looks for drift in the newest images of a service, again whenever half a window of new ones has come.

    Look number j may raise a false alarm with probability level / (j (j + 1)), which sums to the level over all looks.
    Threads may share a watch.

    Attributes:
        found: what differed at the last look.
        num_looks: so far.
    """

    def __init__(
        self, expected: Expected, window: int = 1000, level: float = LEVEL, on_drift: OnDrift = "warn"
    ) -> None:
        """Watch with a window of so many images, 2 or more; an alarm is logged, or raised; see `find_drift`."""
        self._expected = expected
        self.window, self.level, self.on_drift = window, level, on_drift
        self.found: list[str] = []
        self.num_looks = 0
        self._new = np.empty((0, len(expected.shares)), np.float32)  # NaN where a step was not reached
        self._seen = 0
        self._lock = threading.Lock()

    def add(self, confidence: NDArray[np.floating]) -> None:
        """Take the confidences (N, K) of images, NaN where a model was not asked.

        Raises:
            DriftError: the last look was an alarm, where it is to stop.
        """
        with self._lock:
            self._new = np.concatenate([self._new, confidence.astype(np.float32)])[-self.window :]
            self._seen += len(confidence)
            if self._seen >= self.window // 2 and len(self._new) == self.window:
                self._seen = 0
                self.num_looks += 1
                level = self.level / (self.num_looks * (self.num_looks + 1))
                self.found = find_drift([column[~np.isnan(column)] for column in self._new.T], self._expected, level)
                for line in self.found:
                    logging.getLogger(__name__).warning("drift: %s", line)
            if self.found and self.on_drift == "stop":
                raise DriftError(f"the images are not like those of the policy: {'; '.join(self.found)}")
