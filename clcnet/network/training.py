"""Training: from a sorted-probability table to one CLCNet, or to five, one a fold, trained side by side.

Several networks are trained as one: their parameters lie in one (models, parameters) tensor, every layer works on a
leading dimension of models, and an optimiser step is one operation for all of them. The table stays in memory as one
array from which batches are drawn by index.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from clcnet import metrics
from clcnet.data.checks import check_answers, check_sorted_probs
from clcnet.data.images import NUM_FOLDS
from clcnet.network.calibration import Calibration, fit_calibration
from clcnet.network.model import CLCNet

VALIDATION_SHARE = TEST_SHARE = 0.1
STATISTICS_ROWS = 2048  # training rows that batch norm's statistics are estimated from
GRADIENT_NORM = 1.0

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How a CLCNet is trained.

    Attributes:
        learning_rate: of Adam; the highest one where it decays.
        decay: lower the learning rate to 0 over the epochs, along half a cosine.
        max_steps: bounds the epochs: no more than make this many optimiser steps, but at least 10. A table of 4,000
            rows gets 50 epochs of 12 batches, one of 40,000 rows ten of 125.
        wrong_weight: how much likelier a wrong answer is drawn than a right one. Above 1, scores are no probabilities.
        sparsity: weight of the masks' entropy in the loss. With masks as released it is all that the masks do; at
            0 they are not computed.
        averaging: decay, per step, of the running average of the weights that is evaluated and kept; 0 for none.
        fresh_statistics: re-estimate batch norm's statistics before each evaluation.
        calibrated: fit a calibration on the validation rows.
    """

    learning_rate: float = 0.02
    decay: bool = True
    max_steps: int = 600
    wrong_weight: float = 1.0
    sparsity: float = 0.0
    averaging: float = 0.99
    fresh_statistics: bool = True
    calibrated: bool = True


