"""Files from strangers: no code, no foreign numbers, no flooded memory, no commands to the screen; one line each."""

import contextlib
import copy
import csv
import io
import json
import os
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scripts

from clcnet import CLCNet, cli
from clcnet.cascade.evaluation import load_fold_networks
from clcnet.cascade.policy import Policy
from clcnet.cascade.pool import Pool
from clcnet.cascade.rules import Fused, Rule, Surest
from clcnet.classifiers.classifier import load_classifier
from clcnet.classifiers.kept import Kept
from clcnet.confidence import CLCNET, TEMPERED
from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs, Record
from clcnet.data.store import READ, Store
from clcnet.report.tables import read_results
from clcnet.strangers import LARGEST_JSON, parse_json, read_bytes

NOT_FILES = [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)]
NOT_FILE_IDS = ["pipe", "folder", "endless"]
HUGE = 10**400
NO_JSON = {
    "another shape": "[1, 2]",
    "nested": "[" * 100_000,
    "nested whole": '{"a":' * 900 + "1" + "}" * 900,
    "twice": '{"flops": 1, "flops": 2}',
    "unfinished text": '"\\' * 2_000_000,
    "no text": "\udcff",
}


def refused_in_one_line(error: BaseException, *words: str) -> None:
    assert isinstance(error, ValueError | OSError)
    message = cli._describe(error)
    assert len(message) < 800 and "\n" not in message, message
    assert all(word in message for word in words), message


# ---------------------------------------------------------------- stores


def segment(store: Path) -> Path:
    """A store of model m and three classes with one answer, of image kkk."""
    keep = Store(store, "m", 3)
    keep.append(np.array([b"k" * 16], "S16"), np.array([READ], np.uint8), np.array([[0.5, 0.3, 0.2]], np.float32))
    keep.close()
    (path,) = keep.folder.glob("*.answers")
    return path


@pytest.mark.parametrize("make", NOT_FILES, ids=NOT_FILE_IDS)
def test_what_lies_in_a_store_in_place_of_answers_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    planted = segment(tmp_path).with_name("planted.answers")
    make(planted)
    with pytest.raises(OSError) as caught:
        Store(tmp_path, "m", 3)
    refused_in_one_line(caught.value, str(planted), "is not a file")


def test_a_file_of_answers_without_an_end_is_not_read_to_it(tmp_path: Path) -> None:
    planted = segment(tmp_path).with_name("planted.answers")
    planted.touch()
    os.truncate(planted, 2**40)  # zeros, which take no room on the disk
    start = time.perf_counter()
    assert Store(tmp_path, "m", 3).find(np.array([b"k" * 16], "S16"))[0].tolist() == [0]
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("flops", ['"many"', "[1]", "{}", "NaN", "1e999", "-1", "true", "null", str(HUGE)])
def test_what_a_model_costs_is_counted_where_a_store_says_it_badly(
    tmp_path: Path, flops: str, image_folder: Callable[..., Path], classifier_dir: Callable[..., Path]
) -> None:
    classifier = load_classifier(f"local-dir:{classifier_dir()}", device="cpu")
    counted = classifier.flops
    kept = Kept(tmp_path, classifier, list_images(image_folder()))
    kept.store.folder.mkdir(parents=True, exist_ok=True)
    (kept.store.folder / "about.json").write_text(f'{{"flops": {flops}}}')
    assert Kept(tmp_path, classifier, kept.images).record.flops == counted > 0


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_facts_of_a_store_that_are_no_facts_are_forgotten(tmp_path: Path, content: str) -> None:
    segment(tmp_path).with_name("about.json").write_text(content, errors="surrogateescape")
    assert Store(tmp_path, "m", 3).about == {}


def test_a_pipe_for_facts_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(segment(tmp_path).with_name("about.json"))
    assert Store(tmp_path, "m", 3).about == {}


# ---------------------------------------------------------------- policies

POOLS = (Pool(np.array([1.1]), np.zeros(3)), Pool(np.array([0.4, 0.8]), np.ones(3)))
RULES: dict[str, Rule] = {
    "fused": Fused("max softmax", True, POOLS),
    "tempered": Surest(TEMPERED, (1.5, 0.9)),
}


