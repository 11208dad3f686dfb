"""The file that runs: which models, which rule with its fitted numbers, which thresholds, what to expect of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from clcnet.cascade.rule import Rule
from clcnet.cascade.rules import rule_from_json
from clcnet.data.outputs import Record
from clcnet.files import atomic_path
from clcnet.intervals import Interval
from clcnet.network.model import CLCNet
from clcnet.strangers import LARGEST_JSON, is_number, parse_json, read_bytes

if TYPE_CHECKING:
    import torch

    from clcnet.classifiers.classifier import Classifier

FORMAT, VERSION = "clcnet cascade", 1
_LARGEST_NUMBER = 1e15  # sums of a dozen such stay finite in float32
_LONGEST = 300  # characters of a message's reason
_HUB = re.compile(r"\s*hf[-_]hub\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Expected:
    """What a policy was measured to do, on images that nothing in it was chosen on.

    Attributes:
        num_images: how many images that were.
        accuracy: percent, with its 95% interval.
        shares: (K,) fraction of the images that each model sees.
        flops: billions of multiply-adds an image.
        milliseconds: an image, where every model's time was measured.
    """

    num_images: int
    accuracy: float
    accuracy_interval: Interval
    shares: list[float]
    flops: float
    milliseconds: float | None = None


@dataclass(frozen=True)
class Policy:
    """A cascade, ready to run.

    Attributes:
        models: of the K models, in the order in which an image sees them.
        rule: fitted.
        thresholds: K - 1; an image goes on past model k while its confidence is below threshold k.
        expected: None where nothing was measured.
    """

    models: list[Record]
    rule: Rule
    thresholds: list[float]
    expected: Expected | None = field(default=None)

    def save(self, path: Path | str, weights: Path | None = None) -> None:
        """Write it as JSON.

        Args:
            path: of the policy.
            weights: of the CLCNet that the rule asks, if it asks one; the policy names it relative to itself.
        """
        path = Path(path)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "models": [dataclasses.asdict(model) for model in self.models],
            "rule": self.rule.to_json(),
            "clcnet": weights and {"file": _relative(weights, path.parent), "digest": _digest(weights)},
            "thresholds": [_to_json(threshold) for threshold in self.thresholds],
            "expected": self.expected and dataclasses.asdict(self.expected),
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Policy:
        """Read a policy and the CLCNet weights that it names.

        Raises:
            OSError: it, or its weights, are missing.
            ValueError: it is no policy, or its weights are not those that it was measured with.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"policy {path} does not exist; train_custom_data.py and step 4 write one")
        content = read_bytes(path, LARGEST_JSON)
        try:
            content = parse_json(content)
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"it is version {content['version']} of {content['format']!r}")
            expected = content["expected"]
            policy = cls(
                models=[Record.checked(model, f"model {place}") for place, model in enumerate(content["models"], 1)],
                rule=rule_from_json(content["rule"], _network(content["clcnet"], path.parent)),
                thresholds=[*map(_from_json, content["thresholds"])],
                expected=expected
                and Expected(**expected | {"accuracy_interval": tuple(expected["accuracy_interval"])}),
            )
            if len(policy.thresholds) != len(policy.models) - 1:
                raise ValueError(f"{len(policy.models)} models and {len(policy.thresholds)} thresholds")
            if not policy.rule.is_fitted_for(len(policy.models)) or not _are_sound([content["rule"], expected]):
                raise ValueError(f"the numbers of rule {policy.rule.name!r} do not fit {len(policy.models)} models")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is not a cascade's policy ({str(error)[:_LONGEST]}); write it again") from None
        return policy

    def load_classifiers(
        self, names: Sequence[str] | None = None, device: torch.device | str | None = None, **options: Any
    ) -> list[Classifier]:
        """Load the policy's models, and see that they are its own.

        Args:
            names: where they lie here, as `timm.create_model` takes it, if not where they lay when it was measured.
            device: where to run; the best one here when left out.
            options: of `load_classifier`, on how they run.

        Raises:
            OSError, ValueError: a model cannot be had, or is not the one that the policy was measured with; or it would
                be downloaded from where a stranger's policy says.
        """
        from clcnet.classifiers import model_config
        from clcnet.classifiers.classifier import load_classifier

        if names is not None and len(names) != len(self.models):
            raise ValueError(f"the policy has {len(self.models)} models, and {len(names)} names were given for them")
        classifiers = []
        for place, model in enumerate(self.models):
            source = model.loaded_from | ({"name": names[place]} if names else {})
            if "name" not in source:
                raise ValueError(
                    f"the policy does not say where its model {model.model} lies; name all its models, in its order: "
                    f"{' '.join(record.model for record in self.models)}"
                )
            model_config.check_loading(f"model {model.model} of the policy", source)
            if names is None and _HUB.match(source["name"]):
                raise ValueError(
                    f"the policy would download {source['name']}; if you trust it, name all its models, in its order"
                )
            classifier = load_classifier(**source, device=device, **options)
            if model.weights and classifier.key != model.weights:
                raise ValueError(
                    f"{source['name']} is not the model that the policy was measured with ({model.model}): its "
                    "weights, arguments or preprocessing differ; give that model, or train and evaluate anew"
                )
            classifiers.append(classifier)
        return classifiers


def _to_json(threshold: float) -> float | str:
    """JSON knows no infinity."""
    return threshold if math.isfinite(threshold) else str(threshold)


def _from_json(threshold: Any) -> float:
    if threshold in ("inf", "-inf") or is_number(threshold, -_LARGEST_NUMBER, _LARGEST_NUMBER):
        return float(threshold)
    raise ValueError(f"{short(threshold)} is no threshold")


def _are_sound(value: Any) -> bool:
    """Whether all numbers in it are finite and of a size that a fit gives."""
    if isinstance(value, dict | list):
        return all(map(_are_sound, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) < _LARGEST_NUMBER


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _network(reference: dict[str, str] | None, folder: Path) -> CLCNet | None:
    if reference is None:
        return None
    weights = folder / reference["file"]  # anywhere, since it can do no more than be a CLCNet
    network = CLCNet.load(weights)
    if _digest(weights) != reference["digest"]:
        raise ValueError(f"the CLCNet weights {weights} are not those that it was measured with")
    return network
