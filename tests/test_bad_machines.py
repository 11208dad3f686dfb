"""Full disks, folders that cannot be written to, signals, dying helpers, two runs at once: for each of the scripts."""

import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import scripts
import torch
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, SCRIPTS, TRAIN_FOLDS, Workshop, contents, refusal

from clcnet import metrics
from clcnet.classifiers.classifier import Classifier
from clcnet.classifiers.decoding import ImageDataset
from clcnet.files import atomic_paths, check_output, output_lock
from clcnet.network import training

resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
ON_IMAGES = (GENERATE, EVALUATE_FOLDS, EVALUATE_CUSTOM)
OLD = b"from before"


@contextlib.contextmanager
def nothing_lost(workshop: Workshop, script: str, folder: Path) -> Iterator[None]:
    """Outputs of an earlier run stay as they are whatever happens, and afterwards the same command comes to its end."""
    for path in workshop.outputs(script, folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(OLD)
    before = contents(folder)
    yield
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if ".partial." in name], "litter"
    assert scripts.run(script, *workshop.command(script, folder)).code == 0


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """As `ulimit -f`: files cannot grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 100])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_fills_up_is_said_with_the_files_name_and_no_output_is_touched(
    workshop: Workshop, tmp_path: Path, script: str, num_bytes: int
) -> None:
    with nothing_lost(workshop, script, tmp_path):
        with largest_file(num_bytes):
            line = refusal(scripts.run(script, *workshop.command(script, tmp_path)))
        assert str(tmp_path) in line and "File too large" in line


@pytest.mark.parametrize("script", ON_IMAGES)
def test_after_a_full_disk_the_run_goes_on_where_it_was(
    workshop: Workshop, tmp_path: Path, script: str, asked: Counter[str]
) -> None:
    assert scripts.run(script, *workshop.command(script, tmp_path / "whole")).code == 0
    num_answers = asked.total()
    asked.clear()
    words = workshop.command(script, tmp_path / "hurt")
    with largest_file(600):  # two batches of eight records of 16 + 2 + 3 * 4 bytes
        assert "what is kept there counts" in refusal(scripts.run(script, *words))
    assert scripts.run(script, *words).code == 0
    assert asked.total() == num_answers + 8, "the batch that found no room is asked about again, and no other"
    for folder in ("whole", "hurt"):
        shutil.rmtree(tmp_path / folder / "store")
    assert contents(tmp_path / "hurt") == contents(tmp_path / "whole")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_without_permission_is_refused(open_workshop: Workshop, tmp_path: Path, script: str) -> None:
    scripts.run(script, *open_workshop.command(script, tmp_path))  # imports all: Python itself may lie in root's home
    root = open_workshop.root.with_name(f"locked_{script}")
    with scripts.without_root():
        root.mkdir(mode=0o500)
        for folder, words in ((root, "is not writable"), (root / "new", "cannot be made (Permission denied)")):
            line = refusal(scripts.run(script, *open_workshop.command(script, folder)))
            assert f"output folder {folder} {words}; choose another output" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_output_that_is_a_folder_is_refused_before_any_work(
    workshop: Workshop, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for output in workshop.outputs(script, tmp_path):
        output.mkdir(parents=True)
        (output / "kept").write_bytes(OLD)
        monkeypatch.setattr(ImageDataset, "read", lambda *_: pytest.fail("an image was read"))
        assert f"output {output} is a folder" in refusal(scripts.run(script, *workshop.command(script, tmp_path)))
        assert (output / "kept").read_bytes() == OLD
        (output / "kept").unlink()
        output.rmdir()


def test_a_name_that_leaves_no_room_for_its_companions_is_refused(tmp_path: Path) -> None:
    check_output(tmp_path / f"{'n' * 200}.csv")
    with pytest.raises(OSError, match="name too long"):
        check_output(tmp_path / f"{'é' * 120}.csv")


@pytest.mark.parametrize("script", SCRIPTS)
def test_of_two_runs_with_one_output_the_second_is_refused(workshop: Workshop, tmp_path: Path, script: str) -> None:
    lock_on = workshop.outputs(script, tmp_path)[-1 if script == TRAIN_FOLDS else 0]
    with nothing_lost(workshop, script, tmp_path), output_lock(lock_on):
        line = refusal(scripts.run(script, *workshop.command(script, tmp_path)))
        assert f"another run is writing {lock_on}; wait for it or choose another output" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_ends_the_work_with_one_line_and_130(
    workshop: Workshop, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, place = (ImageDataset, "read", 20) if script in ON_IMAGES else (metrics, "brier", 1)
    original, calls = getattr(owner, name), iter(range(10_000))

    def send_then_go_on(*arguments: object) -> object:
        if next(calls) == place:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with nothing_lost(workshop, script, tmp_path), monkeypatch.context() as patch:
        patch.setattr(owner, name, send_then_go_on)
        finished = scripts.run(script, *workshop.command(script, tmp_path))
        assert finished.code == 130, finished
        assert finished.last_error.startswith("interrupted: ") and "Traceback" not in finished.err
        kept = f"what was classified is kept in {tmp_path / 'store'}; the same command goes on from there"
        assert (kept in finished.last_error) == (script in ON_IMAGES)


# torch raises from its signal handler, which may strike in a destructor; Python can only note that
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("script", ON_IMAGES)
def test_decoding_processes_that_die_end_the_run_with_advice(
    workshop: Workshop, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, read = os.getpid(), ImageDataset.read

    def die(self: ImageDataset, position: int) -> object:
        if os.getpid() != here and self.path(position).endswith("bee_0010.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, position)

    with nothing_lost(workshop, script, tmp_path), monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "read", die)
        line = refusal(scripts.run(script, *workshop.command(script, tmp_path), "--workers", 1))
        assert "a process that decodes images died" in line and "--workers" in line


@pytest.mark.parametrize("script", ON_IMAGES)
def test_a_batch_that_does_not_fit_into_memory_is_halved_and_the_user_is_told(
    workshop: Workshop, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probabilities = Classifier.probabilities

    def run_out(self: Classifier, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return probabilities(self, batch)

    assert scripts.run(script, *workshop.command(script, tmp_path / "whole")).code == 0
    monkeypatch.setattr(Classifier, "probabilities", run_out)
    assert scripts.run(script, *workshop.command(script, tmp_path / "halved")).code == 0
    assert caplog.messages[:2] == [
        f"out of memory with {size} images at once: going on with {size // 2}" for size in (8, 4)
    ]
    whole, halved = (workshop.outputs(script, tmp_path / name)[0] for name in ("whole", "halved"))
    # the last bits may depend on the batch
    pd.testing.assert_frame_equal(pd.read_csv(whole), pd.read_csv(halved), check_exact=False, rtol=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_machine_without_enough_memory_is_one_line(
    workshop: Workshop, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    owner, name = (Classifier, "probabilities") if script in ON_IMAGES else (training._Run, "train_epoch")
    monkeypatch.setattr(owner, name, run_out)
    assert "memory" in refusal(scripts.run(script, *workshop.command(script, tmp_path)))


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "1.zip", tmp_path / "2.zip"]
    for path in paths:
        path.write_bytes(OLD)
    with pytest.raises(RuntimeError), atomic_paths(paths) as (first, _):
        first.write_bytes(b"new")
        assert paths[0].read_bytes() == OLD
        raise RuntimeError
    assert contents(tmp_path) == {"1.zip": OLD, "2.zip": OLD}
    with atomic_paths(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_bytes(b"new")
    assert contents(tmp_path) == {"1.zip": b"new", "2.zip": b"new"}
