"""Training: what it may look at, what it promises, and that many networks at once are the same as one at a time."""

import numpy as np
import pytest
import torch

from clcnet import metrics
from clcnet.confidence import negative_entropy
from clcnet.network import layers, training
from clcnet.network.model import CLCNet
from clcnet.network.training import RECIPES, Settings, Split, fold_splits, split_rows, train_many

HALVES = Split(np.arange(64), np.arange(64, 128), np.arange(0))


def made_table(num_rows: int = 600, num_classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sorted probabilities of an overconfident classifier, and whether its answers are right."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1, (num_rows, num_classes))
    logits[:, 0] += generator.exponential(2.5, num_rows)
    true_probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true_probs.cumsum(axis=1) > generator.random((num_rows, 1))).argmax(axis=1)
    correct = logits.argmax(axis=1) == labels
    probs = np.exp(1.7 * logits) / np.exp(1.7 * logits).sum(axis=1, keepdims=True)
    return -np.sort(-probs, axis=1).astype(np.float32), correct


def quick(probs, correct, splits=None, on_epoch=None, **settings) -> list[CLCNet]:
    """Networks trained in a moment, by default one on a split of all rows."""
    splits = splits or [split_rows(np.arange(len(probs)), seed=0)]
    chosen = Settings(**{"max_epochs": 3, "batch_size": 64, "virtual_batch_size": 32} | settings)
    return train_many(probs, correct, splits, chosen, on_epoch=on_epoch, progress=False)


def started(probs: np.ndarray, correct: np.ndarray, splits: list[Split], **settings) -> training._Run:
    return training._Run(probs, correct, splits, Settings(batch_size=64, **settings), torch.device("cpu"))


def parameters(model: CLCNet) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


# ------------------------------------------------------------------------------------------------------------ splits


def test_custom_split_is_80_10_10_without_overlap():
    split = split_rows(np.arange(1000), seed=1)
    assert [len(split.train), len(split.validation), len(split.test)] == [800, 100, 100]
    assert sorted(np.concatenate([split.train, split.validation, split.test])) == list(range(1000))
    assert not np.array_equal(split.test, split_rows(np.arange(1000), seed=2).test)
    np.testing.assert_array_equal(split.test, split_rows(np.arange(1000), seed=1).test)


def test_fewer_rows_than_folds_and_an_empty_fold_are_refused():
    with pytest.raises(ValueError, match="3 rows cannot be cut into 5 folds"):
        fold_splits(np.arange(3), np.arange(3), seed=0)
    with pytest.raises(ValueError, match="fold 4 of 5 has no rows"):
        fold_splits(np.array([0, 1, 2, 4] * 5), np.arange(20), seed=0)
    with pytest.raises(ValueError, match="3 images cannot be cut"):
        split_rows(np.arange(3), seed=0)


# --------------------------------------------------------------------------------------------------- what it looks at


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_networks_test_rows_change_nothing_in_it(recipe):
    probs, correct = made_table()
    folds = np.arange(len(probs)) % 5
    splits = fold_splits(folds, np.arange(len(probs)), seed=0)
    before = quick(probs, correct, splits[:1], recipe=recipe)[0]
    other_probs, other_correct = made_table(seed=9)
    held_out = splits[0].test
    probs[held_out], correct[held_out] = other_probs[held_out], ~other_correct[held_out]
    after = quick(probs, correct, splits[:1], recipe=recipe)[0]
    assert torch.equal(parameters(before), parameters(after))
    assert before.calibration == after.calibration and before.metadata == after.metadata


