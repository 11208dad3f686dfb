"""What the Hub asks of CLCNet and of policies: files by their repository, and cards with the measured figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

NO_CONFIG = {"library_name": "clcnet"}  # ours is written by `_save_pretrained`; without any the mixin would add its own
_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_ABOUT = "[CLCNet](https://arxiv.org/abs/2205.09612)"


def fetch(model_id: str, name: str, options: Mapping[str, Any]) -> Path:
    """A file of a folder, or of a repository on the Hub, downloaded where need be."""
    if os.path.isdir(model_id):
        return Path(model_id) / name
    return Path(hf_hub_download(model_id, name, **{key: options[key] for key in _OPTIONS if key in options}))


def clcnet_card(num_classes: int, calibrated: bool, metadata: Mapping[str, Any]) -> ModelCard:
    """A network's card, by what its training wrote down."""
    lines = [
        f"The confidence network of {_ABOUT}: from sorted softmax probabilities of {num_classes:,} classes to "
        + ("the chance" if calibrated else "a score (not calibrated)")
        + " that the first is right.",
        "",
        *_code("from clcnet import CLCNet", 'CLCNet.from_pretrained("REPOSITORY").predict(sorted_probs)  # (N, n)'),
    ]
    if metadata.get("tables"):
        lines += ["", f"Trained on the outputs in {', '.join(map(str, metadata['tables']))}."]
    rows = [
        (part, name, f"{value:.4g}")
        for part in ("validation", "test")
        for name, value in dict(metadata.get(part) or {}).items()
    ]
    if rows:
        lines += ["", *_table(("images", "figure", "value"), rows)]
    return _card("CLCNet", lines)


def policy_card(
    rule: str, thresholds: Sequence[float], models: Sequence[tuple[str, ...]], measured: Sequence[str]
) -> ModelCard:
    """A policy's card: name, source, multiply-adds and share of each model, and lines on what was measured."""
    names = ", ".join(f'"{source}"' for _, source, *_ in models)
    lines = [
        f"A cascade of image classifiers under the rule {rule!r} ({_ABOUT}): an image goes on to the next model while "
        f"the confidence is below {', '.join(f'{threshold:.6g}' for threshold in thresholds)}.",
        "",
        *_table(("model", "from", "multiply-adds an image", "images that it sees"), models),
        "",
        *measured,
        "",
        "The models are not part of this repository; name those that you trust, in this order:",
        "",
        *_code(
            "from clcnet import Cascade",
            "from clcnet.cascade.policy import Policy",
            f'cascade = Cascade.from_policy(Policy.from_pretrained("REPOSITORY"), models=[{names}])',
            'cascade(["cat.jpg"]).names',
        ),
    ]
    return _card("A cascade of image classifiers", lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def _card(title: str, lines: Sequence[str]) -> ModelCard:
    data = ModelCardData(library_name="clcnet", pipeline_tag="image-classification", tags=["clcnet", "cascade"])
    return ModelCard("\n".join(["---", data.to_yaml(), "---", "", f"# {title}", "", *lines, ""]))
