"""examples/service.py through FastAPI's own test client: batches from several threads, a broken image among others."""

import importlib
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clcnet import Cascade
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Surest
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.outputs import Record

CLASSES = ["ant", "bee", "cat"]


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def policy(tmp_path: Path, classifier_dir: Callable[..., Path]) -> Path:
    """Two models of which the second sees everything that the first one is not entirely sure of."""
    models = [load_classifier(f"local-dir:{classifier_dir(seed=seed)}", device="cpu") for seed in (1, 2)]
    records = [Record(each.name, each.key, loaded_from=each.loaded_from) for each in models]
    Policy(records, Surest("max softmax"), [0.9]).save(tmp_path / "cascade.json")
    return tmp_path / "cascade.json"


@pytest.fixture
def client(policy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    testing = pytest.importorskip("fastapi.testclient", reason="needs fastapi, httpx and python-multipart")
    pytest.importorskip("python_multipart", reason="needs python-multipart")
    monkeypatch.setenv("CLCNET_POLICY", str(policy))
    sys.modules.pop("examples.service", None)
    return testing.TestClient(importlib.import_module("examples.service").app)


def post(client: Any, images: list[bytes]) -> list[dict[str, Any]]:
    sent = [("files", (f"{place}.png", image, "image/png")) for place, image in enumerate(images)]
    answer = client.post("/classify", files=sent)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()
    return found


def test_every_image_of_a_batch_is_answered_and_a_broken_one_says_what_is_wrong(client: Any, policy: Path) -> None:
    found = post(client, [picture(0), b"no image", picture(1)])
    expected = Cascade.from_policy(policy, device="cpu")([picture(0), picture(1)])
    assert "cannot be read" in found[1]["error"] and list(found[1]) == ["error"]
    assert [found[0]["class"], found[2]["class"]] == expected.names and set(expected.names) <= set(CLASSES)
    assert [found[0]["confidence"], found[2]["confidence"]] == pytest.approx(expected.confidences.tolist(), abs=1e-6)
    assert [found[0]["model"], found[2]["model"]] == expected.answered_by.tolist()


def test_batches_from_several_threads_get_their_own_answers(client: Any) -> None:
    batches = [[picture(10 * batch + place) for place in range(1 + batch % 3)] + [b"x"] for batch in range(12)]
    alone = [post(client, batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for found, expected in zip(pool.map(lambda batch: post(client, batch), batches), alone, strict=True):
            assert [one.get("class") for one in found] == [one.get("class") for one in expected]
            assert "error" in found[-1]
