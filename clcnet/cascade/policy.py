"""The file that runs: which models, which rule with its fitted numbers, which thresholds, what to expect of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import ModelCard, ModelHubMixin
from numpy.typing import NDArray

from clcnet import hub
from clcnet.cascade.drift import MOST, Expected
from clcnet.cascade.rules import Rule, rule_from_json
from clcnet.data.outputs import Record
from clcnet.files import atomic_path
from clcnet.metrics import format_flops
from clcnet.network.model import CLCNet
from clcnet.network.weights import CONFIG_FILE, TENSORS_FILE
from clcnet.strangers import LARGEST_JSON, is_line, is_number, parse_json, read_bytes

if TYPE_CHECKING:
    import torch

    from clcnet.classifiers.classifier import Classifier

FORMAT, VERSION = "clcnet cascade", 1
_LONGEST = 300  # characters of a message's reason
_CLCNET = "clcnet"  # folder of its network in a repository


@dataclass(frozen=True)
class Certificate:
    """What is promised of a policy, all of it together with one probability, for images like those measured.

    Attributes:
        probability: that the promises hold.
        num_images: that nothing else was fitted on.
        against: the single model that it is held against.
        drop: points lost against that on those images; below 0 where the cascade is the better one.
        kept_drop: likewise, of the images that stop before the last model; None where none does.
        most_drop: points, promised.
        most_flops: billions of multiply-adds an image on average, promised.
        most_risk: share of errors among the images that are answered, promised.
        coverage, risk: share of those images that are answered, and of errors among them.
    """

    probability: float
    num_images: int
    against: str
    drop: float
    kept_drop: float | None = None
    most_drop: float | None = None
    most_flops: float | None = None
    most_risk: float | None = None
    coverage: float | None = None
    risk: float | None = None

    def describe(self) -> str:
        """One line, for the verdict and for the end of a run."""
        promises = []
        if self.most_drop is not None:
            promises.append(f"it loses at most {self.most_drop:g} points against {self.against}")
        if self.most_flops is not None:
            promises.append(f"it takes at most {format_flops(self.most_flops)} FLOPs an image on average")
        if self.most_risk is not None:
            promises.append(f"at most {self.most_risk:.1%} of what it answers is wrong")
        text = (
            f"Certificate: with probability {100 * self.probability:g}%, {', and '.join(promises)}, on images like the "
            f"{self.num_images:,} that it was certified on, and on no others. There it is {_better(self.drop)} than "
            f"{self.against}"
        )
        if self.kept_drop is not None:
            text += f", {_better(self.kept_drop)} on the images that stop before the last model"
        if self.risk is not None:
            text += f"; it answers {self.coverage:.1%} of them, {self.risk:.2%} wrongly, and is unsure of the others"
        return f"{text}."


def _better(drop: float) -> str:
    return f"{abs(drop):.2f} points {'worse' if drop > 0 else 'better'}"


@dataclass(frozen=True)
class Policy(ModelHubMixin):
    """A cascade, ready to run.

    `save_pretrained(folder)`, `push_to_hub("user/name")` and `from_pretrained("user/name")` are `ModelHubMixin`'s. They
    keep the policy and its CLCNet; the models go by their names on the Hub or in timm, see `naming`.

    Attributes:
        models: of the K models, in the order in which an image sees them.
        rule: fitted.
        thresholds: K - 1; an image goes on past model k while its confidence is below threshold k.
        expected: None where nothing was measured.
        certificate: None where nothing is promised.
        unsure_below: a final confidence below it makes the answer "unsure"; None where it never is.
    """

    _hub_mixin_config = hub.NO_CONFIG

    models: list[Record]
    rule: Rule
    thresholds: list[float]
    expected: Expected | None = None
    certificate: Certificate | None = None
    unsure_below: float | None = None

    def class_names(self, num_classes: int | None) -> list[str] | None:
        """Of the first model's classes, as they were known when it was measured; None if they are not so many."""
        names = self.models[0].class_names if self.models else None
        return names if names and len(names) == num_classes else None

    def is_unsure(self, confidence: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Where the final answer is "unsure": both numbers are taken in float32, as result files keep them."""
        limit = -np.inf if self.unsure_below is None else self.unsure_below
        unsure: NDArray[np.bool_] = ~(confidence.astype(np.float32) >= np.float32(limit))  # NaN where none answered
        return unsure

    def save(self, path: Path | str, weights: Path | None = None) -> None:
        """Write it as JSON; files of models that lie here are named relative to it.

        Args:
            path: of the policy.
            weights: of the CLCNet that the rule asks, if it asks one.
        """
        path = Path(path)
        seen = functools.partial(_seen_from, os.path.realpath(path.parent))
        content = {
            "format": FORMAT,
            "version": VERSION,
            "models": [dataclasses.asdict(_moved(model, seen)) for model in self.models],
            "rule": self.rule.to_json(),
            "clcnet": weights and {"file": seen(str(weights)), "digest": _digest(weights)},
            # JSON knows no infinity
            "thresholds": [each if math.isfinite(each) else str(each) for each in self.thresholds],
            "expected": self.expected and dataclasses.asdict(self.expected),
            "certificate": self.certificate and dataclasses.asdict(self.certificate),
            "unsure_below": self.unsure_below,
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

    def naming(self, *names: str) -> Policy:
        """The same, whose models are had under these names, as timm takes them, or from these files of weights."""
        if len(names) != len(self.models):
            raise ValueError(f"the policy has {len(self.models)} models, and {len(names)} names were given for them")
        models = []
        for model, name in zip(self.models, names, strict=True):
            source = {key: value for key, value in model.loaded_from.items() if key != "weight"}
            source |= {"weight" if os.path.isfile(name) else "name": name}
            models.append(dataclasses.replace(model, loaded_from=source))
        return dataclasses.replace(self, models=models)

    def _save_pretrained(self, save_directory: Path) -> None:
        for model in self.models:
            name = model.loaded_from.get("name", "local-dir:")
            if "weight" in model.loaded_from or name.strip().lower().startswith("local"):
                raise ValueError(
                    f"model {model.model} of the policy lies on this machine alone; push it to the Hub with timm's "
                    "push_to_hf_hub, and give all models' names there, or in timm, with policy.naming(...)"
                )
        network: CLCNet | None = getattr(self.rule, "network", None)
        if network is not None:
            network.save_pretrained(save_directory / _CLCNET)
        self.save(save_directory / CONFIG_FILE, None if network is None else save_directory / _CLCNET)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, **options: Any) -> Policy:
        if isinstance(config, dict) and config.get("clcnet"):
            for name in (CONFIG_FILE, TENSORS_FILE):
                hub.fetch(model_id, f"{_CLCNET}/{name}", options)
        return cls.load(hub.fetch(model_id, CONFIG_FILE, options))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What it is made of and what it was measured to do."""
        shares, measured = [""] * len(self.models), ["Nothing was measured."]
        if self.expected:
            low, high = self.expected.accuracy_interval
            shares = [f"{share:.1%}" for share in self.expected.shares]
            measured = [
                f"On {self.expected.num_images:,} images that nothing in it was chosen on: top-1 "
                f"{self.expected.accuracy:.2f}% [{low:.2f}, {high:.2f}] at {format_flops(self.expected.flops)} "
                "multiply-adds an image."
            ]
        if self.certificate:
            measured += ["", self.certificate.describe()]
        costs = ["" if model.flops is None else format_flops(model.flops) for model in self.models]
        sources = [model.loaded_from.get("name", "") for model in self.models]
        models = [*zip([model.model for model in self.models], sources, costs, shares, strict=True)]
        return hub.policy_card(self.rule.name, self.thresholds, models, measured)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Policy:
        """Read a policy and the CLCNet weights that it names, which are to run on this device.

        Raises:
            OSError: it is missing.
            ValueError: it is no policy, or its weights are missing, or not those that it was measured with.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"policy {path} does not exist; train_custom_data.py and step 4 write one")
        raw = read_bytes(path, LARGEST_JSON)
        try:
            content, found = parse_json(raw), functools.partial(_found_from, os.path.realpath(path.parent))
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"it is version {content['version']} of {content['format']!r}")
            expected = content["expected"]
            records = [Record.checked(model, f"model {place}") for place, model in enumerate(content["models"], 1)]
            policy = cls(
                models=[_moved(record, found) for record in records],
                rule=rule_from_json(content["rule"], _network(content["clcnet"], path.parent, device)),
                thresholds=[*map(_from_json, content["thresholds"])],
                expected=expected
                and Expected(**expected | {"accuracy_interval": tuple(expected["accuracy_interval"])}),
                certificate=content.get("certificate") and Certificate(**content["certificate"]),
                unsure_below=None if content.get("unsure_below") is None else _from_json(content["unsure_below"]),
            )
            if len(policy.thresholds) != len(policy.models) - 1:
                raise ValueError(f"{len(policy.models)} models and {len(policy.thresholds)} thresholds")
            for part in ("rule", "expected", "certificate"):
                if not _are_sound(content.get(part)):
                    raise ValueError(f"a number in its {part} is beyond what a fit gives")
            if policy.certificate and not (policy.certificate.describe() and is_line(policy.certificate.against)):
                raise ValueError("its certificate is against no model")
            if policy.expected and not policy.expected.is_sound_for(len(policy.models)):
                raise ValueError(f"its shares and quantiles do not fit {len(policy.models)} models")
            if not policy.rule.is_fitted_for(len(policy.models)):
                raise ValueError(f"the numbers of rule {policy.rule.name!r} do not fit {len(policy.models)} models")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is not a cascade's policy ({str(error)[:_LONGEST]}); write it again") from None
        return policy

    def load_classifiers(
        self, names: Sequence[str] | None = None, device: torch.device | str | None = None, **options: Any
    ) -> list[Classifier]:
        """Load the policy's models, and see that they are its own.

        Args:
            names: where they lie here, if not where they lay when it was measured: names as `timm.create_model` takes
                them, or files of weights.
            device: where to run; the best one here when left out.
            options: of `load_classifier`, on how they run.

        Raises:
            OSError, ValueError: a model cannot be had, or is not the one that the policy was measured with; or it would
                be downloaded from where a stranger's policy says.
        """
        from clcnet.classifiers import model_config
        from clcnet.classifiers.classifier import load_classifier

        classifiers = []
        for model in self.models if names is None else self.naming(*names).models:
            source = model.loaded_from
            if "name" not in source:
                raise ValueError(
                    f"the policy does not say where its model {model.model} lies; name all its models, in its order: "
                    f"{' '.join(record.model for record in self.models)}"
                )
            model_config.check_loading(f"model {model.model} of the policy", source, may_download=names is not None)
            classifier = load_classifier(**source, device=device, **options)
            if model.weights and classifier.key != model.weights:
                raise ValueError(
                    f"{source['name']} is not the model that the policy was measured with ({model.model}): its "
                    "weights, arguments or preprocessing differ; give that model, or train and evaluate anew"
                )
            classifiers.append(classifier)
        return classifiers


def _from_json(threshold: Any) -> float:
    if threshold in ("inf", "-inf") or is_number(threshold, -MOST, MOST):
        return float(threshold)
    raise ValueError(f"{short(threshold)} is no threshold")


def _are_sound(value: Any) -> bool:
    """Whether all numbers in it are finite and of a size that a fit gives."""
    if isinstance(value, dict | list):
        return all(map(_are_sound, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) < MOST


def _moved(model: Record, move: Callable[[str], str]) -> Record:
    """The record of a model whose own files are named otherwise."""
    source = dict(model.loaded_from)
    scheme, colon, folder = str(source.get("name", "")).partition(":")
    if scheme == "local-dir":
        source["name"] = scheme + colon + move(folder)
    if isinstance(source.get("weight"), str | Path):
        source["weight"] = move(str(source["weight"]))
    return dataclasses.replace(model, loaded_from=source)


def _seen_from(folder: str, path: str) -> str:
    """How a policy in this folder names a path of this run; what does not lie here stays."""
    near = not os.path.isabs(path) or os.path.abspath(path).startswith(f"{folder}{os.sep}")
    return os.path.relpath(os.path.abspath(path), folder) if near and os.path.exists(path) else path


def _found_from(folder: str, path: str) -> str:
    """The way back; what does not lie there is taken as this run would, as policies of earlier versions mean it."""
    there = os.path.join(folder, path)
    return os.path.relpath(there) if not os.path.isabs(path) and os.path.exists(there) else path


def _digest(path: Path) -> str:
    """Of a weights file, or of a folder as `save_pretrained` makes it."""
    files = [path / name for name in (CONFIG_FILE, TENSORS_FILE)] if path.is_dir() else [path]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()


def _network(reference: dict[str, str] | None, folder: Path, device: torch.device | str) -> CLCNet | None:
    if reference is None:
        return None
    weights = folder / reference["file"]  # anywhere, since it can do no more than be a CLCNet
    network = CLCNet.from_pretrained(weights) if weights.is_dir() else CLCNet.load(weights)
    if _digest(weights) != reference["digest"]:
        raise ValueError(f"the CLCNet weights {weights} are not those that it was measured with")
    return network.to(device)
