"""Count what was tried to break the project, and what broke.

    python benchmarks/faults.py

Runs the tests of bad input and bad machines, kills each of the five stages at random points, damages files by the
thousand (benchmarks/fuzz.py), and writes benchmarks/results/faults.md.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from fuzz import fuzz  # noqa: E402
from killing import Toll, kill_and_compare  # noqa: E402
from scripts import SCRIPTS, build_workshop  # noqa: E402

CASES = ("bad_tables", "bad_weights", "bad_images", "bad_machines", "numbers", "flags")
RESULT = ROOT / "benchmarks" / "results" / "faults.md"


def run_cases(name: str) -> tuple[int, int, int]:
    """Run one file of tests; return how many passed, failed and were skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", str(ROOT / "tests" / f"test_{name}.py")]
    printed = subprocess.run([*command, "-o", "addopts="], cwd=ROOT, capture_output=True, text=True).stdout
    last = printed.strip().splitlines()[-1]
    passed, failed, skipped = (
        sum(int(count) for count in re.findall(rf"(\d+) {word}", last))
        for word in ("passed", "(?:failed|error)", "skipped")
    )
    return passed, failed, skipped


def classifier_dir(root: Path, seed: int) -> Path:
    """A tiny timm classifier saved as a user would."""
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=3)
    torch.nn.init.normal_(model.get_classifier().weight, std=10.0)
    names = ["ant", "bee", "cat"]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "num_classes": 3, "label_names": names}
    save_for_hf(model, root / str(seed), safe_serialization=True)
    return root / str(seed)


def kill_all(num_kills: int) -> dict[str, Toll]:
    """Kill every stage that often."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workshop = build_workshop(folder / "workshop", lambda seed: classifier_dir(folder / "models", seed))
        return {script: kill_and_compare(workshop, script, folder / script, num_kills) for script in SCRIPTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each stage (default: 20)")
    parser.add_argument("--files", type=int, default=10_000, help="damaged files (default: 10000)")
    args = parser.parse_args()
    start = time.perf_counter()
    lines = ["| What | Tried | Survived | Rows lost |", "| :-- | --: | --: | --: |"]
    failures = 0
    for name in CASES:
        passed, failed, skipped = run_cases(name)
        failures += failed
        note = f" ({skipped} more need another user or system)" if skipped else ""
        lines.append(f"| Cases of `tests/test_{name}.py`{note} | {passed + failed} | {passed} | 0 |")
        print(lines[-1], flush=True)
    for script, toll in kill_all(args.kills).items():
        failures += toll.lost + toll.different + toll.bad_exits
        hurt = toll.lost + toll.bad_exits
        lines.append(
            f"| Kills of `{script}.py` at random points | {toll.kills} | {toll.kills - hurt} | {toll.different} |"
        )
        print(lines[-1], flush=True)
    outcomes, broken = fuzz(args.files, 0, ROOT / "fuzz-failures")
    failures += len(broken)
    lines.append(f"| Damaged tables and weights files | {args.files} | {args.files - len(broken)} | 0 |")
    print(lines[-1])
    details = ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))
    text = "\n".join(
        [
            "Made by `python benchmarks/faults.py`.",
            "",
            *lines,
            "",
            "A case survives when it ends in the right result or in one line that names what is wrong, and nothing",
            "is lost. A kill (SIGKILL and SIGTERM in turn) survives when every output is the old file or the finished",
            "one; its last column counts outputs that differ in the end from those of a run that was never killed.",
            f"Damaged files: {details}.",
        ]
    )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text + "\n", encoding="utf-8")
    print(f"{failures} failures in {time.perf_counter() - start:.0f} s; written to {RESULT}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
