"""A policy, or CLCNet alone, as one ONNX file, which runs without this package and without torch.

    python -m clcnet.cascade.export --policy cascade.json --output cascade.onnx
    python -m clcnet.cascade.export --weight weights/CLCNet_custom_data.zip --output clcnet.onnx

A cascade takes all B images once a model, as `images_0`, `images_1`, ...: (B, channels, height, width), preprocessed as
the file's metadata say. It gives `labels`, `confidences` and `answered_by`, each (B,), as `Cascade` does. A model runs
on the images that go on to it alone, and not at all where none does. CLCNet takes `probs`, (B, n) sorted from largest
to smallest, and gives `confidences`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

with contextlib.suppress(ModuleNotFoundError):  # `check_extras` says what is missing
    import onnx
    import onnx.parser
    from onnx import TensorProto, compose, helper, numpy_helper

from clcnet import cli
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Average, Fused, Last, Rule, Surest
from clcnet.classifiers.classes import match_classes
from clcnet.classifiers.classifier import Classifier
from clcnet.confidence import CHANCE, CLCNET, TEMPERED
from clcnet.files import atomic_path, check_output
from clcnet.network.model import CLCNet

OPSET = 20
_TINY = float(np.finfo(np.float32).tiny)
_ANSWER = ("labels", "confidences", "answered_by")

# the confidences of clcnet.confidence, on tensors of sorted probabilities (M, n); in float64, as there
_SIMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    CHANCE: lambda probs: torch.zeros_like(probs[:, 0], dtype=torch.float64),
    "max softmax": lambda probs: probs[:, 0].double(),
    "margin": lambda probs: probs[:, 0].double() - probs[:, 1].double(),
    "entropy": lambda probs: (probs.double() * probs.clamp(_TINY).log().double()).sum(dim=1),
    "sum of squares (DOCTOR)": lambda probs: probs.double().square().sum(dim=1).clamp(max=1),
}


class _Step(nn.Module):
    """A rule once k models have spoken: probabilities, k of (M, C), to labels, confidence and answered_by, (M,)."""

    offsets: Tensor | None

    def __init__(self, rule: Rule, count: int) -> None:
        super().__init__()
        if not isinstance(rule, Surest | Fused) or type(rule) not in (Surest, Last, Average, Fused):
            raise ValueError(f"the rule {rule.name!r} cannot be exported")
        self.rule, self.network = rule, rule.network
        pool = rule.pools[count - 1] if isinstance(rule, Fused) else None
        self.weights = [] if pool is None else pool.weights.astype(np.float32).tolist()
        offsets = None if pool is None or pool.offsets is None else torch.from_numpy(pool.offsets).float()
        self.register_buffer("offsets", offsets)

    def forward(self, said: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        rule, count = self.rule, len(said)
        last = torch.full_like(said[0][:, 0], count - 1, dtype=torch.int64)
        if isinstance(rule, Fused):
            logs = torch.stack([probs.clamp(_TINY).log() for probs in said])
            scores = (logs * logs.new_tensor(self.weights)[:, None, None]).sum(dim=0)
            if self.offsets is not None:
                scores = scores + self.offsets
            pooled = scores.softmax(dim=-1)
            return pooled.argmax(dim=1), self.confidence(_descending(pooled)), last
        if isinstance(rule, Last):
            return said[-1].argmax(dim=1), self.confidence(_descending(said[-1]), count - 1), last
        sure = torch.stack([self.confidence(_descending(probs), place) for place, probs in enumerate(said)])
        if isinstance(rule, Average):
            return torch.stack(said).sum(dim=0).argmax(dim=1), sure.mean(dim=0), last
        answered_by = sure.argmax(dim=0)  # the first of equals
        labels = torch.stack([probs.argmax(dim=1) for probs in said])
        return labels.gather(0, answered_by[None])[0], sure.amax(dim=0), answered_by

    def confidence(self, sorted_probs: Tensor, place: int = 0) -> Tensor:
        """How sure sorted probabilities (M, C) are, of one model or of the pool: (M,) float64."""
        name = self.rule.confidence
        if name == TEMPERED and isinstance(self.rule, Surest):
            logits = sorted_probs.log() - sorted_probs[:, :1].log()
            return 1 / (logits / self.rule.temperatures[place]).exp().sum(dim=1).double()
        if name != CLCNET:
            if name not in _SIMPLE:
                raise ValueError(f"the confidence {name!r} has no form in ONNX; write it in _SIMPLE of {__name__}")
            return _SIMPLE[name](sorted_probs)
        assert isinstance(self.network, CLCNet), "a policy's network is CLCNet"
        raw, calibration = self.network(sorted_probs), self.network.calibration
        return (raw if calibration is None else calibration.apply(raw, sorted_probs)).double()


class _Alone(nn.Module):
    """CLCNet by itself: sorted probabilities (M, C) to (M,) float32."""

    def __init__(self, network: CLCNet) -> None:
        super().__init__()
        self.step = _Step(Surest(CLCNET, network=network), 1)

    def forward(self, sorted_probs: Tensor) -> Tensor:
        return self.step.confidence(sorted_probs).float()


def _descending(probs: Tensor) -> Tensor:
    return probs.topk(probs.shape[1]).values


class _Stage(nn.Module):
    """A model and the step after it: images (M, ...) and what earlier models said to this model's and the step's."""

    def __init__(self, model: nn.Module, order: np.ndarray | None, rule: Rule, place: int) -> None:
        super().__init__()
        self.model, self.step = model, _Step(rule, place + 1)
        self.order = None if order is None else order.tolist()

    def forward(self, images: Tensor, earlier: list[Tensor]) -> tuple[Tensor, ...]:
        probs = self.model(images).float().softmax(dim=-1)
        probs = probs if self.order is None else probs[:, self.order]
        return probs, *self.step([*earlier, probs])


def export_policy(policy: Policy, classifiers: Sequence[Classifier]) -> onnx.ModelProto:
    """One model that runs a policy.

    Args:
        policy: any, of any number of models.
        classifiers: its models, on the CPU, as `Policy.load_classifiers` gives them.

    Raises:
        ValueError: a model holds what ONNX cannot express.
    """
    check_extras()
    stages, orders = [], match_classes(classifiers)
    for place, (classifier, order) in enumerate(zip(classifiers, orders, strict=True)):
        stage = _Stage(classifier.model, order, policy.rule, place)
        earlier = [torch.full((2, classifier.num_classes), 1 / classifier.num_classes) for _ in range(place)]
        names = ["images", *(f"said_{number}" for number in range(place))]
        arguments = (torch.zeros(2, *classifier.input_size), earlier)
        stages.append(_to_onnx(stage, arguments, names, ["probs", *_ANSWER], classifier.name))
    facts = {
        "models": json.dumps(
            [{"model": model.name, "preprocessing": model.data_config} for model in classifiers], default=str
        ),
        "class_names": json.dumps(classifiers[0].label_names),
        "unsure_below": json.dumps(policy.unsure_below),
    }
    return _checked(_joined(stages, policy.thresholds), facts)


def export_clcnet(network: CLCNet, num_classes: int | None = None) -> onnx.ModelProto:
    """CLCNet alone, calibrated where it is, for rows of so many classes, its own where none are given."""
    check_extras()
    count = num_classes or network.num_classes
    rows = torch.full((2, count), 1 / count)
    model = _to_onnx(_Alone(network), (rows,), ["probs"], ["confidences"], "CLCNet")
    return _checked(model, {"num_classes": str(count)})


def check_extras() -> None:
    """Raises: ValueError: what the export needs is not installed."""
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is not installed; pip install 'clcnet[onnx]' brings it")


@torch.no_grad()
def _to_onnx(module: nn.Module, arguments: Any, inputs: list[str], outputs: list[str], name: str) -> onnx.ModelProto:
    """Any number of rows."""
    module.eval()
    module(*arguments)  # the network's fixed basis is cached from here, as numbers; traced it would be none
    rows = torch.export.Dim("rows")
    shapes = tuple([{0: rows}] * len(each) if isinstance(each, list) else {0: rows} for each in arguments)
    try:
        traced = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            traced, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
        )
    except (RuntimeError, torch._dynamo.exc.UserError) as error:
        raise ValueError(f"{name} cannot be written as ONNX ({str(error).splitlines()[0]})") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _joined(stages: list[onnx.ModelProto], thresholds: Sequence[float]) -> onnx.ModelProto:
    """All stages as one graph, each later one in a branch of its own, with the rows that go on."""
    inputs = [stage.graph.input[0].type for stage in stages]
    stages = [compose.add_prefix(stage, f"stage_{place}_") for place, stage in enumerate(stages)]
    constants = {"zero": np.int64(0), "flat": np.array([-1], np.int64)}
    constants |= {f"stage_{place}_threshold": np.float64(threshold) for place, threshold in enumerate(thresholds)}

    def nodes_from(place: int) -> list[onnx.NodeProto]:
        """A stage and all that follow: from its inputs to `from_{place}_labels` and so on, of the rows that it sees."""
        own, here, after = f"stage_{place}_", f"going_{place}_", f"stage_{place + 1}_"
        nodes = list(stages[place].graph.node)
        if place == len(thresholds):
            return nodes + _nodes(*(f"from_{place}_{name} = Identity({own}{name})" for name in _ANSWER))
        nodes += _nodes(
            f"{here}below = Less({own}confidences, {own}threshold)",
            f"{here}places = NonZero({here}below)",  # (1, M)
            f"{here}column = Transpose({here}places)",
            f"{here}rows = Reshape({here}places, flat)",
            f"{here}size = Size({here}rows)",
            f"{here}any = Greater({here}size, zero)",
        )
        said = [*(f"{own}said_{number}" for number in range(place)), f"{own}probs"]
        ask = [
            *_nodes(
                f"{here}of_batch = "
                + (f"Gather(going_{place - 1}_of_batch, {here}rows)" if place else f"Identity({here}rows)"),
                f"{after}images = Gather(images_{place + 1}, {here}of_batch)",
                *(f"{after}said_{number} = Gather({probs}, {here}rows)" for number, probs in enumerate(said)),
            ),
            *nodes_from(place + 1),
            *_nodes(
                *(
                    f"asked_{place}_{name} = ScatterND({own}{name}, {here}column, from_{place + 1}_{name})"
                    for name in _ANSWER
                )
            ),
        ]
        keep = _nodes(*(f"kept_{place}_{name} = Identity({own}{name})" for name in _ANSWER))
        branches = {
            "then_branch": helper.make_graph(ask, f"ask_{place + 1}", [], _answers(f"asked_{place}_")),
            "else_branch": helper.make_graph(keep, f"keep_{place}", [], _answers(f"kept_{place}_")),
        }
        outputs = [f"from_{place}_{name}" for name in _ANSWER]
        return [*nodes, helper.make_node("If", [f"{here}any"], outputs, **branches)]

    nodes = [
        *_nodes("stage_0_images = Identity(images_0)"),
        *nodes_from(0),
        *_nodes(
            "labels = Identity(from_0_labels)",
            f"confidences = Cast<to = {TensorProto.FLOAT}>(from_0_confidences)",
            "answered_by = Identity(from_0_answered_by)",
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "cascade",
        [helper.make_value_info(f"images_{place}", kind) for place, kind in enumerate(inputs)],
        _answers("", TensorProto.FLOAT),
        [tensor for stage in stages for tensor in stage.graph.initializer]
        + [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = {each.domain: each for stage in stages for each in stage.opset_import}
    functions = [function for stage in stages for function in stage.functions]
    return helper.make_model(graph, opset_imports=opsets.values(), functions=functions, ir_version=stages[0].ir_version)


def _nodes(*lines: str) -> list[onnx.NodeProto]:
    return list(onnx.parser.parse_graph("part () => () {" + "\n".join(lines) + "}").node)


def _answers(prefix: str, confidences: int = 0) -> list[onnx.ValueInfoProto]:
    types = (TensorProto.INT64, confidences or TensorProto.DOUBLE, TensorProto.INT64)
    values = zip(_ANSWER, types, strict=True)
    return [helper.make_tensor_value_info(prefix + name, kind, ["rows"]) for name, kind in values]


def _checked(model: onnx.ModelProto, facts: dict[str, str]) -> onnx.ModelProto:
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    return model


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--policy", type=Path, metavar="FILE", help="cascade.json of train_custom_data.py or of step 4")
    add("--weight", type=Path, metavar="FILE", help="CLCNet weights, to be exported alone")
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", help="where the policy's models lie here, in its order")
    add("--num_classes", type=cli.number_of_classes, metavar="N", help="of CLCNet alone (default: its own)")
    add("--output", type=Path, required=True, metavar="FILE", help="ONNX file to write")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Write the file."""
    check_extras()
    output = check_output(args.output, inputs=[args.policy, args.weight])
    if args.policy:
        policy = Policy.load(args.policy)
        model = export_policy(policy, policy.load_classifiers(args.models, "cpu"))
    else:
        model = export_clcnet(CLCNet.load(args.weight), args.num_classes)
    with atomic_path(output) as temporary:
        onnx.save(model, temporary)
    graph = model.graph
    shapes = {value.name: [dim.dim_value or "B" for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    print("; ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()))
    print(f"opset {OPSET}, {output.stat().st_size / 1e6:.1f} MB; written to {output}")
    return {"output": output, "inputs": shapes}


if __name__ == "__main__":
    cli.run(main, get_args_parser())
