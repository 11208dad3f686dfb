"""How large a cascade area can a confidence of good AUROC have at all, on resnet20 -> resnet56?

    python -m benchmarks.area_bound           # about one minute on two idle cores

The cascade area is the mean top-1 over all deferral rates from 0 to 50%, with the surer answer kept. Scores of the form
`log-odds of P(right) + weights . simple scores` are drawn at random, and the best area is kept on the very images that
it is measured on: far more freedom than a network trained on other images has. Printed for several least AUROCs and
written to benchmarks/results/area-bound.md.
"""

import argparse
from typing import Any

import numpy as np
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.ablation import NAMES, RESULTS, load
from clcnet import cli, metrics
from clcnet.cascade.curve import area_under_deferral, surest_steps, sweep
from clcnet.confidence import margin, max_softmax, negative_entropy
from clcnet.report.tables import markdown

LEAST_AUROC = (0.8641, 0.8638, 0.8635, 0.8630, 0.8620, 0.8600)


def log_scores(probs: np.ndarray) -> np.ndarray:
    """Logarithms of the five largest probabilities, of the rest and of the entropy: (N, 7)."""
    parts = [probs[:, :5], probs[:, 1:].sum(1, keepdims=True), -negative_entropy(probs)[:, None]]
    return np.log(np.clip(np.hstack(parts), 1e-12, None))


def plain_scores(probs: np.ndarray) -> np.ndarray:
    """What is added with random weights: (N, 6)."""
    ratio = np.log(probs[:, 0] / np.maximum(probs[:, 1], 1e-12)).clip(0, 12) / 12
    return np.column_stack(
        [max_softmax(probs), margin(probs), negative_entropy(probs), ratio, probs[:, 1], probs[:, 2]]
    )


def log_odds_right(data: dict[str, Any]) -> list[np.ndarray]:
    """P(right) of both models' answers, each by a regression on the other folds of the first model: log-odds, (N,)."""
    first, correct, folds = data[NAMES[0]]
    found = [np.empty(len(folds)) for _ in NAMES]
    for fold in np.unique(folds):
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        regression.fit(log_scores(first[folds != fold]), correct[folds != fold])
        for scores, name in zip(found, NAMES, strict=True):
            probability = regression.predict_proba(log_scores(data[name][0][folds == fold]))[:, 1]
            scores[folds == fold] = logit(probability.clip(1e-9, 1 - 1e-9))
    return found


def main(args: argparse.Namespace) -> dict[str, Any]:
    data = load()
    (_, right, _), (_, right_deep, _) = (data[name] for name in NAMES)
    base, plain = log_odds_right(data), [plain_scores(data[name][0]) for name in NAMES]
    random = np.random.default_rng(args.seed)
    found = []
    for _ in range(args.draws):
        weights = random.normal(size=6) * random.choice([0, 1], 6) * random.choice([0.3, 1, 3, 6])
        shallow, deep = (odds + scores @ weights for odds, scores in zip(base, plain, strict=True))
        area = area_under_deferral(sweep(surest_steps([shallow, deep], [right, right_deep], [1, 3])), 0.5)
        found.append((metrics.auroc(shallow, right), area))
    auroc, area = np.array(found).T
    rows = [
        [f"{least:.4f}", f"{area[auroc >= least].max():.2f}", f"{(auroc >= least).sum():,}"]
        for least in LEAST_AUROC
        if (auroc >= least).any()
    ]
    text = markdown(["AUROC at least", "largest cascade area", f"of {args.draws:,} scores"], rows)
    (RESULTS / "area-bound.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nresults in {RESULTS / 'area-bound.md'}")
    return {"auroc": auroc, "area": area}


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=cli.positive_int, default=4000, metavar="N", help="scores to try")
    cli.add_seed_argument(parser)
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
