r"""Copy every figure that the documents quote from benchmarks/ into README.md and benchmarks/README.md.

    python benchmarks/front_page.py            # or: make figures
    python benchmarks/front_page.py --check    # change nothing; exit code 1 and the lines that differ, if any

What stands between two marks is replaced:

    <!-- from results/table.md -->...<!-- end -->             a whole file, Markdown
    <!-- from results/demo.txt "python train" 3 -->...<!-- end -->   the output of the first command that begins so, in
                                                              a log where commands stand behind `$ `; its last 3 lines
    <!--=results/speed.json scoring.ratio .0f-->...<!--/-->   one number of a JSON file, by its keys, in a Python format
    <!--=results/demo.txt top-1\s([\d.]+)% .1f-->...<!--/-->      the first number in a log that a pattern finds

Paths are relative to benchmarks/. Where a file or a number is not there yet, the document says so.
results/demo.txt and results/cifar10.txt are what `make demo` and `make cifar10` print on stdout.
"""

import argparse
import difflib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
DOCUMENTS = (BENCHMARKS.parent / "README.md", BENCHMARKS / "README.md")

COLLECTED = {  # tables that the runs of the Makefile leave under data/, kept in results/
    "demo-table.md": "data/demo/results/results-table.md",
    "cifar10-table.md": "data/cifar10/results/results-table.md",
    "cifar10-comparison.md": "data/cifar10/results/comparison.md",
    "resnet-table.md": "data/cifar10/tables/results/results-table.md",
    "resnet-comparison.md": "data/cifar10/tables/results/comparison.md",
    "resnet-confidences.md": "data/cifar10/tables/results/confidences.md",
}
NOT_MEASURED = "not measured yet"
_BLOCK = re.compile(r"(<!-- from (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"(<!--=(\S+) (\S+) (\S+?)-->)(.*?)(<!--/-->)", re.DOTALL)


def fill(text: str) -> str:
    """The document with all figures as the files have them now."""
    text = _BLOCK.sub(lambda mark: mark[1] + block(*shlex.split(mark[2])) + mark[3], text)
    return _NUMBER.sub(lambda mark: mark[1] + number(mark[2], mark[3], mark[4]) + mark[6], text)


def block(file: str, command: str | None = None, last: str = "0") -> str:
    """A Markdown file as it is; of anything else all lines, or the last lines that one command printed, as code."""
    if not (BENCHMARKS / file).exists():
        return f"*{NOT_MEASURED}: no benchmarks/{file}*\n"
    content = (BENCHMARKS / file).read_text(encoding="utf-8").strip("\n")
    if file.endswith(".md"):
        return re.sub("^# ", "## ", content) + "\n"
    lines = content.splitlines() if command is None else output_of(command, content)
    return "\n".join(["```", *lines[-int(last) :], "```"]) + "\n"


def output_of(command: str, log: str) -> list[str]:
    """What the first command of the log that begins like this printed."""
    for entry in re.split(r"^(?:\$ |Step 4 once more)", log, flags=re.MULTILINE)[1:]:
        if entry.startswith(command):
            return [line.rstrip() for line in entry.strip("\n").splitlines()[1:]]
    raise ValueError(f"no command in the log begins with {command!r}")


def number(file: str, keys: str, style: str) -> str:
    """One number, formatted: of a JSON file by its keys, of anything else by a regular expression."""
    if not file.endswith(".json"):
        found = re.search(keys, (BENCHMARKS / file).read_text(encoding="utf-8"))
        assert found, f"{keys} is not in {file}"
        return format(float(found[1]), style)
    try:
        value = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))
        for key in keys.split("."):
            value = value[int(key) if isinstance(value, list) else key]
    except (FileNotFoundError, KeyError):
        return NOT_MEASURED
    return format(value, style)


def collect() -> None:
    """Keep the results tables of finished runs of `make demo` and `make cifar10`."""
    for name, made in COLLECTED.items():
        if (BENCHMARKS.parent / made).exists():
            shutil.copyfile(BENCHMARKS.parent / made, BENCHMARKS / "results" / name)


def main(args: argparse.Namespace) -> int:
    """Fill or check the documents; 1 if a checked one differs."""
    if not args.check:
        collect()
    differs = 0
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = fill(before)
        if args.check:
            names = (str(path), f"{path}, filled anew")
            sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), *names, n=0))
            differs |= before != after
        else:
            path.write_text(after, encoding="utf-8")
    return int(differs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, show what differs (default: off)")
    sys.exit(main(parser.parse_args()))
