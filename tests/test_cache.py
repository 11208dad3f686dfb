"""The cache of model outputs: partial entries, interruptions, broken files, and what makes an entry another."""

import os

import numpy as np
import pytest

from clcnet.data.cache import OutputCache, images_key
from clcnet.data.images import list_images

PROBS = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=np.float32)


@pytest.fixture
def images(image_folder):
    return list_images(image_folder())


def test_what_is_stored_is_there_the_next_time(images, tmp_path):
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        assert cache.missing(np.arange(15)).tolist() == list(range(15))
        cache.store(np.array([7, 2]), PROBS)
        cache.remember(flops=1.5)
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        assert cache.missing(np.array([1, 2, 7])).tolist() == [1]
        np.testing.assert_array_equal(cache.probs[[7, 2]], PROBS)
        assert cache.about == {"flops": 1.5}


def test_another_model_or_other_images_begin_an_entry_of_their_own(images, tmp_path):
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        cache.store(np.array([0, 1]), PROBS)
    with OutputCache.open(tmp_path, "other model", images, 3) as cache:
        assert not cache.done.any()
    with OutputCache.open(tmp_path, "model", images.subset(range(14)), 3) as cache:
        assert not cache.done.any()


def test_key_of_the_images_changes_with_names_sizes_and_times(images):
    keys = [images_key(images)]
    os.utime(images.paths[3], (1, 1))
    keys.append(images_key(images))
    images.paths[3].write_bytes(b"x")
    os.utime(images.paths[3], (1, 1))
    keys.append(images_key(images))
    keys.append(images_key(images.subset([1, 0])))
    keys.append(images_key(images.subset([0, 1])))
    assert len(set(keys)) == 5
    assert images_key(images.subset([0, 1])) == keys[-1]


@pytest.mark.parametrize("name", ["probs.npy", "done.npy"])
@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY broken", None])
def test_broken_entry_is_begun_anew(images, tmp_path, name, damage):
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        cache.store(np.array([0, 1]), PROBS)
        path = cache.folder / name
    if damage is None:
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_bytes(damage)
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        assert not cache.done.any()


def test_broken_facts_are_measured_again(images, tmp_path):
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        cache.remember(flops=1.5)
    (cache.folder / "about.json").write_text("{")
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        assert cache.about == {}


def test_second_run_on_the_same_entry_is_refused(images, tmp_path):
    with OutputCache.open(tmp_path, "model", images, 3):
        with pytest.raises(OSError, match="another run"):
            with OutputCache.open(tmp_path, "model", images, 3):
                pass


def test_an_array_that_is_a_link_is_begun_anew_and_its_target_stays(images, tmp_path):
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        path = cache.folder / "probs.npy"
    victim = path.rename(tmp_path / "victim.npy")
    before = victim.read_bytes()
    path.symlink_to(victim)
    with OutputCache.open(tmp_path, "model", images, 3) as cache:
        cache.store(np.array([0, 1]), PROBS)
    assert victim.read_bytes() == before and not path.is_symlink()
