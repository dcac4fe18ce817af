"""Sets of image files, with and without loader processes."""

import gc
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from greenprune.config import DataConfig, UserError
from greenprune.data import open_data
from greenprune.data.folders import IMAGENET_MEAN, IMAGENET_STD
from greenprune.data.image_data import per_channel

# From Python 3.12 on, forking loader processes beside threads warns; PyTorch's loader does it all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(params=["image_folder", "tiny_imagenet"])
def opened(request, folder_root, tiny_root):
    """Opens one set or the other with the given fields of the config."""
    root = folder_root if request.param == "image_folder" else tiny_root
    defaults = {"name": request.param, "batch_size": 4, "image_size": 32, "workers": 0}
    return lambda seed=0, **fields: open_data(DataConfig(**{**defaults, **fields}), str(root), seed)


def same(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(left, right, strict=True)
    )


def test_describes_itself(opened):
    data = opened(image_size=None)
    expected = {"image_folder": (2, 224, 20, 10), "tiny_imagenet": (3, 64, 12, 9)}[data.name]
    assert (data.classes, data.image_size, data.train_samples, data.eval_samples) == expected
    assert (data.channels, data.accuracy_kind, data.steps_per_epoch) == (3, "test", expected[2] // 4)
    for images, labels in (next(data.train_batches(0)), next(data.eval_batches())):
        assert images.shape == (len(labels), 3, expected[1], expected[1])
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "train" / "n01").rename(root / "train" / "n00"),
        lambda root: (root / "train" / "n01" / "n01_0.JPEG").rename(root / "train" / "n01" / "other.JPEG"),
        lambda root: next((root / "val" / "n02").iterdir()).unlink(),
    ],
)
def test_a_folder_is_known_by_its_files_wherever_it_lies(folder_root, tmp_path, monkeypatch, change):
    def digest(root):
        return open_data(DataConfig(name="image_folder", batch_size=4, image_size=32), root, 0).digest

    shutil.copytree(folder_root, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "val" / "n01")  # or n01 of train could not change its name
    shutil.copytree(tmp_path / "copy", tmp_path / "again" / "copy")
    known = digest(str(tmp_path / "copy"))
    monkeypatch.chdir(tmp_path / "again" / "copy")
    assert digest(".") == known
    change(tmp_path / "copy")
    assert digest(str(tmp_path / "copy")) != known


