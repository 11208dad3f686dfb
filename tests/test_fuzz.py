"""A sample of what `benchmarks/fuzz.py` does ten thousand times: damaged files are read or refused, never more."""

import random
from pathlib import Path

from benchmarks import fuzz


def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    outcomes, failures = fuzz.fuzz(800, 1000, tmp_path)
    assert failures == []
    assert sum(outcomes.values()) == 800
    for suffix in fuzz.READERS:
        assert outcomes[f"{suffix} refused"] > 0 < outcomes[f"{suffix} read"], "damage should show, and spare some"


def test_samples_are_whole_and_their_damage_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    path = tmp_path / "model" / "whole"
    path.parent.mkdir()
    for suffix, contents in fuzz.make_samples(tmp_path).items():
        for content in contents:
            path.with_suffix(f".{suffix}").write_bytes(content)
            fuzz.READERS[suffix](path.with_suffix(f".{suffix}"))
        changed = [fuzz.damage(contents[0], random.Random(seed)) for seed in range(50)]
        assert changed == [fuzz.damage(contents[0], random.Random(seed)) for seed in range(50)]
        assert sum(content != contents[0] for content in changed) > 30, suffix
