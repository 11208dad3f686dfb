"""What tells right from wrong among 1,000 classes: one-line scores, the calibration's parts, the network's recipe.

    python -m benchmarks.ablation_1000                 # about fifteen minutes on one idle core
    python -m benchmarks.ablation_1000 --parts scores  # one part, seconds; the others stay as they were measured last

Seven networks' outputs on 2,300 photographs (imagenet1k/ of that folder), five folds by image: everything is fitted on
the other four. "own" is trained on the judged network's outputs, "all" on all seven's, "others" on the six others'.
AUROC and calibration error are means over the seven; in brackets the 95% interval, over images drawn again, of the
distance from the rival, the better of max softmax and margin, paired. "By chance" is the
calibration error that as many images would show of a confidence that is always right about itself.

Results: benchmarks/results/ablation_1000.json and .md.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.fused import imagenet_outputs
from benchmarks.measured import SHARED, keep, kept
from clcnet import cli, metrics
from clcnet.confidence import SIMPLE_CONFIDENCES, tempered_top
from clcnet.data.images import NUM_FOLDS
from clcnet.data.outputs import Outputs
from clcnet.network import training
from clcnet.network.calibration import LOWEST_PROBABILITY, Calibration, simple_scores, tempered_scores
from clcnet.network.model import CLCNet
from clcnet.network.training import RECIPES, Settings, fold_splits, train_many

SCOPES = ("own", "all", "others")
PARTS = ("scores", *SCOPES, "recipes")
HEAD = "| confidence | AUROC | over the rival | calibration error | by chance | of all together |"
TEMPERATURES = (0.4, 0.5, 0.6, 0.7, 0.8)
POWERS = (0.15, 0.25, 0.35, 0.5)  # of the spread of a row's log-probabilities, in its temperature
NUM_DRAWS = 1000
Place = tuple[int, int]  # of a network's outputs, fold
Judges, Networks = dict[Place, Callable[[np.ndarray], np.ndarray]], dict[Place, CLCNet]


class Photographs:
    """The outputs of K networks on N photographs, as one table of K * N rows."""

    def __init__(self, outputs: dict[str, Outputs], folds: np.ndarray) -> None:
        self.names, self.folds, self.count = list(outputs), folds, len(folds)
        self.probs = np.concatenate([each.sorted_probs for each in outputs.values()])
        self.correct = np.concatenate([each.correct for each in outputs.values()])
        drawn = np.random.default_rng(0).integers(self.count, size=(NUM_DRAWS, self.count))
        self.weights = np.stack([np.bincount(draw, minlength=self.count) for draw in drawn])
        simple = np.stack([self.by_image(SIMPLE_CONFIDENCES[name](self.probs)) for name in ("max softmax", "margin")])
        better = np.argmax([self.aurocs(scores) for scores in simple], axis=0)
        self.rival = simple[better, np.arange(len(self.names))]

    def by_image(self, rows: np.ndarray) -> np.ndarray:
        """(K * N,) to (K, N)."""
        return rows.reshape(len(self.names), self.count)

    def rows(self, scope: str, judged: int) -> np.ndarray:
        """The rows that are trained on, held-out fold included, to judge a network's outputs."""
        network = np.arange(len(self.probs)) // self.count
        return np.flatnonzero({"own": network == judged, "all": network >= 0, "others": network != judged}[scope])

    def aurocs(self, scores: np.ndarray) -> np.ndarray:
        """Of each network, (K,)."""
        return np.array([metrics.auroc(*pair) for pair in zip(scores, self.by_image(self.correct), strict=True)])

    def gain(self, scores: np.ndarray, networks: Sequence[int] | None = None) -> str:
        """The mean AUROC's distance from the rival's, with its interval: both on the same draws of images."""
        networks, right = networks or range(len(self.names)), self.by_image(self.correct)
        gain = np.mean((self.aurocs(scores) - self.aurocs(self.rival))[list(networks)])
        drawn = [
            drawn_aurocs(scores[k], right[k], self.weights) - drawn_aurocs(self.rival[k], right[k], self.weights)
            for k in networks
        ]
        low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
        return f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]"

    def judged(self, judges: Judges) -> np.ndarray:
        """Scores (K, N), each by the judge that never saw its fold."""
        scores = np.empty((len(self.names), self.count))
        probs = self.probs.reshape(len(self.names), self.count, -1)
        for (network, fold), judge in judges.items():
            scores[network, self.folds == fold] = judge(probs[network, self.folds == fold])
        return scores

    def line(self, name: str, scores: np.ndarray) -> str:
        """A row of the table."""
        right = self.by_image(self.correct)
        errors = float(np.mean([metrics.calibration_error(*each) for each in zip(scores, right, strict=True)]))
        chance = float(np.mean([error_by_chance(each) for each in scores]))
        figures = (errors, chance, metrics.calibration_error(scores.ravel(), self.correct))
        cells = " | ".join("-" if np.isnan(one) else f"{one:.4f}" for one in figures)
        return f"| {name} | {self.aurocs(scores).mean():.4f} | {self.gain(scores)} | {cells} |"