def test_the_same_seed_gives_the_same_network_and_another_one_another():
    first, second, third = (quick(*made_table(), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(parameters(first), parameters(second)) and first.calibration == second.calibration
    assert not torch.equal(parameters(first), parameters(third))


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    quick(*made_table(200))
    assert torch.equal(torch.rand(1), expected)


# ------------------------------------------------------------------------------------------- several networks as one


def test_stacked_networks_score_as_each_one_alone():
    torch.manual_seed(0)
    models = [CLCNet(6).double() for _ in range(3)]
    rows = torch.from_numpy(made_table(130)[0]).double()
    ensemble = training._Ensemble(models, torch.device("cpu"))
    scores, sparsity = ensemble.bind(ensemble.flat).train().score_and_sparsity(rows.expand(3, -1, -1))
    for index, model in enumerate(models):
        score, single_sparsity = model.train().score_and_sparsity(rows)
        torch.testing.assert_close(scores[index], score, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sparsity[index], single_sparsity, rtol=1e-9, atol=1e-9)


def test_a_step_of_the_released_recipe_is_adam_with_clipped_gradients():
    """One step of the stacked networks against PyTorch's own tools on a single one."""
    probs, correct = made_table(128)
    run = started(probs, correct, [HALVES, HALVES], virtual_batch_size=32, recipe="released")
    model = run._new_model(run.settings.seed + 1)  # the second network's start
    batch = torch.arange(64)
    run.ensemble.network.train()
    run._train_step(batch.expand(2, -1))

    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    score, sparsity = model.train().score_and_sparsity(torch.from_numpy(probs[:64]))
    loss = (score - torch.from_numpy(correct[:64]).float()).square().mean() - 1e-3 * sparsity
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    expected = torch.nn.utils.parameters_to_vector(model.parameters())
    moved = (run.ensemble.flat[1] - expected).abs()
    # Adam's first step is lr times the sign of the gradient, so a gradient of rounding error may go either way
    assert (moved > 1e-4).float().mean() < 0.01
    for ours, theirs in zip(run.ensemble.network.ghost_norms(), model.ghost_norms(), strict=True):
        torch.testing.assert_close(ours.running_mean[1], theirs.running_mean, rtol=1e-4, atol=1e-5)


def test_the_default_recipe_learns_from_the_score_alone_and_computes_no_masks(monkeypatch):
    run = started(*made_table(128), [HALVES])
    start = run._new_model(run.settings.seed)
    monkeypatch.setattr(layers, "sparsemax", lambda *_: pytest.fail("masks were computed"))
    run.train_epoch()
    network = run.ensemble.bind(run.ensemble.flat.detach())
    assert torch.equal(network.attentive_transformers.weight[0], start.attentive_transformers.weight)
    assert not torch.equal(network.attention.query_weight[0], start.attention.query_weight)


def test_the_released_recipe_draws_wrong_answers_twice_as_often():
    probs, correct = made_table(100)
    correct[:] = np.arange(100) < 50
    split = Split(np.arange(100), np.arange(100), np.arange(0))
    run = started(probs, correct, [split], recipe="released")
    drawn = torch.cat([run._draw()[0] for _ in range(400)])
    assert float((drawn < 50).float().mean()) == pytest.approx(1 / 3, abs=0.01)
    assert len(drawn.unique()) == 100
    (once,) = started(probs, correct, [split])._draw()
    assert sorted(once.tolist()) == list(range(100))


def test_every_training_row_is_drawn_in_an_epoch_when_batches_divide_them():
    assert training._stack([torch.arange(4)], 10).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    padded = training._stack([torch.arange(3), torch.arange(5)])
    assert padded.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]


# ----------------------------------------------------------------------------------------------------------- promises


@pytest.fixture(scope="module")
def trained() -> tuple[list[CLCNet], list[Split], np.ndarray, np.ndarray, list[dict[str, float]]]:
    probs, correct = made_table(3000)
    splits = fold_splits(np.arange(3000) % 5, np.arange(3000), seed=0)
    history: list[dict[str, float]] = []
    models = train_many(probs, correct, splits, Settings(max_epochs=25), on_epoch=history.append, progress=False)
    return models, splits, probs, correct, history


def test_confidences_are_probabilities_as_good_as_the_simple_ones(trained):
    models, splits, probs, correct, _ = trained
    confidence = np.empty(len(probs))
    for model, split in zip(models, splits, strict=True):
        confidence[split.test] = model.predict(probs[split.test])
    assert confidence.min() >= 0 and confidence.max() <= 1
    simple = max(metrics.auroc(probs[:, 0], correct), metrics.auroc(negative_entropy(probs), correct))
    assert metrics.auroc(confidence, correct) > simple - 0.003
    assert metrics.brier(confidence, correct) < metrics.brier(probs[:, 0], correct)  # those are overconfident
    assert metrics.calibration_error(confidence, correct) < 0.03


def test_validation_mse_stays_near_its_best_from_the_fifth_epoch_on(trained):
    history = trained[-1]
    assert len({row["network"] for row in history}) == 5
    for network in range(1, 6):
        mse = [row["mse"] for row in history if row["network"] == network]
        assert len(mse) > 10
        assert max(mse[4:]) <= 1.3 * min(mse)


def test_recorded_validation_mse_is_that_of_the_network_handed_back(trained):
    models, splits, probs, correct, history = trained
    for model, split in zip(models, splits, strict=True):
        raw = model.predict(probs[split.validation], calibrated=False)
        recorded = model.metadata["validation"]["mse"]
        assert metrics.brier(raw, correct[split.validation]) == pytest.approx(recorded, abs=1e-5)


def test_the_released_recipe_keeps_the_best_epoch_and_has_no_calibration():
    probs, correct = made_table(1000)
    split = split_rows(np.arange(1000), seed=0)
    history: list[dict[str, float]] = []
    (model,) = quick(probs, correct, [split], history.append, max_epochs=6, recipe="released")
    best = min(history, key=lambda row: row["mse"])
    assert model.metadata["validation"]["epoch"] == best["epoch"]
    raw = model.predict(probs[split.validation], calibrated=False)
    assert metrics.brier(raw, correct[split.validation]) == pytest.approx(best["mse"], abs=1e-5)
    assert model.calibration is None
    np.testing.assert_array_equal(model.predict(probs), model.predict(probs, calibrated=False))


def test_patience_ends_training():
    history: list[dict[str, float]] = []
    (model,) = quick(*made_table(400), on_epoch=history.append, max_epochs=200, patience=2, recipe="released")
    assert history[-1]["epoch"] == model.metadata["validation"]["epoch"] + 2 < 200


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_rows_and_labels_are_refused_with_row_and_value():
    probs, correct = made_table(100)
    labels = correct.astype(np.int64)
    labels[4] = 2
    with pytest.raises(ValueError, match="row 5 has label 2"):
        quick(probs, labels)
    probs[7] = [0.9, 0.05, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="row 8.*0.95"):
        quick(probs, correct)


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_class_only_are_refused(label):
    probs, _ = made_table(100)
    with pytest.raises(ValueError, match=f"all 80 training rows have label {label}"):
        quick(probs, np.full(100, bool(label)))


def test_one_probability_a_row_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        quick(np.ones((100, 1), dtype=np.float32), made_table(100)[1])


@pytest.mark.parametrize("num_classes", [2, 6])
def test_ties_one_hot_and_uniform_rows_are_trained_on(num_classes):
    probs, correct = made_table(200, num_classes)
    probs[:20] = 1 / num_classes
    probs[20:60] = 0
    probs[20:40, 0] = 1
    probs[40:60, :2] = 0.5
    (model,) = quick(probs, correct)
    assert np.isfinite(model.predict(probs)).all()


# ------------------------------------------------------------------------------------------------------ the real data


def test_quality_on_cifar10_reaches_the_simple_scores(shared):
    """One seed and ten epochs of what benchmarks/ablation.py measures in full."""
    from clcnet.data.images import list_images
    from clcnet.data.outputs import Outputs, match_rows

    images = list_images(shared / "cifar10" / "imagenet_splits_5")
    tables = {name: Outputs.load(shared / "cifar10" / f"{name}.csv") for name in ("resnet20", "resnet56")}
    folds = {name: images.folds[match_rows(table, images)] for name, table in tables.items()}
    table = tables["resnet20"]
    splits = fold_splits(folds["resnet20"], np.arange(len(table)), seed=42)
    models = train_many(table.sorted_probs, table.correct, splits, Settings(max_epochs=10), progress=False)
    scores = {name: np.empty(len(table)) for name in tables}
    for fold, model in enumerate(models):
        for name, other in tables.items():
            rows = folds[name] == fold
            scores[name][rows] = model.predict(other.sorted_probs[rows])
    right = table.correct
    assert metrics.auroc(scores["resnet20"], right) >= 0.8638
    assert metrics.aurc(scores["resnet20"], right) <= 0.0489
    assert metrics.brier(scores["resnet20"], right) <= 0.1103
    assert metrics.calibration_error(scores["resnet20"], right) <= 0.015
    right = tables["resnet56"].correct
    assert metrics.auroc(scores["resnet56"], right) >= 0.8585
    assert metrics.aurc(scores["resnet56"], right) <= 0.0439