RECIPES = {
    "default": Recipe(),
    "released": Recipe(
        decay=False,
        max_steps=10**9,
        wrong_weight=2.0,
        sparsity=1e-3,
        averaging=0.0,
        fresh_statistics=False,
        calibrated=False,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What a user may set on the command line; the values are those of the released scripts."""

    max_epochs: int = 200
    batch_size: int = 256
    virtual_batch_size: int = 128
    patience: int = 50
    seed: int = 42
    recipe: str = "default"


@dataclass(frozen=True)
class Split:
    """Rows of one network's training: what it learns from, what stops and calibrates it, what it never sees."""

    train: Indices
    validation: Indices
    test: Indices


def split_rows(groups: NDArray[Any], seed: int, test_share: float = TEST_SHARE) -> Split:
    """Cut rows at random into 80/10/10 (or 90/10/0); rows of one group, such as one image in two tables, stay together.

    Args:
        groups: (N,) what each row belongs to.
        seed: of the draw.
        test_share: share of the groups to hold out altogether.

    Raises:
        ValueError: there are too few groups for three parts.
    """
    names, group_of_row = np.unique(groups, return_inverse=True)
    if len(names) < 4:
        raise ValueError(f"{len(names)} images cannot be cut into training, validation and test parts; give more")
    order = np.random.default_rng(seed).permutation(len(names))
    num_test = max(1, round(test_share * len(names))) if test_share else 0
    num_validation = max(1, round(VALIDATION_SHARE * len(names)))
    test, validation, train = np.split(order, [num_test, num_test + num_validation])
    return Split(*(np.flatnonzero(np.isin(group_of_row, part)) for part in (train, validation, test)))


def fold_splits(folds: Indices, groups: NDArray[Any], seed: int) -> list[Split]:
    """One split for each fold: the fold is the test part, the other folds are cut 90/10 into training and validation.

    Args:
        folds: (N,) fold of each row, from 0.
        groups: (N,) what each row belongs to.
        seed: of the draws.

    Raises:
        ValueError: a fold has no rows.
    """
    counts = np.bincount(folds, minlength=NUM_FOLDS)
    if len(folds) < NUM_FOLDS:
        raise ValueError(f"{len(folds)} rows cannot be cut into {NUM_FOLDS} folds; give a larger table")
    if (counts == 0).any():
        raise ValueError(f"fold {int(np.argmin(counts)) + 1} of {NUM_FOLDS} has no rows; each fold needs some")
    splits = []
    for fold in range(NUM_FOLDS):
        seen = np.flatnonzero(folds != fold)
        inner = split_rows(groups[seen], seed + fold, test_share=0.0)
        splits.append(Split(seen[inner.train], seen[inner.validation], np.flatnonzero(folds == fold)))
    return splits


def train_many(
    sorted_probs: NDArray[np.float32],
    correct: NDArray[np.bool_],
    splits: Sequence[Split],
    settings: Settings | None = None,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> list[CLCNet]:
    """Train one network a split, all at once.

    Args:
        sorted_probs: (N, n), each row in descending order.
        correct: (N,) whether the top-1 answer is right.
        splits: rows of each network. Test rows are not looked at.
        settings: see `Settings`.
        device: to train on.
        on_epoch: called after every epoch and network with a dict of its figures.
        progress: show a progress bar on stderr.

    Returns:
        The networks, in evaluation mode on the CPU, calibrated if the recipe says so, with the figures of the epoch
        kept in `metadata["validation"]` and the settings in `metadata["training_arguments"]`.

    Raises:
        ValueError: rows or labels that nothing can be learnt from.
    """
    settings = settings or Settings()
    _check_rows(sorted_probs, correct, splits)
    run = _Run(sorted_probs, correct, splits, settings, torch.device(device))
    with tqdm(total=run.num_epochs, unit="epoch", desc=f"training {len(splits)}", disable=not progress) as bar:
        for epoch in range(1, run.num_epochs + 1):
            loss = run.train_epoch()
            figures = run.evaluate(epoch, loss)
            for row in figures:
                if on_epoch:
                    on_epoch(row)
            mean = {key: float(np.mean([row[key] for row in figures])) for key in ("loss", "mse", "auroc")}
            bar.set_postfix_str(f"loss {mean['loss']:.4f}, validation MSE {mean['mse']:.4f}, AUROC {mean['auroc']:.4f}")
            bar.update()
            if not run.active.any():
                break
    return run.finish()


def _check_rows(sorted_probs: NDArray[np.float32], correct: NDArray[Any], splits: Sequence[Split]) -> None:
    check_sorted_probs(sorted_probs)
    check_answers(correct, None, None, sorted_probs.shape[1], "correct")
    for index, split in enumerate(splits):
        if len(split.train) < 2 or not len(split.validation):
            raise ValueError(
                f"network {index + 1} has {len(split.train)} training and {len(split.validation)} validation rows; "
                "at least 2 and 1 are needed"
            )
        right = int(correct[split.train].sum())
        if right in (0, len(split.train)):
            label = int(right > 0)
            raise ValueError(
                f"all {len(split.train)} training rows have label {label}; a confidence needs right and wrong answers"
            )


class _Ensemble:
    """Several CLCNets of one shape as one: parameters in a (models, parameters) leaf, statistics stacked."""

    def __init__(self, models: Sequence[CLCNet], device: torch.device) -> None:
        self.network = copy.deepcopy(models[0]).to(device)
        self.flat = torch.stack([nn.utils.parameters_to_vector(model.parameters()) for model in models])
        self.flat = self.flat.detach().to(device).requires_grad_()
        self.slots = [
            (module, name, parameter.shape)
            for module in self.network.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        for module, name, _ in self.slots:
            delattr(module, name)
        for norm in self.network.ghost_norms():
            norm.running_mean = norm.running_mean.repeat(len(models), 1, 1)
            norm.running_var = norm.running_var.repeat(len(models), 1, 1)

    def bind(self, flat: Tensor) -> CLCNet:
        """The network, computing with these parameters from now on."""
        parts = torch.split(flat, [math.prod(shape) for _, _, shape in self.slots], dim=1)
        for (module, name, shape), part in zip(self.slots, parts, strict=True):
            setattr(module, name, part.view(-1, *shape))
        return self.network

    def copy_to(self, model: CLCNet, index: int) -> None:
        """Copy the parameters that one of the networks is bound to, and its statistics, into a CLCNet."""
        parameters = [getattr(module, name) for module, name, _ in self.slots]
        places = [*model.parameters(), *model.buffers()]
        for place, stacked in zip(places, [*parameters, *self.network.buffers()], strict=True):
            place.copy_(stacked[index])


class _Run:
    """One training run of several networks: data, optimiser, and the best epoch of each."""

    def __init__(
        self,
        sorted_probs: NDArray[np.float32],
        correct: NDArray[np.bool_],
        splits: Sequence[Split],
        settings: Settings,
        device: torch.device,
    ) -> None:
        self.recipe, self.settings, self.splits, self.device = RECIPES[settings.recipe], settings, splits, device
        self.probs = torch.as_tensor(np.ascontiguousarray(sorted_probs, dtype=np.float32)).to(device)
        self.labels = torch.as_tensor(correct).to(device, torch.float32)
        self.generators = [torch.Generator().manual_seed(settings.seed + index) for index in range(len(splits))]
        self.models = [self._new_model(settings.seed + index) for index in range(len(splits))]
        self.ensemble = _Ensemble(self.models, device)
        self.average = self.ensemble.flat.detach().clone()
        self.optimizer = torch.optim.Adam([self.ensemble.flat], lr=self.recipe.learning_rate)

        self.rows = [torch.as_tensor(split.train) for split in splits]
        self.validation_rows = _stack([torch.as_tensor(split.validation) for split in splits]).to(device)
        self.statistics_rows = _stack([rows[:STATISTICS_ROWS] for rows in self._draw()]).to(device)
        self.steps_per_epoch = max(1, max(len(rows) for rows in self.rows) // settings.batch_size)
        self.num_epochs = min(settings.max_epochs, max(10, round(self.recipe.max_steps / self.steps_per_epoch)))
        self.step = 0

        self.active = np.ones(len(splits), dtype=bool)
        self.best_mse = np.full(len(splits), np.inf)
        self.best_epoch = np.zeros(len(splits), dtype=np.int64)
        if self.recipe.fresh_statistics:
            for norm in self.ensemble.network.ghost_norms():
                norm.momentum = 0.0  # nothing reads what a step would leave there

    def _new_model(self, seed: int) -> CLCNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = CLCNet(self.probs.shape[1], virtual_batch_size=self.settings.virtual_batch_size)
        model.metadata = {"training_arguments": dataclasses.asdict(self.settings), "validation": {}}
        return model

    def _draw(self) -> list[Tensor]:
        """Each network's training rows in random order, or drawn with replacement where wrong answers weigh more."""
        drawn = []
        for rows, generator in zip(self.rows, self.generators, strict=True):
            if self.recipe.wrong_weight == 1:
                order = torch.randperm(len(rows), generator=generator)
            else:
                wrong = self.labels[rows.to(self.device)].cpu() == 0
                weights = torch.where(wrong, self.recipe.wrong_weight, 1.0)
                order = torch.multinomial(weights, len(rows), replacement=True, generator=generator)
            drawn.append(rows[order])
        return drawn

    def train_epoch(self) -> NDArray[np.float64]:
        """One pass over the training rows; returns the mean loss of each network."""
        self.ensemble.network.train()
        num_rows = self.steps_per_epoch * self.settings.batch_size
        drawn = _stack(self._draw(), num_rows).to(self.device)
        losses = torch.zeros(len(self.splits), device=self.device)
        for batch in torch.split(drawn, self.settings.batch_size, dim=1):
            losses += self._train_step(batch)
        return (losses / self.steps_per_epoch).double().cpu().numpy()

    def _train_step(self, batch: Tensor) -> Tensor:
        recipe, flat = self.recipe, self.ensemble.flat
        if recipe.decay:
            progress = self.step / (self.num_epochs * self.steps_per_epoch)
            self.optimizer.param_groups[0]["lr"] = recipe.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        network, probs = self.ensemble.bind(flat), self.probs[batch]
        score, sparsity = network.score_and_sparsity(probs) if recipe.sparsity else (network(probs), 0.0)
        loss = (score - self.labels[batch]).square().mean(dim=-1) - recipe.sparsity * sparsity
        (flat.grad,) = torch.autograd.grad(loss.sum(), flat)
        norm = flat.grad.norm(dim=1, keepdim=True)
        flat.grad *= (GRADIENT_NORM / (norm + 1e-6)).clamp(max=1)
        self.optimizer.step()
        self.step += 1
        # A young average forgets faster, or it would keep the first random weights for long.
        keep = min(recipe.averaging, self.step / (self.step + 10)) if recipe.averaging else 0.0
        self.average.lerp_(flat.detach(), 1 - keep)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, epoch: int, loss: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Score the validation rows, keep each network's best epoch, or its last one, and stop those out of patience.

        Where the learning rate has decayed to 0, the last epoch is the best but for chance.
        """
        network = self.ensemble.bind(self.average)
        if self.recipe.fresh_statistics:
            self._estimate_statistics(network)
        network.eval()
        scores = network(self.probs[self.validation_rows]).cpu().numpy()
        figures = []
        is_last = self.recipe.decay and epoch == self.num_epochs
        for index in np.flatnonzero(self.active).tolist():
            rows = self.splits[index].validation
            right = self.labels[torch.as_tensor(rows).to(self.device)].cpu().numpy()
            raw = scores[index, : len(rows)]
            mse = metrics.brier(raw, right)
            auroc = metrics.auroc(raw, right)
            figures.append(
                {"network": index + 1, "epoch": epoch, "loss": float(loss[index]), "mse": mse, "auroc": auroc}
            )
            is_best = mse < self.best_mse[index]
            if is_best or is_last:
                self.ensemble.copy_to(self.models[index], index)
                self.models[index].metadata["validation"] = {"mse": mse, "epoch": epoch}
            if is_best:
                self.best_mse[index], self.best_epoch[index] = mse, epoch
            elif epoch - self.best_epoch[index] >= self.settings.patience:
                self.active[index] = False
        return figures

    def _estimate_statistics(self, network: CLCNet) -> None:
        """Set batch norm's statistics to those of many training rows, as one batch."""
        probs = self.probs[self.statistics_rows]
        norms = list(network.ghost_norms())
        for norm in norms:
            norm.momentum, norm.virtual_batch_size = 1.0, probs.shape[-2]
        network.train()
        network.score_and_sparsity(probs)
        for norm in norms:
            norm.momentum, norm.virtual_batch_size = 0.0, self.settings.virtual_batch_size

    @torch.no_grad()
    def finish(self) -> list[CLCNet]:
        """The networks of the epochs kept, calibrated."""
        for model, split in zip(self.models, self.splits, strict=True):
            model.eval()
            if self.recipe.calibrated:
                model.calibration = self._calibration(model, split)
        return self.models

    def _calibration(self, model: CLCNet, split: Split) -> Calibration:
        """Fitted on what the network has seen; its own weight on the validation rows alone."""
        rows = torch.as_tensor(np.concatenate([split.train, split.validation])).to(self.device)
        probs, correct = self.probs[rows].cpu(), self.labels[rows].cpu() > 0
        held_back = torch.arange(len(rows)) >= len(split.train)
        return fit_calibration(model.predict(probs, calibrated=False), probs, correct, held_back)


def _stack(rows: Sequence[Tensor], length: int | None = None) -> Tensor:
    """Row numbers of every network as (models, length): repeated as need be, by default to as many as the longest."""
    length = length or max(len(part) for part in rows)
    return torch.stack([part.repeat(math.ceil(length / len(part)))[:length] for part in rows])
