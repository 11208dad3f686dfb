"""The store of answers: what is there the next time, what a killed run leaves, what is not trusted."""

import numpy as np
import pytest

from clcnet.data.store import READ, UNREADABLE, Store

KEYS = np.array([bytes([number]) * 16 for number in (1, 2, 3)], "S16")
PROBS = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1, 0, 0]], np.float32)
ALL_READ = np.full(3, READ, np.uint8)


def keep(folder, keys=KEYS, status=ALL_READ, probs=PROBS):
    store = Store(folder, "model", 3)
    places = store.append(keys, status, probs)
    store.close()
    return places


def test_what_is_kept_is_there_the_next_time_by_image_in_any_order(tmp_path):
    keep(tmp_path)
    store = Store(tmp_path, "model", 3)
    places, status = store.find(np.array([KEYS[2], b"another image...", KEYS[0]], "S16"))
    assert (places >= 0).tolist() == [True, False, True] and status.tolist() == [READ, -1, READ]
    np.testing.assert_array_equal(store.probs(places[[0, 2]]), PROBS[[2, 0]])


def test_what_was_just_kept_can_be_read_back_in_the_same_run(tmp_path):
    store = Store(tmp_path, "model", 3)
    store.append(KEYS[:1], ALL_READ[:1], PROBS[:1])
    places = store.append(KEYS[1:], ALL_READ[1:], PROBS[1:])
    np.testing.assert_array_equal(store.probs(places), PROBS[1:])
    assert store.find(KEYS)[0].tolist() == [0, 1, 2]


def test_another_model_knows_nothing(tmp_path):
    keep(tmp_path)
    assert Store(tmp_path, "other model", 3).find(KEYS)[0].tolist() == [-1, -1, -1]


def test_an_image_that_could_not_be_read_is_told_apart_and_an_answer_found_later_counts(tmp_path):
    keep(tmp_path, status=np.array([READ + 3, UNREADABLE, UNREADABLE], np.uint8))
    keep(tmp_path, KEYS[1:2], ALL_READ[:1], PROBS[1:2])
    store = Store(tmp_path, "model", 3)
    places, found = store.find(KEYS)
    assert (places >= 0).tolist() == [True, True, False] and found.tolist() == [READ + 3, READ, UNREADABLE]
    np.testing.assert_array_equal(store.probs(places[:2]), PROBS[:2])


@pytest.mark.parametrize("missing_bytes", range(1, 61))
def test_a_batch_that_a_kill_cut_short_is_as_if_it_had_never_been(tmp_path, missing_bytes):
    store = Store(tmp_path, "model", 3)
    store.append(KEYS[:1], ALL_READ[:1], PROBS[:1])
    store.append(KEYS[1:], ALL_READ[1:], PROBS[1:])  # two records of 16 + 2 + 3 * 4 bytes
    store.close()
    (segment,) = store.folder.glob("*.answers")
    segment.write_bytes(segment.read_bytes()[:-missing_bytes])
    assert Store(tmp_path, "model", 3).find(KEYS)[0].tolist() == [0, -1, -1]


def test_runs_side_by_side_keep_apart_what_they_add(tmp_path):
    one, other = Store(tmp_path, "model", 3), Store(tmp_path, "model", 3)
    one.append(KEYS[:1], ALL_READ[:1], PROBS[:1])
    other.append(KEYS[1:], ALL_READ[1:], PROBS[1:])
    assert (Store(tmp_path, "model", 3).find(KEYS)[0] >= 0).all()


@pytest.mark.parametrize("row", [[np.nan, 0.5, 0.5], [7, 0, 0], [-1, 1, 1], [0.2, 0.2, 0.2]])
def test_what_are_no_probabilities_is_refused_with_the_folder_to_delete(tmp_path, row):
    keep(tmp_path, probs=np.array([row, *PROBS[1:]], np.float32))
    store = Store(tmp_path, "model", 3)
    np.testing.assert_array_equal(store.probs(np.array([1, 2])), PROBS[1:])
    with pytest.raises(ValueError, match=rf"{store.folder} .* delete this folder"):
        store.probs(np.array([0]))


def test_facts_are_kept_and_broken_ones_are_forgotten(tmp_path):
    store = Store(tmp_path, "model", 3)
    store.remember(flops=1.5)
    assert Store(tmp_path, "model", 3).about == {"flops": 1.5}
    (store.folder / "about.json").write_text("{")
    assert Store(tmp_path, "model", 3).about == {}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/model.*cannot be written.*--store"):
        Store(tmp_path / "file", "model", 3).append(KEYS, ALL_READ, PROBS)
