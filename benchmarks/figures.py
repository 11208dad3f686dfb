r"""Write benchmarks/RESULTS.md from what was measured, and renew what README.md quotes of it.

    python -m benchmarks.figures            # or: make figures
    python -m benchmarks.figures --check    # change nothing; exit code 1 and the lines that differ, if any

README.md quotes in two ways, which need no marks of their own:

    a line with a link to benchmarks/results/NAME.md, and the table below it: that file's table, whole
    a block of ```text that begins with `$ COMMAND`: the last lines that it printed in benchmarks/results/demo.txt, as
    many as stand there; where the block ends with `...`, the first lines

benchmarks/results/demo.txt and cifar10.txt are what `make demo` and `make cifar10` print.
"""

import argparse
import difflib
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, REPORT = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"

COLLECTED = {  # tables that the runs of the Makefile leave under data/, kept in results/
    "demo-table.md": "data/demo/results/results-table.md",
    "cifar10-table.md": "data/cifar10/results/results-table.md",
    "cifar10-comparison.md": "data/cifar10/results/comparison.md",
    "resnet-table.md": "data/cifar10/tables/results/results-table.md",
    "resnet-comparison.md": "data/cifar10/tables/results/comparison.md",
    "resnet-confidences.md": "data/cifar10/tables/results/confidences.md",
}
# file, title, and how it is made; a file without a title brings its own
SECTIONS = (
    ("front.md", "Paper's rule, max softmax and fused answers", "`python -m benchmarks.front ../shared`"),
    ("fused.md", "Fused cascades: what was to be reached, and what is", "`python -m benchmarks.fused ../shared`"),
    ("paper.md", "The paper's table", "the authors; `eval_imagenet_5fold_cv.py --reference paper` makes its form"),
    ("imagenet.md", "ImageNet's classes, seven networks, 2,300 photographs", "`make imagenet`"),
    ("imagenet-time.md", "What 50,000 images would take", "`python -m benchmarks.imagenet time`"),
    ("ablation_1000.md", "Confidences for 1,000 classes", "`python -m benchmarks.ablation_1000`"),
    ("demo-table.md", "Handwritten digits", "`make demo`"),
    ("cifar10-table.md", "CIFAR-10, two timm classifiers", "`make cifar10`"),
    ("cifar10-comparison.md", "Rules on CIFAR-10, two timm classifiers", "`make cifar10`"),
    ("resnet-table.md", "CIFAR-10, two public ResNets, from their tables alone", "`make cifar10`"),
    ("resnet-comparison.md", "Rules on CIFAR-10, two public ResNets", "`make cifar10`"),
    ("resnet-confidences.md", "Confidences on CIFAR-10, two public ResNets", "`make cifar10`"),
    ("self-cascade.md", "One network at two sizes", "`python -m benchmarks.self_cascade ../shared`"),
    ("guarantee.md", "", ""),
    ("network.md", "", ""),
    ("generate.md", "", ""),
    ("table.md", "", ""),
    ("cascade.md", "", ""),
    ("custom.md", "", ""),
    ("search.md", "", ""),
    ("schedule.md", "How busy several processes are", "`python -m benchmarks.bench_schedule`, a simulation"),
    (
        "against.md",
        "The five scripts against version 1",
        "`python -m benchmarks.against ../version-1`, a checkout of it",
    ),
    (
        "processes.md",
        "Steps 3 and 5 by two processes",
        "`python -m benchmarks.bench_processes --before ../version-1`, of the same number of threads in all",
    ),
    ("faults.md", "What was tried to break it", "`make faults`"),
    ("mutations.md", "Mutants of the modules that make figures", "`python -m benchmarks.mutate`"),
)
_QUOTED = re.compile(r"(\(benchmarks/results/([\w-]+\.md)\)[^\n]*\n\n)((?:\|[^\n]*\n)+)")
_PRINTED = re.compile(r"(```text\n\$ ([^\n]+)\n)(.*?)(```)", re.DOTALL)


def table_of(page: str) -> str:
    """The first table of a page of Markdown."""
    found = re.search(r"(?:^\|[^\n]*\n?)+", page, re.MULTILINE)
    if found is None:
        raise ValueError("no table in this page")
    return found[0].rstrip("\n") + "\n"


def output_of(command: str, log: str) -> list[str]:
    """What the first command of the log that begins like this printed."""
    for entry in re.split(r"^(?:\$ |Step 4 once more)", log, flags=re.MULTILINE)[1:]:
        if entry.startswith(command):
            return [line.rstrip() for line in entry.strip("\n").splitlines()[1:]]
    raise ValueError(f"no command in the log begins with {command!r}")


def renewed(text: str, results: Path = RESULTS) -> str:
    """The document with all that it quotes as the files have it now."""
    text = _QUOTED.sub(lambda found: found[1] + table_of((results / found[2]).read_text(encoding="utf-8")), text)

    def printed(found: re.Match[str]) -> str:
        quoted = found[3].splitlines()
        lines = output_of(found[2].removesuffix(" ..."), (results / "demo.txt").read_text(encoding="utf-8"))
        lines = [*lines[: len(quoted) - 1], "..."] if quoted[-1:] == ["..."] else lines[-len(quoted) :]
        return found[1] + "".join(f"{line}\n" for line in lines) + found[4]

    return _PRINTED.sub(printed, text)


def report() -> str:
    """All that was measured, as one page."""
    intro = "Written by `make figures` from [results/](results); [README.md](README.md) says how to read it."
    parts = [f"# Results\n\n{intro}\n"]
    for file, title, command in SECTIONS:
        if not (RESULTS / file).exists():
            continue
        content = (RESULTS / file).read_text(encoding="utf-8").strip("\n")
        head = f"## {title}\n\nMade by {command}.\n\n" if title else ""
        parts.append(head + re.sub("^# ", "## ", content) + "\n")
    return "\n".join(parts)


def collect() -> None:
    """Keep the results tables of finished runs of `make demo` and `make cifar10`."""
    for name, made in COLLECTED.items():
        if (ROOT / made).exists():
            shutil.copyfile(ROOT / made, RESULTS / name)


def main(args: argparse.Namespace) -> int:
    """Write or check the documents; 1 if a checked one differs."""
    if not args.check:
        collect()
    differs = 0
    for path, after in ((README, renewed(README.read_text(encoding="utf-8"))), (REPORT, report())):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if args.check:
            names = (str(path), f"{path}, written anew")
            sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), *names, n=0))
            differs |= before != after
        else:
            path.write_text(after, encoding="utf-8")
    return int(differs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, show what differs (default: off)")
    sys.exit(main(parser.parse_args()))
