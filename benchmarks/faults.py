"""Count what was tried to break the project, and what broke.

    python -m benchmarks.faults             # or: make faults

Runs the tests of bad input and bad machines, kills each of the five stages at random points, damages files by the
thousand (benchmarks/fuzz.py), and writes benchmarks/results/faults.md. Exit code 1 if anything broke; what did is
printed.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz import fuzz
from benchmarks.measured import RESULTS
from clcnet.cli import ROOT

sys.path.append(str(ROOT / "tests"))

from killing import kill_and_compare  # noqa: E402
from scripts import SCRIPTS, build_workshop, save_classifier  # noqa: E402

CASES = ("bad_tables", "bad_weights", "strangers", "bad_images", "bad_machines", "machine", "labels")
CASES += ("numbers", "flags", "properties", "soak")
KINDS = {
    "tables": ("csv", "parquet"),
    "weights files": ("zip",),
    "configurations of models": ("config.json",),
    "policies": ("policy.json",),
    "stores": ("answers",),
    "checkpoints": ("pth", "safetensors"),
}


@dataclass(frozen=True)
class Line:
    """One line of the result: how often it was tried and survived, how many rows should be there, how many are not."""

    what: str
    tried: int
    survived: int
    rows: int = 0
    rows_lost: int = 0

    def __str__(self) -> str:
        lost = f"{self.rows_lost} of {self.rows}" if self.rows else "-"
        return f"| {self.what} | {self.tried} | {self.survived} | {lost} |"


def run_cases(name: str) -> Line:
    """Run one file of tests; those that fail are printed."""
    file = f"tests/test_{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-o", "addopts=", file]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode not in (0, 1):  # neither passed nor failed: the tests could not be run
        sys.exit(f"{file} could not be run:\n{finished.stdout}{finished.stderr}")
    if finished.returncode:
        print(finished.stdout)
    last = finished.stdout.strip().splitlines()[-1]
    passed, broken, skipped = (
        sum(int(count) for count in re.findall(rf"(\d+) {word}", last))
        for word in ("passed", "(?:failed|error)", "skipped")
    )
    note = f" ({skipped} more need another system)" if skipped else ""
    return Line(f"Cases of `{file}`{note}", passed + broken, passed)


def kill_stages(num_kills: int) -> Iterator[Line]:
    """Kill every stage that often."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workshop = build_workshop(
            folder / "workshop", lambda seed: save_classifier(folder / "models" / str(seed), seed=seed)
        )
        for script in SCRIPTS:
            toll = kill_and_compare(workshop, script, folder / script, num_kills)
            hurt = toll.lost + toll.different + toll.bad_exits
            if hurt:
                print(script, toll)
            survived = max(toll.kills - hurt, 0)
            yield Line(f"Kills of `{script}.py`", toll.kills, survived, toll.rows, toll.rows_lost)


def damage_files(num_files: int) -> list[Line]:
    """Damage that many files and read them; those that break a reader are kept and named."""
    outcomes, failures = fuzz(num_files, 0, ROOT / "fuzz-failures")
    print("\n".join(failures), end="\n" if failures else "")
    lines = []
    for what, suffixes in KINDS.items():
        read, refused, failed = (
            sum(outcomes[f"{suffix} {outcome}"] for suffix in suffixes) for outcome in ("read", "refused", "failed")
        )
        kinds = f"Damaged {what}: {refused} refused by name, {read} still good"
        lines.append(Line(kinds, read + refused + failed, read + refused))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="kills of each stage (default: 10)")
    parser.add_argument("--files", type=int, default=20_000, help="damaged files of all kinds (default: 20000)")
    args = parser.parse_args()
    start = time.perf_counter()
    lines = []
    with ThreadPoolExecutor() as pool:  # the other parts run in processes of their own
        damaged = pool.submit(damage_files, args.files)
        for line in itertools.chain(map(run_cases, CASES), kill_stages(args.kills)):
            print(line, flush=True)
            lines.append(line)
        print(*damaged.result(), sep="\n")
        lines += damaged.result()
    tried, survived, rows, lost = (
        sum(getattr(line, name) for line in lines) for name in ("tried", "survived", "rows", "rows_lost")
    )
    text = f"""Made by `make faults`. Tried: {tried}. Survived: {survived}. Rows lost: {lost} of {rows}.

| What | Tried | Survived | Rows lost |
| :-- | --: | --: | --: |
{chr(10).join(map(str, lines))}

A case survives when it ends in the right result or in one line that names what is wrong, with nothing lost. Kills
(SIGKILL, every third SIGTERM) come at random points of a run; one is survived when every output is then the old file or
the finished one, and when the run, started again until it ends, leaves the bytes of a run that was never killed. The
rows of those last outputs are compared one by one.
"""
    (RESULTS / "faults.md").write_text(text, encoding="utf-8")
    print(f"{tried - survived} failures in {time.perf_counter() - start:.0f} s; written to {RESULTS / 'faults.md'}")
    sys.exit(tried != survived or lost > 0)


if __name__ == "__main__":
    main()
