"""Small sets on disk: what is read, and what is said when files are missing or broken."""

import pytest
import torch
import torchvision

from greenprune.config import DataConfig, UserError
from greenprune.data import DATASETS, open_data

ON_DISK = [name for name in DATASETS if name != "digits"]


def opened(name, root, **fields):
    return open_data(DataConfig(name=name, batch_size=10, **fields), root and str(root), 0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach the network ends in an error with a telling text."""

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_unknown_name():
    with pytest.raises(UserError, match=r"data\.name: 'cifar_10' is not valid; did you mean cifar10\? .* digits"):
        opened("cifar_10", None)
    with pytest.raises(UserError, match=r"data\.name: 'zzz' is not valid; expected one of digits, .*image_folder"):
        opened("zzz", None)


@pytest.mark.parametrize("name", ON_DISK)
def test_root_unset(name):
    with pytest.raises(UserError, match=rf"data\.root: None .* {name} .* GREENPRUNE_DATA") as caught:
        opened(name, None, download=True)
    assert ("data.download=true" in str(caught.value)) == (name not in ("tiny_imagenet", "image_folder"))


@pytest.mark.parametrize("name", ON_DISK)
def test_files_missing(name, tmp_path):
    with pytest.raises(UserError, match=r"data\.root: .*there is no '.*'; expected ") as caught:
        opened(name, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_download_that_fails(name, tmp_path):
    with pytest.raises(UserError, match=rf"data\.download: True .* {name} cannot be fetched") as caught:
        opened(name, tmp_path, download=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_miniature(name, classes, request):
    root = request.getfixturevalue(f"{name}_root")
    data = opened(name, root, augment=False, download=True)  # nothing is missing: nothing is fetched
    samples = (100, 37) if name == "cifar10" else (200, 100)
    assert (data.train_samples, data.eval_samples) == samples
    assert (data.classes, data.channels, data.image_size) == (classes, 3, 32)
    reader = getattr(torchvision.datasets, name.upper())(root, train=False)
    images, labels = next(data.eval_batches())
    assert labels.tolist() == reader.targets
    restored = images * data._std + data._mean
    expected = torch.from_numpy(reader.data).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_cifar_truncated(cifar10_root, file):
    path = cifar10_root / "cifar-10-batches-py" / file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"data\.root: '.*{file}' is truncated or corrupt \(its MD5"):
        opened("cifar10", cifar10_root)


def test_cifar_file_missing(cifar10_root):
    (cifar10_root / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"there is no '.*data_batch_4'; expected .*test_batch.*data\.download=true"):
        opened("cifar10", cifar10_root)


def test_fashion_mnist_miniature(fashion_root):
    data = opened("fashion_mnist", fashion_root)
    assert (data.train_samples, data.eval_samples) == (60, 20)
    assert (data.classes, data.channels, data.image_size) == (10, 1, 28)
    images, _labels = next(data.train_batches(0))
    assert images.shape == (10, 1, 28, 28)
    assert not data._flips
    assert torch.cat([labels for _, labels in data.eval_batches()]).tolist() == [n % 10 for n in range(20)]


@pytest.mark.parametrize("file", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
@pytest.mark.parametrize("length", [-1, 10, 0])
def test_fashion_mnist_truncated(fashion_root, file, length):
    path = fashion_root / "FashionMNIST" / "raw" / f"{file}-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=rf"data\.root: '.*{file}-ubyte' is truncated or corrupt"):
        opened("fashion_mnist", fashion_root)


def test_fashion_mnist_with_foreign_labels(fashion_root):
    path = fashion_root / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([200]))
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte' is truncated or corrupt \(60 labels up to 200"):
        opened("fashion_mnist", fashion_root)


@pytest.mark.parametrize(("name", "train", "test"), [("cifar10", 50000, 10000), ("fashion_mnist", 60000, 10000)])
def test_published_files(real_root, name, train, test):
    data = open_data(DataConfig(name=name, batch_size=5000, augment=False), real_root, 0)
    assert (data.train_samples, data.eval_samples) == (train, test)
    images, labels = (torch.cat(parts) for parts in zip(*data.train_batches(0), strict=True))
    assert labels.bincount().tolist() == [train // 10] * 10
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