def drawn_aurocs(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC, equal scores counting half, where image i is there `weights[d, i]` times: (D,)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    rights, wrongs = (np.add.reduceat((weights * part)[:, order], starts, axis=1) for part in (right, ~right))
    below = np.cumsum(wrongs, axis=1) - wrongs / 2
    return (rights * below).sum(axis=1) / (rights.sum(axis=1) * wrongs.sum(axis=1))


def error_by_chance(confidence: np.ndarray, num_draws: int = 20) -> float:
    """The mean calibration error where answers are right with just the probability that the confidence says."""
    uniform = np.random.default_rng(0).random((num_draws, len(confidence)))
    return float(np.mean([metrics.calibration_error(confidence, draw < confidence) for draw in uniform]))


def trained(data: Photographs, scope: str, **recipe: object) -> Networks:
    """Networks of all folds; of one training where the judged network makes no difference."""
    RECIPES["ablation"] = dataclasses.replace(RECIPES["default"], **recipe)
    models = {}
    for judged in range(len(data.names)):
        if scope == "all" and judged:
            models |= {(judged, fold): models[0, fold] for fold in range(NUM_FOLDS)}
            continue
        rows = data.rows(scope, judged)
        splits = fold_splits(data.folds[rows % data.count], rows % data.count, 42)
        found = train_many(data.probs[rows], data.correct[rows], splits, Settings(recipe="ablation"), progress=False)
        models |= {(judged, fold): model for fold, model in enumerate(found)}
    return models


def regressions(data: Photographs, scope: str, scores: Callable[[torch.Tensor], torch.Tensor]) -> Judges:
    """What the probabilities say without any network: logistic regressions on these scores of a row."""
    inputs = scores(torch.from_numpy(data.probs)).numpy()
    judges: Judges = {}
    for judged in range(len(data.names)):
        rows = data.rows(scope, judged)
        for fold in range(NUM_FOLDS):
            if scope == "all" and judged:
                judges[judged, fold] = judges[0, fold]
                continue
            seen = rows[data.folds[rows % data.count] != fold]
            fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            fitted.fit(inputs[seen], data.correct[seen])
            judges[judged, fold] = lambda probs, fitted=fitted: fitted.predict_proba(
                scores(torch.from_numpy(probs)).numpy()
            )[:, 1]
    return judges


def log_probabilities(probs: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probs, LOWEST_PROBABILITY))


