"""A sample of what `benchmarks/fuzz.py` does ten thousand times: damaged files are read or refused, never more."""

import importlib.util
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
assert _spec is not None and _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)


@pytest.mark.parametrize("seed", [1000, 1001])
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, seed: int) -> None:
    outcomes, failures = fuzz.fuzz(400, seed, tmp_path)
    assert failures == []
    assert sum(outcomes.values()) == 400
    for suffix in fuzz.READERS:
        assert outcomes[f"{suffix} refused"] > 0 < outcomes[f"{suffix} read"], "damage should show, and spare some"


def test_damage_is_the_same_for_the_same_seed_and_is_damage(tmp_path: Path) -> None:
    samples = fuzz.make_samples(tmp_path)
    for suffix, contents in samples.items():
        changed = [fuzz.damage(contents[0], random.Random(seed)) for seed in range(50)]
        assert changed == [fuzz.damage(contents[0], random.Random(seed)) for seed in range(50)]
        assert sum(content != contents[0] for content in changed) > 30, suffix


def test_whole_samples_are_read(tmp_path: Path) -> None:
    for suffix, contents in fuzz.make_samples(tmp_path).items():
        for content in contents:
            path = tmp_path / "model" / f"whole.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            fuzz.READERS[suffix](path)
