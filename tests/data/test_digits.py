import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from greenprune.config import DataConfig, UserError
from greenprune.data import open_data
from greenprune.data.image_data import hold_out, split_off
from greenprune.data.readers import DIGITS_TEST_SHARE, _digits_table, read_digits


def open_digits(seed=0, **fields):
    return open_data(DataConfig(name="digits", **fields), None, seed)


def all_images(batches):
    return torch.cat([images for images, _ in batches])


def test_describes_itself():
    data = open_digits(batch_size=100)
    assert (data.name, data.classes, data.channels, data.image_size) == ("digits", 10, 1, 8)
    assert data.train_samples + data.eval_samples == 1797
    assert abs(data.eval_samples - 1797 / 5) <= 5
    assert data.steps_per_epoch == data.train_samples // 100
    assert data.accuracy_kind == "test"


def test_batches_have_shape_type_and_range():
    data = open_digits(batch_size=100)
    batches = list(data.train_batches(0))
    assert len(batches) == data.steps_per_epoch
    for images, labels in batches:
        assert images.shape == (100, 1, 8, 8)
        assert images.dtype == torch.float32
        assert labels.shape == (100,)
        assert labels.dtype == torch.int64
        assert labels.min() >= 0
        assert labels.max() <= 9


def test_plain_training_images_are_normalised():
    data = open_digits(batch_size=1, augment=False)
    images = all_images(data.train_batches(0))
    assert abs(images.mean().item()) < 1e-5
    assert abs(images.std(correction=0).item() - 1) < 1e-5


def test_split_does_not_depend_on_the_seed_and_is_disjoint():
    first, second = open_digits(seed=1), open_digits(seed=2)
    assert torch.equal(all_images(first.eval_batches()), all_images(second.eval_batches()))
    rows = {
        name: {image.numpy().tobytes() for image in all_images(batches)}
        for name, batches in (
            ("train", open_digits(batch_size=1, augment=False).train_batches(0)),
            ("test", first.eval_batches()),
        )
    }
    assert rows["train"].isdisjoint(rows["test"])


def test_validation_is_held_out_of_the_training_set():
    dense = open_digits(batch_size=1, augment=False)
    data = open_digits(batch_size=1, augment=False, validation=0.25)
    assert data.accuracy_kind == "validation"
    assert data.train_samples + data.eval_samples == dense.train_samples
    assert abs(data.eval_samples / dense.train_samples - 0.25) < 0.01
    counts = torch.cat([labels for _, labels in data.eval_batches()]).bincount(minlength=10)
    assert counts.max() - counts.min() <= 3


def test_its_digest_tells_it_from_its_parts():
    known = open_digits().digest
    assert open_digits(seed=1).digest == known
    assert open_digits(validation=0.1).digest != known


def test_split_off_is_a_stratified_partition():
    labels = torch.tensor([0] * 10 + [1] * 20 + [3])
    kept, held = split_off(labels, 0.3)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(31))
    assert labels[held].bincount(minlength=4).tolist() == [3, 6, 0, 0]
    assert kept.tolist() == sorted(kept.tolist())
    assert held.tolist() != [0, 1, 2, 10, 11, 12, 13, 14, 15]
    assert torch.equal(held, split_off(labels, 0.3)[1])


def test_split_off_never_takes_a_whole_class():
    kept, _ = split_off(torch.tensor([0, 1, 1, 2]), 0.99)
    assert torch.tensor([0, 1, 1, 2])[kept].unique().tolist() == [0, 1, 2]


def test_validation_too_small_to_hold_anything_out():
    with pytest.raises(UserError, match=r"data\.validation: 0\.0001 .* none of 4 training samples"):
        hold_out(torch.tensor([0, 0, 1, 1]), 0.0001)


def test_digits_are_those_of_scikit_learn_without_importing_it():
    code = "import pathlib, sys; from greenprune.data.readers import read_digits; read_digits(pathlib.Path(), True)"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('scipy' in sys.modules)"], check=True)
    theirs = load_digits()
    labels = torch.from_numpy(theirs.target)
    for train, chosen in zip((True, False), split_off(labels, DIGITS_TEST_SHARE), strict=True):
        images, found = read_digits(Path(), train)
        assert torch.equal(images.squeeze(1).double(), torch.from_numpy(theirs.images)[chosen])
        assert torch.equal(found, labels[chosen])


def test_digits_without_scikit_learn_are_refused(monkeypatch):
    _digits_table.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^data.name: 'digits' is not valid here; it comes with scikit-learn"):
        read_digits(Path(), True)