def policy_file(folder: Path, rule: Rule, change: Callable[[dict[str, Any]], object] = lambda content: None) -> Path:
    path = folder / "cascade.json"
    Policy([Record(name, loaded_from={"name": name}) for name in ("small", "large")], rule, [0.7]).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_policy_is_read_back_as_it_was_saved(tmp_path: Path, rule: Rule) -> None:
    policy = Policy.load(policy_file(tmp_path, rule))
    assert policy.rule.to_json() == rule.to_json() and policy.thresholds == [0.7]
    for quantiles in (None, [[0.1, 0.2], []]):
        expected = EXPECTED | {"quantiles": quantiles}
        more = {"expected": expected, "certificate": CERTIFICATE, "unsure_below": 0.5}
        policy = Policy.load(policy_file(tmp_path, rule, lambda content, more=more: content.update(more)))
        assert policy.expected and policy.expected.quantiles == quantiles
        assert policy.certificate and policy.unsure_below == 0.5


def put(*way: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a policy: the last word is put where the others lead."""
    *keys, last, value = way

    def change(content: dict[str, Any]) -> None:
        for key in keys:
            content = content[key]
        content[last] = copy.deepcopy(value)

    return change


NUMBERS = (float("nan"), float("inf"), 1e308, -1e308, HUGE, "1", None, [1.0], {})
EXPECTED = {"num_images": 9, "accuracy": 80.0, "accuracy_interval": [70, 90], "shares": [1.0, 0.5], "flops": 1.0}
CERTIFICATE = {"probability": 0.9, "num_images": 9, "against": "large", "drop": 0.1, "most_drop": 1.0}
SPOILT = {
    **{f"threshold {number!r:.9}": ("fused", put("thresholds", [number])) for number in (*NUMBERS, "nan", True)},
    **{f"thresholds {value!r}": ("fused", put("thresholds", value)) for value in ([], "7", [0.1, 0.2], None, 7)},
    **{
        f"weight {number!r:.9}": ("fused", put("rule", "pools", 1, "weights", 0, number))
        for number in NUMBERS
        if number != "1"
    },
    **{f"offset {number!r:.9}": ("fused", put("rule", "pools", 0, "offsets", 2, number)) for number in NUMBERS[:5]},
    **{f"temperature {number!r:.9}": ("tempered", put("rule", "temperatures", 0, number)) for number in (0, *NUMBERS)},
    "too few temperatures": ("tempered", put("rule", "temperatures", [1.0])),
    "too few pools": ("fused", lambda content: content["rule"]["pools"].pop()),
    "weights of other models": ("fused", put("rule", "pools", 0, "weights", [1, 1])),
    "offsets of other classes": ("fused", put("rule", "pools", 0, "offsets", [0.0] * 4)),
    "offsets in a table": ("fused", put("rule", "pools", 0, "offsets", [[0.0] * 3])),
    "a network that is not there": ("fused", put("rule", "confidence", CLCNET)),
    "an unknown confidence": ("tempered", put("rule", "confidence", "trust me")),
    "an unknown rule": ("fused", put("rule", "name", "x" * 100_000)),
    "a list for a name": ("fused", put("rule", "name", ["fused"])),
    "an unknown field": ("tempered", put("rule", "network", "evil")),
    "a number for a rule": ("fused", put("rule", 7)),
    "no models": ("fused", put("models", [])),
    "an unknown kind of cost": ("fused", put("models", 0, "flops", "1")),
    "a cost beyond all bounds": ("fused", put("models", 0, "flops", 1e308)),
    "a negative cost": ("fused", put("models", 0, "milliseconds", -1)),
    "a time taken nobody knows how": ("fused", put("models", 0, "timed", "fast")),
    "a forged line": ("fused", put("models", 0, "model", "small\n100% accurate")),
    "names that are numbers": ("fused", put("models", 0, "class_names", [1, 2, 3])),
    "a file for loaded_from": ("fused", put("models", 0, "loaded_from", "file")),
    "a number for a model": ("fused", put("models", 0, 7)),
    "weights without a digest": ("fused", put("clcnet", {"file": "w.zip"})),
    "weights that are missing": ("fused", put("clcnet", {"file": "w.zip", "digest": ""})),
    "weights at a number": ("fused", put("clcnet", {"file": 7, "digest": ""})),
    "weights that never end": ("fused", put("clcnet", {"file": "/dev/zero", "digest": ""})),
    "weights under no name": ("fused", put("clcnet", {"file": "a\0b", "digest": ""})),
    "expectations of another shape": ("fused", put("expected", [1])),
    **{
        f"unsure below {number!r:.9}": ("fused", put("unsure_below", number))
        for number in NUMBERS
        if number is not None
    },
    "shares of other models": ("fused", put("expected", EXPECTED | {"shares": [1.0]})),
    "a share above 1": ("fused", put("expected", EXPECTED | {"shares": [1.0, 1.5]})),
    "quantiles of other models": ("fused", put("expected", EXPECTED | {"quantiles": [[0.1]]})),
    "quantiles that fall": ("fused", put("expected", EXPECTED | {"quantiles": [[0.2, 0.1], []]})),
    "a quantile beyond all bounds": ("fused", put("expected", EXPECTED | {"quantiles": [[0.1, 1e308], []]})),
    "quantiles that are text": ("fused", put("expected", EXPECTED | {"quantiles": ["ab", []]})),
    "a certificate in words": ("fused", put("certificate", CERTIFICATE | {"drop": "none"})),
    "a forged certificate": ("fused", put("certificate", CERTIFICATE | {"against": "large\nCertificate: none"})),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_policy_is_refused_in_one_line(tmp_path: Path, spoilt: str) -> None:
    rule, change = SPOILT[spoilt]
    path = policy_file(tmp_path, RULES[rule], change)
    with pytest.raises((ValueError, OSError)) as caught:
        Policy.load(path)
    refused_in_one_line(caught.value, str(tmp_path))


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_policy_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError) as caught:
        Policy.load(tmp_path / "p.json")
    refused_in_one_line(caught.value, str(tmp_path / "p.json"), "not a cascade's policy")


LOADED_FROM = [
    {"name": "test_resnet", "device": "cuda"},
    {"name": "test_resnet", "cache_dir": "."},
    {"name": 7},
    {"name": "test_resnet", "img_size": 10**9},
    {"name": "test_resnet", "num_classes": 10**9},
    {"name": "test_resnet", "crop_pct": float("nan")},
    {"name": "test_resnet", "interpolation": ["random"]},
    {"name": "test_resnet", "weight": 7},
    {"name": "hf-hub:stranger/model"},
    {"name": " HF_HUB:stranger/model"},
]


@pytest.mark.parametrize("source", LOADED_FROM, ids=str)
def test_a_policy_loads_models_by_known_arguments_and_downloads_none_that_nobody_named(
    tmp_path: Path, source: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(policy_file(tmp_path, RULES["fused"], put("models", 0, "loaded_from", source)))
    monkeypatch.setattr("clcnet.classifiers.classifier.load_classifier", lambda **_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError) as caught:
        policy.load_classifiers(device="cpu")
    refused_in_one_line(caught.value, "the policy")


def test_fused_answers_are_given_for_the_classes_they_were_fitted_for_alone() -> None:
    rule = Fused("max softmax", True, (Pool(np.array([1.0]), np.zeros(1)),))  # which numpy would repeat
    with pytest.raises(ValueError, match="was fitted for 1 classes, got 4"):
        rule.step([Outputs.from_logits(np.eye(4))])


# ---------------------------------------------------------------- results of others, folds

RESULTS = "model,accuracy,threshold,FLOPs,reference,same\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"model,accuracy\nx,1\n",
        b"whole,7,same",
        b"whole,x,same",
        b"whole,,same",
        b"whole," + b"9" * 400 + b",same",
        b'"a\nforged line",1,same',
        b"x," * 1_000_000,
        b"model\n" * 300_000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_results_that_are_none_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    from test_report import BOTH, COLUMNS

    frame = pd.DataFrame([BOTH], columns=list(COLUMNS))
    path = tmp_path / "results-table.csv"
    if content.endswith(b",same"):
        model, accuracy, _ = (part.strip(b'"').decode() for part in content.split(b","))
        frame = frame.astype({"accuracy": object}).assign(model=model, accuracy=accuracy)
        if accuracy == "7":
            frame = frame.assign(saving_low="text")
        frame.to_csv(path, index=False)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_results(path)
    refused_in_one_line(caught.value, str(path))


@pytest.mark.parametrize("make", NOT_FILES, ids=NOT_FILE_IDS)
@pytest.mark.parametrize("flag", ["--join", "--labels", "--class-map", "--policy"])
def test_what_is_no_file_is_refused_by_the_name_of_it(
    workshop: scripts.Workshop, tmp_path: Path, flag: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "planted")
    of = scripts.EVALUATE_FOLDS if flag == "--join" else scripts.EVALUATE_CUSTOM
    line = scripts.refusal(scripts.run(of, *workshop.command(of, tmp_path), flag, tmp_path / "planted"))
    assert "planted" in line


def test_a_class_that_is_named_as_a_number_of_model_results_stays_a_name(tmp_path: Path) -> None:
    from test_report import BOTH, COLUMNS

    frame = pd.DataFrame([BOTH], columns=list(COLUMNS)).assign(model="101", same="1")
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert read_results(tmp_path / "t.csv")[["model", "same"]].to_numpy().tolist() == [["101", "1"]]


@pytest.mark.parametrize("fold", ["0", "6", "9" * 400, "1.0", "-1", ""])
def test_a_list_of_folds_that_are_none_is_refused(
    workshop: scripts.Workshop, tmp_path: Path, fold: str, image_folder: Callable[..., Path]
) -> None:
    for number in range(1, 6):
        CLCNet(3).save(tmp_path / f"CLCNet_imagenet_split_{number}.zip")
    (tmp_path / "CLCNet_imagenet_split.csv").write_text(f"file,table,fold\na.png,1,{fold}\n")
    with pytest.raises(ValueError) as caught:
        load_fold_networks(tmp_path, list_images(workshop.images))
    refused_in_one_line(caught.value, "split.csv is not a whole list of folds")


# ---------------------------------------------------------------- labels


def labelled(folder: Path, content: str, flag: str = "labels", image: str = "1.png") -> Any:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / image).touch()
    (folder / "given.txt").write_text(content)
    return list_images(folder / "images", any_folder=True, **{flag: folder / "given.txt"})  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["labels", "class_map"])
@pytest.mark.parametrize(
    "content", ["\n" * 5_000_000, "\x85" * 5_000_000, f"1.png,{'9' * 5000}\n", "1.png " + "a" * 5000]
)
def test_texts_that_no_list_of_classes_is_like_are_refused(tmp_path: Path, flag: str, content: str) -> None:
    with pytest.raises(ValueError) as caught:
        labelled(tmp_path, content, flag)
    refused_in_one_line(caught.value, "given.txt")


def test_blanks_in_a_class_map_take_no_time(tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="more than once"):
        labelled(tmp_path, f"a{' ' * 990}b\n" * 2000, "class_map")
    assert time.perf_counter() - start < 5


def meta_mat(bomb: int = 0) -> bytes:
    sink = io.BytesIO()
    synset = {"ILSVRC2012_ID": 1, "WNID": "n00000001", "num_children": 0}
    scipy.io.savemat(sink, {"synsets": np.array([synset, synset])}, do_compression=True)
    packed = zlib.compress(bytes(bomb), 9)
    return sink.getvalue() + (np.array([15, len(packed)], "<u4").tobytes() + packed) * bool(bomb)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MATLAB 5.0",
        meta_mat()[:200],
        meta_mat()[:-20] + b"\0" * 20,
        meta_mat()[:128],
        meta_mat(2**25),
        b"x" * 2**24,
    ],
    ids=["empty", "begun", "cut", "damaged", "nothing", "bomb", "large"],
)
def test_a_development_kit_that_is_none_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "meta.mat").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        labelled(tmp_path, "1\n", image="ILSVRC2012_val_00000001.JPEG")
    refused_in_one_line(caught.value, "meta.mat")


# ---------------------------------------------------------------- memory


def peak_of_reading(path: Path) -> int:
    """Bytes that Python takes at most while it reads a file of JSON, or refuses to."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            parse_json(read_bytes(path, LARGEST_JSON))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_json_that_says_much_in_little_takes_at_most_twice_the_memory_of_an_honest_policy(tmp_path: Path) -> None:
    names = [f"a class of some name, number {number}" for number in range(21_843)]
    models = [Record(f"model {number}", class_names=names) for number in range(4)]
    pools = tuple(Pool(np.ones(count), np.random.default_rng(0).normal(size=21_843)) for count in range(1, 5))
    Policy(models, Fused("max softmax", True, pools), [0.5] * 3).save(tmp_path / "honest")
    bombs = {
        "lists": "[" + "[]," * 2_700_000 + "[]]",
        "objects": "[" + "{}," * 2_700_000 + "{}]",
        "numbers": "[" + "1.5," * 2_000_000 + "1]",
        "words": "[" + '"ab",' * 1_600_000 + "1]",
        "values": "[" + '"' + "a" * 30 + '",' + '"ab",' * 249_000 + "1]",
        "keys": "{" + ",".join(f'"{number}":1' for number in range(700_000)) + "}",
        "wide": '{"a": "' + "\U0001f600" + "a" * 8_000_000 + '"}',
    }
    peaks = {}
    for name, content in {"honest": (tmp_path / "honest").read_text(), **bombs}.items():
        (tmp_path / name).write_text(content)
        peaks[name] = peak_of_reading(tmp_path / name)
    (tmp_path / "honest").write_text((tmp_path / "honest").read_text().replace("a class", "\U0001f600", 1))
    assert peaks.pop("wide") < 2 * peak_of_reading(tmp_path / "honest"), "as an honest one in the same letters"
    assert max(peaks.values()) < 2 * peaks["honest"], peaks


# ---------------------------------------------------------------- the screen and the sheet

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj\r"


def is_harmless(text: str, keep: str = "") -> bool:
    return all(letter.isprintable() or letter in "\n\t" + keep for letter in text)


def test_nothing_that_is_printed_commands_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: object) -> dict[str, Any]:
        print(f"class {EVIL}: 3 of 5")
        print(f"\rworking on {EVIL}", file=sys.stderr)
        raise ValueError(f"{EVIL} is no class")

    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script"])
        cli.run(main, cli.ArgumentParser())
    printed = capsys.readouterr()
    assert is_harmless(printed.out) and is_harmless(printed.err, keep="\r")
    assert "class \\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202egpj\\r: 3 of 5\n" in printed.out
    assert printed.err.endswith("error: \\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202egpj is no class\n")


