"""The documents keep their promises: commands run, snippets run, figures come from files, links lead somewhere."""

import importlib
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from benchmarks import figures
from clcnet import cli
from clcnet.report import plots

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [path for pattern in ("*.md", "[!.]*/*.md") for path in sorted(ROOT.glob(pattern))]

# What stands in for the models, which cannot be downloaded here: tiny ones over the same number of classes.
STAND_INS = {
    "tf_efficientnet_b0.aa_in1k": "local-dir:shallow",
    "tf_efficientnet_b4.aa_in1k": "local-dir:deep",
    "tf_efficientnet_b7.ra_in1k": "local-dir:deepest",
    "resnet18": "test_resnet",
    "resnet50": "test_resnet",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of every command line in the README, in order."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parser_of(script: str) -> cli.ArgumentParser:
    return importlib.import_module(script.removesuffix(".py")).get_args_parser()


def test_every_command_is_a_script_a_make_target_or_the_installation_and_all_five_scripts_are_shown() -> None:
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = set()
    for words in commands():
        if words[0] == "make":
            assert set(words[1:]) <= targets, words
        elif words[0] == "torchrun":
            assert words[1] == "--nproc-per-node" and words[2].isdigit(), words
            parser_of(words[3]).parse_args(words[4:])
        elif words[0] == "pip":
            assert words[1:] == ["install", "-r", "requirements.txt"]
        elif words[1] == "-m":
            parser_of(words[2]).parse_args(words[3:])
        else:
            assert words[0] == "python", words
            shown.add(words[1])
    assert shown == {path.name for path in ROOT.glob("*.py")}


@pytest.fixture
def house(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image_folder: Callable[..., Path],
    classifier_dir: Callable[..., Path],
) -> Path:
    """A folder that stands for the repository of a user with images and three models, seen from inside."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("ROOT", "."), ("DATA_DIR", "data"), ("WEIGHTS_DIR", "weights")):
        monkeypatch.setattr(cli, name, tmp_path / folder)
    monkeypatch.setattr(cli, "IMAGENET_SPLITS", tmp_path / "data" / "imagenet_splits_5")
    image_folder("data/imagenet_splits_5", images_per_class=20, five_parts=True)
    image_folder("photos", images_per_class=20, seed=1)
    for seed, name in enumerate(("shallow", "deep", "deepest")):
        shutil.copytree(classifier_dir(seed=seed), tmp_path / name)
    for name in ("my_resnet18.pth", "my_resnet50.pth"):
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / name)
    run("generate_data_for_CLCNet.py", "--output", "data/effb4_output_ds_for_CLCNet.csv", "--model", "local-dir:deep")
    return tmp_path


def run(script: str, *words: str) -> None:
    importlib.import_module(script.removesuffix(".py")).main(parser_of(script).parse_args(words))


def stand_in(word: str) -> str:
    """The word for the tiny models: another model's name, or that of its table."""
    for name, tiny in STAND_INS.items():
        word = word.replace(f"{name}_output", f"{tiny.removeprefix('local-dir:')}_output")
    return STAND_INS.get(word, word)


def test_every_command_runs_in_the_order_of_the_readme_and_then_the_snippet_of_python(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiny models in place of the large ones, three classes in place of a thousand, few epochs and no plots."""
    monkeypatch.setattr(plots, "save", lambda *_: [])
    for words in (words[1:] for words in commands() if words[0] == "python" and words[1] != "-m"):
        words = [stand_in(word) for word in words]
        if words[0].startswith("train"):
            words += ["--max-epochs", "2"]
        run(*words)
    made = ("performance-result.csv", "custom-data-result.csv", "small.parquet", "results/results-table.md")
    for name in (*made, "weights/cascade.json", "weights/results/report.html"):
        assert (house / name).is_file(), name
    for name in ("cat.jpg", "dog.jpg"):
        Image.effect_noise((40, 30), 80).convert("RGB").save(name)
    (snippet,) = blocks("python")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert len(names["found"].names) == len(names["found"].answered_by) == 2
    assert names["confidence"].shape == (60,)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not re.match(r"https?://|#", target):
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_links_within_the_readme_lead_to_headings() -> None:
    headings = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_what_the_documents_quote_is_what_was_measured() -> None:
    assert figures.renewed(README) == README, "README.md differs from benchmarks/results/: run make figures"
    assert figures.report() == figures.REPORT.read_text(encoding="utf-8"), "benchmarks/RESULTS.md: run make figures"


def test_every_page_of_results_stands_in_the_report() -> None:
    pages = {path.name for path in figures.RESULTS.glob("*.md")}
    assert pages - {file for file, *_ in figures.SECTIONS} <= {"ablation.md"}  # which network.md holds


def test_tables_and_printed_lines_are_quoted_whole(tmp_path: Path) -> None:
    (tmp_path / "demo.txt").write_text("$ python a.py --x 1\none\ntwo\nthree\n\n$ python b.py\nfour\n")
    (tmp_path / "page.md").write_text("# Title\n\n| new | table |\n|---|---|\n| 1 | 2 |\n\ntext\n")
    last = "```text\n$ python a.py ...\nold\nold\n```\n"
    first = "```text\n$ python a.py ...\nold\n...\n```\n"
    table = "[page](benchmarks/results/page.md):\n\n| old |\n|---|\n\nafter\n"
    assert figures.renewed(last + first + table, tmp_path) == (
        "```text\n$ python a.py ...\ntwo\nthree\n```\n"
        "```text\n$ python a.py ...\none\n...\n```\n"
        "[page](benchmarks/results/page.md):\n\n| new | table |\n|---|---|\n| 1 | 2 |\n\nafter\n"
    )