def test_loader_processes_change_nothing(opened):
    alone, helped = opened(), opened(workers=2)
    before = torch.get_rng_state()
    for epoch in (0, 1):  # the second epoch meets processes that have read the first
        assert same(alone.train_batches(epoch), helped.train_batches(epoch))
        assert same(alone.eval_batches(), helped.eval_batches())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_side_by_side_make_the_global_batch(opened, workers):
    data = opened(workers=workers)
    streams = [data.train_batches(1, rank=rank, world_size=2) for rank in range(2)]
    for (left, right), whole in zip(zip(*streams, strict=True), opened().train_batches(1), strict=True):
        assert torch.equal(torch.cat([left[0], right[0]]), whole[0])
        assert torch.equal(torch.cat([left[1], right[1]]), whole[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_resumes_after_an_epoch_left_in_the_middle(opened, workers):
    data = opened(workers=workers)
    left = data.train_batches(0)
    next(left)
    left.close()
    assert same(data.train_batches(0, first=1), list(opened().train_batches(0))[1:])


@pytest.mark.parametrize("leave", ["in the middle", "broken image"])
def test_is_freed_at_once(folder_root, tmp_path, leave):
    """Left to the cycle collector, loader processes would keep the run waiting for seconds."""
    shutil.copytree(folder_root, tmp_path / "copy")
    if leave == "broken image":
        (tmp_path / "copy" / "train" / "n01" / "n01_0.JPEG").write_bytes(b"")
    config = DataConfig(name="image_folder", batch_size=5, image_size=32, workers=1, augment=False)
    data = open_data(config, str(tmp_path / "copy"), 0)
    gone = weakref.ref(data)
    gc.disable()
    try:
        if leave == "in the middle":
            next(data.train_batches(0))
        else:
            with pytest.raises(UserError):
                list(data.train_batches(0))
        del data
        assert gone() is None
    finally:
        gc.enable()


def test_epochs_seeds_and_augmentation_differ(opened):
    def first(**fields):
        return next(opened(**fields).train_batches(0))[0]

    assert not torch.equal(first(), next(opened().train_batches(1))[0])
    assert not torch.equal(first(), first(seed=1))
    assert not torch.equal(first(), first(augment=False))


def test_evaluation_covers_each_sample_once_as_it_is(opened):
    data = opened(eval_batch_size=4)
    whole = list(opened().eval_batches())
    assert len(whole) == 1
    for world_size in (1, 2, 3):
        batches = [b for rank in range(world_size) for b in data.eval_batches(rank=rank, world_size=world_size)]
        assert torch.equal(torch.cat([images for images, _ in batches]), whole[0][0])
        assert torch.equal(torch.cat([labels for _, labels in batches]), whole[0][1])


def test_validation_comes_from_the_training_files(opened):
    data, dense = opened(validation=0.25, batch_size=1, augment=False), opened()
    assert data.accuracy_kind == "validation"
    assert data.train_samples + data.eval_samples == dense.train_samples
    parts = [
        {image.numpy().tobytes() for batch in s for image in batch[0]}
        for s in (data.train_batches(0), data.eval_batches())
    ]
    assert parts[0].isdisjoint(parts[1])


def test_channels_last(opened):
    data = opened().to("cpu", channels_last=True)
    assert next(data.eval_batches())[0].is_contiguous(memory_format=torch.channels_last)
    assert same(data.train_batches(0), opened().train_batches(0))


def test_tiny_imagenet_labels_follow_wnids(tiny_root):
    data = open_data(DataConfig(name="tiny_imagenet", batch_size=4, workers=0), str(tiny_root), 0)
    images, labels = next(data.eval_batches())
    assert labels.tolist() == [0, 1, 2] * 3
    path = tiny_root / "tiny-imagenet-200" / "val" / "images" / "val_4.JPEG"
    with Image.open(path) as file:
        pixels = torch.tensor(list(file.convert("RGB").tobytes())).view(64, 64, 3).permute(2, 0, 1)
    expected = (pixels / 255 - per_channel(IMAGENET_MEAN)) / per_channel(IMAGENET_STD)
    torch.testing.assert_close(images[4:5], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
def test_broken_image(folder_root, tmp_path, workers, part):
    root = tmp_path / "copy"
    shutil.copytree(folder_root, root)
    path = root / part / "n02" / "n02_1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    data = open_data(DataConfig(name="image_folder", batch_size=20, image_size=32, workers=workers), str(root), 0)
    one_line = r"^data\.root: '.*n02_1.JPEG' is truncated, corrupt or missing \(.*\); expected an image\Z"
    with pytest.raises(UserError, match=one_line):
        list(data.train_batches(0) if part == "train" else data.eval_batches())


def evaluated(root, image, form):
    """What comes of one image in a set by itself, written in a form."""
    for part in ("train", "val"):
        (root / part / "n00").mkdir(parents=True)
        image.save(root / part / "n00" / "it.png", format=form)
    config = DataConfig(name="image_folder", batch_size=1, image_size=32, workers=0, augment=False)
    ((images, _),) = open_data(config, str(root), 0).eval_batches()
    return images


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, form):
    grey = np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(64, 64)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    expected = evaluated(tmp_path / "8", Image.fromarray(grey), form)
    torch.testing.assert_close(evaluated(tmp_path / "16", deep, form), expected, rtol=0, atol=0)


def test_a_deep_pgm_is_scaled_as_well(tmp_path):
    deep = np.arange(0, 65536, 16, dtype=">u2").reshape(64, 64)
    expected = evaluated(tmp_path / "tiff", Image.fromarray(deep.astype(np.uint16)), "TIFF")
    evaluated(tmp_path / "pgm", Image.new("L", (1, 1)), "PNG")
    (tmp_path / "pgm" / "val" / "n00" / "it.png").write_bytes(b"P5\n64 64\n65535\n" + deep.tobytes())
    config = DataConfig(name="image_folder", batch_size=1, image_size=32, workers=0)
    ((images, _),) = open_data(config, str(tmp_path / "pgm"), 0).eval_batches()
    torch.testing.assert_close(images, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_an_image_that_fills_the_memory_once_resized_is_refused(tmp_path, size):
    one_line = r"^data\.root: '.*it.png' is .* \(of \d+ x \d+ pixels, resized to 37 on .*\); expected an image\Z"
    with pytest.raises(UserError, match=one_line):
        evaluated(tmp_path, Image.new("L", size), "PNG")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_refused(tmp_path, mode):
    one_line = rf"^data\.root: '.*it.png' is .* \(its pixels are of mode '{mode}', .*\); expected an image\Z"
    with pytest.raises(UserError, match=one_line):
        evaluated(tmp_path, Image.new(mode, (40, 40), 7), "TIFF")


def test_what_is_hidden_is_neither_a_class_nor_an_image(folder_root, tmp_path):
    shutil.copytree(folder_root, tmp_path / "copy")
    for part in ("train", "val"):
        (tmp_path / "copy" / part / ".ipynb_checkpoints").mkdir()
        (tmp_path / "copy" / part / "n01" / "._n01_0.JPEG").write_bytes(b"\0\5\x16\7")
    config = DataConfig(name="image_folder", batch_size=4, image_size=32, workers=0)
    plain, with_hidden = (open_data(config, str(root), 0) for root in (folder_root, tmp_path / "copy"))
    assert (with_hidden.classes, with_hidden.digest) == (plain.classes, plain.digest)
    assert same(with_hidden.train_batches(0), plain.train_batches(0))
    assert same(with_hidden.eval_batches(), plain.eval_batches())


def change_image_folder(root, change):
    if change == "no val":
        shutil.rmtree(root / "val")
    elif change == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
    elif change == "empty class":
        (root / "train" / "n00").mkdir()
    else:
        (root / "val" / "n02").rename(root / "val" / "n03")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no val", r"there is no '.*val'; expected train/<class>"),
        ("no classes", r"'.*train' holds no class folders; expected"),
        ("empty class", r"'.*train/n00' holds no images \(\.jpg, .*\); expected"),
        ("unknown class", r"'.*val/n03' is not a class of '.*train'"),
    ],
)
def test_image_folder_layout(folder_root, tmp_path, change, message):
    root = tmp_path / "copy"
    shutil.copytree(folder_root, root)
    change_image_folder(root, change)
    with pytest.raises(UserError, match=r"data\.root: " + message):
        open_data(DataConfig(name="image_folder", batch_size=4), str(root), 0)


def change_tiny_imagenet(base, change):
    if change == "no wnids":
        (base / "wnids.txt").unlink()
    elif change == "no class":
        shutil.rmtree(base / "train" / "n20")
    elif change == "no image":
        (base / "val" / "images" / "val_3.JPEG").unlink()
    elif change == "class twice":
        (base / "wnids.txt").write_text("n30\nn10\nn20\nn10\n")
    else:
        path = base / "val" / "val_annotations.txt"
        lines = path.read_text().splitlines(keepends=True)
        kept = {"cut annotations": [path.read_text()[:30]], "fewer annotations": lines[:4], "no annotations": []}
        path.write_text("".join(kept.get(change, [*lines[:-1], lines[0]])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no wnids", r"there is no '.*wnids\.txt'; expected .*cannot be downloaded with data\.download"),
        ("no class", r"there is no '.*train/n20/images'; expected"),
        ("no image", r"there is no '.*val/images/val_3\.JPEG'; expected"),
        ("class twice", r"'.*wnids\.txt' is truncated or corrupt \(it names a class twice\); expected"),
        ("fewer annotations", r"'.*val_annotations\.txt' is truncated or corrupt \(4 lines name 4 of 9 images\)"),
        ("no annotations", r"'.*val_annotations\.txt' is truncated or corrupt \(0 lines name 0 of 9 images\)"),
        ("image twice", r"'.*val_annotations\.txt' is truncated or corrupt \(9 lines name 8 of 9 images\)"),
        ("cut annotations", r"line 2 of '.*val_annotations\.txt' is truncated or corrupt; expected"),
    ],
)
def test_tiny_imagenet_layout(tiny_root, tmp_path, change, message):
    root = tmp_path / "copy"
    shutil.copytree(tiny_root, root)
    change_tiny_imagenet(root / "tiny-imagenet-200", change)
    with pytest.raises(UserError, match=r"data\.root: " + message):
        open_data(DataConfig(name="tiny_imagenet", batch_size=4), str(root), 0)