def test_an_unknown_flag_commands_nothing_either() -> None:
    words = [f"--{EVIL}"]
    program = f"from clcnet import cli; import sys; sys.argv[1:] = {words!r}; cli.run(dict, cli.ArgumentParser())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and is_harmless(done.stderr) and "unknown flag" in done.stderr


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such names")
def test_names_of_images_and_classes_reach_neither_screen_nor_formulas(
    workshop: scripts.Workshop, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    image = next(workshop.images.rglob("*.png")).read_bytes()
    names = ['=HYPERLINK("http:evil")', "+1", "-1", "@SUM(1)", "plain", f"{EVIL}x"]
    for name in names:
        (folder / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(image)
    (folder / "=cmd.png").touch()
    words = [*workshop.command(scripts.EVALUATE_CUSTOM, tmp_path), "--custom-data", folder]
    result = tmp_path / "custom-data-result.csv"
    for flags, mark in ([], ""), (["--spreadsheet-safe"], "'"):
        done = scripts.run(scripts.EVALUATE_CUSTOM, *words, *flags)
        assert done.code == 3 and is_harmless(done.out) and is_harmless(done.err, keep="\r"), done
        with open(result, newline="", encoding="utf-8") as file:
            files = {row["file"] for row in csv.DictReader(file)}
        assert files == {(mark if name[0] in "=+-@" else "") + f"{name}.png" for name in names}
        assert f"\n{mark}=cmd.png," in Path(f"{result}.errors.csv").read_text()
