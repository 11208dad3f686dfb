"""examples/ray_batch.py on a local Ray of two workers: the answers of step 5, from a folder and from Parquet."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scripts import EVALUATE_CUSTOM, run

from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Surest
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.outputs import Record

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs ray[data]")
    pytest.importorskip("ray.data", reason="needs ray[data]")
    examples = str(ROOT / "examples")
    sys.path.insert(0, examples)
    module = importlib.import_module("ray_batch")
    # the workers import it and the package
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{examples}", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield module
    ray.shutdown()
    sys.path.remove(examples)


def test_two_workers_answer_as_step_5_does(
    example: Any, image_folder: Callable[..., Path], classifier_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = image_folder(images_per_class=10)
    (folder / "ant" / "bad.png").write_bytes(b"no image")
    models = [load_classifier(f"local-dir:{classifier_dir(seed=seed)}", device="cpu") for seed in (1, 2)]
    records = [Record(each.name, each.key, flops=each.flops, loaded_from=each.loaded_from) for each in models]
    Policy(records, Surest("max softmax"), [0.9]).save(tmp_path / "cascade.json")
    words = ["--custom-data", folder, "--policy", tmp_path / "cascade.json", "--store", tmp_path / "store"]
    run(EVALUATE_CUSTOM, *words, "--result", tmp_path / "step5.csv", "--device", "cpu", "-j", "0")
    expected = pd.read_csv(tmp_path / "step5.csv").set_index("file")

    files = [path for path in folder.rglob("*") if path.is_file()]
    lake = pd.DataFrame({"path": [str(path) for path in files], "bytes": [path.read_bytes() for path in files]})
    lake.to_parquet(tmp_path / "lake.parquet")
    for images in (folder, tmp_path / "lake.parquet"):
        output = tmp_path / f"answers_of_{images.name}"
        fixed = {"policy": str(tmp_path / "cascade.json"), "workers": 2, "gpus": 0, "device": "cpu", "batch_size": 4}
        example.main(argparse.Namespace(images=str(images), output=str(output), **fixed))
        found = pd.concat(map(pd.read_parquet, output.glob("*.parquet")))
        found.index = [os.path.relpath(path, folder) for path in found.path]
        (broken,) = found[found.error != ""].index
        assert broken == "ant/bad.png" and "cannot be read" in found.error[broken] and found["class"][broken] == ""
        found = found.drop(broken).loc[expected.index]
        assert len(found) == 30 and found["label"].tolist() == expected.predict.tolist()
        assert found["class"].tolist() == expected.class_name.tolist()
        np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-6)
        assert set(found.answered_by) == {0, 1}