def top_at(probs: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """The top probability where each row has a temperature of its own: (N,)."""
    logs = log_probabilities(probs)
    return 1 / np.exp((logs - logs[:, :1]) / temperatures[:, None]).sum(axis=1)


def shape_scores(probs: torch.Tensor) -> torch.Tensor:
    """Log-odds of the top probability at temperature 0.6, and mean and spread of all log-probabilities."""
    logs = torch.from_numpy(log_probabilities(probs.numpy()))
    rivals = ((logs[:, 1:] - logs[:, :1]) / 0.6).exp().sum(dim=1)
    return torch.stack([-rivals.log(), logs.mean(dim=1), logs.std(dim=1)], dim=1)


def products(probs: torch.Tensor) -> torch.Tensor:
    """The same, and their six products."""
    scores = shape_scores(probs)
    first, second = torch.triu_indices(3, 3)
    return torch.cat([scores, scores[:, first] * scores[:, second]], dim=1)


def raw(models: Networks) -> Judges:
    return {key: lambda probs, model=model: model.predict(probs, calibrated=False) for key, model in models.items()}


def calibrated(models: Networks) -> Judges:
    return {key: model.predict for key, model in models.items()}


def without_network(models: Networks) -> Judges:
    """The same calibration, the network's weight set to 0."""

    def judge(calibration: Calibration) -> Callable[[np.ndarray], np.ndarray]:
        alone = dataclasses.replace(calibration, network=0.0)
        return lambda probs: alone.apply(torch.zeros(len(probs)), torch.from_numpy(probs)).numpy()

    return {key: judge(model.calibration) for key, model in models.items() if model.calibration}


def scores(data: Photographs) -> Iterator[str]:
    """One-line scores, and what logistic regressions make of a row without any network."""
    for name, score in SIMPLE_CONFIDENCES.items():
        yield data.line(name, data.by_image(score(data.probs)))
    tempered = tempered_top(data.probs, np.array(TEMPERATURES))
    for temperature, column in zip(TEMPERATURES, tempered.T, strict=True):
        yield data.line(f"max softmax at temperature {temperature}", data.by_image(column))
    spread = log_probabilities(data.probs).std(axis=1)
    for power in POWERS:
        for temperature in TEMPERATURES[1:-1]:
            name = f"max softmax at temperature {temperature} x spread^{power}"
            yield data.line(name, data.by_image(top_at(data.probs, temperature * spread**power)))
    kinds = {"four scores, as in 1.0": simple_scores, "odds, mean and spread": shape_scores}
    kinds |= {"odds, mean, spread and their products": products, "the calibration's three scores": tempered_scores}
    for scope in SCOPES:
        for name, kind in kinds.items():
            yield data.line(f"{name}, {scope}", data.judged(regressions(data, scope, kind)))


def network(data: Photographs, scope: str) -> Iterator[str]:
    """The default recipe: its score alone, calibrated, and what the network adds to the calibration."""
    models = trained(data, scope)
    yield data.line(f"CLCNet's score alone, {scope}", data.judged(raw(models)))
    yield data.line(f"CLCNet calibrated, {scope}", data.judged(calibrated(models)))
    yield data.line(f"calibration without the network, {scope}", data.judged(without_network(models)))


def recipes(data: Photographs, start: Path | None) -> Iterator[str]:
    """Other recipes, trained on all networks' outputs."""
    variants: dict[str, dict[str, object]] = {"150 steps": {"max_steps": 150}, "1,200 steps": {"max_steps": 1200}}
    variants["masks trained, as released"] = {"sparsity": 1e-3}
    for name, recipe in variants.items():
        models = trained(data, "all", **recipe)
        yield data.line(f"CLCNet's score alone, {name}, all", data.judged(raw(models)))
        yield data.line(f"CLCNet calibrated, {name}, all", data.judged(calibrated(models)))
    if start:
        training.CLCNet = lambda *_, **__: CLCNet.load(start).train()  # type: ignore[misc,assignment]
        models = trained(data, "all")
        yield data.line("CLCNet's score alone, from the released weights, all", data.judged(raw(models)))
        yield data.line("CLCNet calibrated, from the released weights, all", data.judged(calibrated(models)))


def main(args: argparse.Namespace) -> dict[str, list[str]]:
    torch.set_num_threads(1)
    data = Photographs(*imagenet_outputs(args.shared / "imagenet1k"))
    start = next(iter((args.shared / "reference").glob("CLCNet_imagenet_split_1*.zip")), None)
    parts = {"scores": lambda: scores(data)} | {scope: partial(network, data, scope) for scope in SCOPES}
    parts["recipes"] = lambda: recipes(data, start)
    table: dict[str, list[str]] = kept("ablation_1000")
    for part in args.parts:
        table[part] = list(parts[part]())
        rows = [line for name in PARTS for line in table.get(name, [])]
        keep("ablation_1000", table, "\n".join([HEAD, "|---" * 6 + "|", *rows]) + "\n")
    return table


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=SHARED, metavar="FOLDER", help="the data")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=f"of {PARTS}")
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
