"""timm models by name: which weights a name stands for, weights of one's own, clear words if neither can be had."""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import timm
from huggingface_hub import hf_hub_download
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model, parse_model_name, split_model_name_tag
from timm.models._hub import _parse_model_cfg
from torch import nn

from clcnet.classifiers import model_config
from clcnet.classifiers.checkpoint import Checkpoint, Tensors, fits, shapes
from clcnet.files import first_sentence

# timm 0.5.4, the paper's version, loaded these for the bare names; timm 1.x loads Noisy Student weights (ns_jft_in1k)
PAPER_TAGS = {f"tf_efficientnet_b{size}": "ra_in1k" if size in (5, 7) else "aa_in1k" for size in range(8)}

_logger = logging.getLogger(__name__)


def create(
    name: str,
    weight: Checkpoint | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
) -> nn.Module:
    """Create a timm model with its pretrained weights or a checkpoint's, in evaluation mode, on the CPU.

    Args:
        name: anything that `timm.create_model` takes, `local-dir:` and `hf-hub:` included.
        num_classes, img_size, in_chans: of the checkpoint; the model's own when left out.

    Raises:
        ValueError: timm does not know the name, has no weights for it, the weights do not fit, or it is no classifier.
        OSError: a file is missing, or a download failed.
    """
    model = _create(name, weight is None, num_classes, {"img_size": img_size, "in_chans": in_chans})
    if weight is not None:
        _load_weights(model, weight, name)
    trained = configuration(model)["num_classes"] if weight is None else num_classes_of(model)
    _check_num_classes(name, trained, num_classes_of(model))
    return model.eval()


def create_untrained(name: str) -> nn.Module:
    """The same model without its weights, to be looked at; ValueError or OSError where there is none."""
    return _create(name, False, None, {}).eval()


def resolved_name(name: str, model: nn.Module) -> str:
    """The name with the weights' tag that timm chose for a bare one, `tf_efficientnet_b4.ns_jft_in1k`; logs it then.

    For the paper's models it also logs the tag that the paper used.
    """
    source, model_id = parse_model_name(name)
    tag = configuration(model).get("tag")
    if source is not None or "." in model_id or not tag:
        return name
    paper = f"; the paper used {name}.{PAPER_TAGS[name]}" if name in PAPER_TAGS else ""
    _logger.warning("%s stands for %s.%s in timm %s%s", name, name, tag, timm.__version__, paper)
    return f"{model_id}.{tag}"


def configuration(model: nn.Module) -> dict[str, Any]:
    """timm's configuration of a model's weights: architecture, tag, classes, preprocessing."""
    return cast(dict[str, Any], model.pretrained_cfg)


def num_classes_of(model: nn.Module) -> int:
    """How many classes a model answers with."""
    return cast(int, model.num_classes)


def _check_registered(name: str, pretrained: bool, num_classes: int | None) -> None:
    """Refuse a name that timm does not know, or has no such weights for, before anything is downloaded."""
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() names them all"
        raise ValueError(f"model {name}: timm {timm.__version__} knows no {architecture}; {hint}")
    known = get_arch_pretrained_cfgs(architecture)
    if tag and name not in known:
        hint = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"model {name}: timm {timm.__version__} has no such weights of {architecture}; {hint}")
    config = get_pretrained_cfg(name)
    if pretrained:
        if config is None or not config.has_weights:
            raise ValueError(f"model {name}: timm has no pretrained weights for it; give a weights file")
        _check_num_classes(name, config.num_classes, num_classes)


def _check_num_classes(name: str, trained: int, asked: int | None) -> None:
    if trained < 2:
        raise ValueError(
            f"model {name} has no classifier ({trained} class{'es' if trained != 1 else ''}); give a model, or weights "
            "and --num_classes, that have one"
        )
    if asked is not None and trained != asked:
        raise ValueError(
            f"model {name} was trained on {trained} classes, not {asked}; leave out --num_classes, or give a weights "
            f"file with {asked} classes"
        )


def _create(name: str, pretrained: bool, num_classes: int | None, inputs: dict[str, int | None]) -> nn.Module:
    source, model_id = parse_model_name(name)
    architecture, given = name, dict[str, Any](num_classes=num_classes)
    if source:
        config = _read_config(name, source, model_id)
    else:
        _check_registered(model_id, pretrained, num_classes)
    with _explaining(name, source, pretrained):
        if source:
            place = {"source": source, "file" if source == "local-dir" else "hf_hub_id": model_id}
            facts, architecture, saved = _parse_model_cfg(config, place)
            chosen = {"num_classes": num_classes, "img_size": "img_size" in saved and inputs.get("img_size")}
            given = saved | {name: value for name, value in chosen.items() if value}
            given |= {"pretrained_cfg": facts, "pretrained_model_args": saved}
        arguments = timm.models.resolve_model_input_args(architecture, inputs, **given)
        return timm.create_model(pretrained=pretrained, **arguments)


def _read_config(name: str, source: str, model_id: str) -> dict[str, Any]:
    config = Path(model_id, "config.json")
    if source == "hf-hub":
        repository, _, revision = model_id.partition("@")
        with _explaining(name, source):
            config = Path(hf_hub_download(repository, config.name, revision=revision or None))
    if not config.is_file():
        raise FileNotFoundError(
            f"model {name}: {config} does not exist; a local-dir: model is a folder with config.json and weights"
        )
    try:
        return model_config.read(config)
    except ValueError as error:
        raise ValueError(f"model {name}: {error}") from None


@contextlib.contextmanager
def _explaining(name: str, source: str | None, pretrained: bool = True) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # hubs and their HTTP libraries raise many kinds, and no common one
        reason = first_sentence(error)
        if source == "local-dir" or not pretrained:
            raise ValueError(f"model {name} cannot be {'loaded' if source else 'made'}: {reason}") from error
        raise OSError(
            f"model {name}: its pretrained weights cannot be had ({reason}); check the connection, or give a weights "
            "file or a local-dir:FOLDER"
        ) from error


def _load_weights(model: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    wanted = model.state_dict()
    weights, note = checkpoint.weights(wanted)
    if not fits(weights, wanted):
        trained = checkpoint.settings.get("model", name)
        raise ValueError(
            f"weights file {checkpoint.path} does not fit model {name}: {_describe_difference(model, weights)}"
            + (f"; its training says that they are of {trained}" if trained != name else "")
        )
    if note:
        _logger.warning(note)
    model.load_state_dict({key: tensor for key, tensor in weights.items() if key in wanted}, strict=False)


def _describe_difference(model: nn.Module, weights: Tensors) -> str:
    found, wanted = shapes(weights), shapes(model.state_dict())
    for layers, axis, what in (("classifier", 0, "classes"), ("first_conv", 1, "channels of an image")):
        names = configuration(model).get(layers) or ("head", "fc", "classifier")[: 3 * (1 - axis)]
        for name in (names,) if isinstance(names, str) else names:
            shape, models = found.get(f"{name}.weight", ()), wanted.get(f"{name}.weight", (0, 0))
            if len(shape) > axis and shape[axis] != models[axis]:
                way_out = f"--num_classes {shape[0]}" if axis == 0 else "it as a local-dir:FOLDER of 1 or 3 channels"
                return f"it has {shape[axis]} {what}, the model {models[axis]}; give {way_out}"
    parts = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [key for key in wanted if found.get(key, wanted[key]) != wanted[key]],
    }
    return "; ".join(f"{len(keys)} {what}, such as {keys[0]}" for what, keys in parts.items() if keys)
