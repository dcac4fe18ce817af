"""What holds for the batches of every set: order, augmentation, slices; on sets held in memory."""

import pytest
import torch

from greenprune.config import DataConfig, UserError
from greenprune.data import open_data


@pytest.fixture(params=["digits", "cifar10"])
def opened(request):
    """Opens one set or the other with the given fields of the config."""
    root = str(request.getfixturevalue("cifar10_root")) if request.param == "cifar10" else None
    return lambda seed=0, **fields: open_data(DataConfig(name=request.param, **fields), root, seed)


def same(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(left, right, strict=True)
    )


def gathered(streams):
    """The global batches that the ranks' slices make together."""
    return [tuple(torch.cat(parts) for parts in zip(*slices, strict=True)) for slices in zip(*streams, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_slices_of_the_ranks_are_the_global_batch(opened, world_size):
    data = opened(batch_size=24)
    streams = [data.train_batches(3, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert same(gathered(streams), data.train_batches(3))


def test_two_objects_agree(opened):
    assert same(opened(seed=5, batch_size=24).train_batches(1), opened(seed=5, batch_size=24).train_batches(1))


def test_resumes_in_the_middle_of_an_epoch(opened):
    data = opened(batch_size=12)
    whole = list(data.train_batches(2))
    assert same(whole[3:], opened(batch_size=12).train_batches(2, first=3))
    assert list(data.train_batches(2, first=data.steps_per_epoch)) == []


def test_batch_size_does_not_change_the_samples(opened):
    small, large = (
        [torch.cat(parts) for parts in zip(*opened(batch_size=size).train_batches(0), strict=True)] for size in (4, 12)
    )
    common = min(len(small[1]), len(large[1]))
    assert torch.equal(small[0][:common], large[0][:common])
    assert torch.equal(small[1][:common], large[1][:common])


def test_epochs_and_seeds_differ(opened):
    data = opened(batch_size=24)
    first = next(data.train_batches(0))[0]
    assert not torch.equal(first, next(data.train_batches(1))[0])
    assert not torch.equal(first, next(opened(seed=1, batch_size=24).train_batches(0))[0])


def test_an_epoch_takes_no_sample_twice(opened):
    data = opened(batch_size=12, augment=False)
    images = torch.cat([images for images, _ in data.train_batches(0)])
    assert len({image.numpy().tobytes() for image in images}) == data.steps_per_epoch * 12


def test_augmentation_keeps_the_order(opened):
    plain, augmented = opened(batch_size=24, augment=False), opened(batch_size=24)
    pairs = list(zip(plain.train_batches(0), augmented.train_batches(0), strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b in pairs)
    assert not all(torch.equal(a[0], b[0]) for a, b in pairs)


def test_reads_no_global_random_state(opened):
    data = opened(batch_size=24)
    before = torch.get_rng_state()
    list(data.train_batches(0))
    list(data.eval_batches())
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_equals_an_explicit_loop(opened):
    data, plain = opened(batch_size=24), opened(batch_size=1, augment=False)
    side, pad = data.image_size, 1 if data.name == "digits" else 4
    black = -(data._mean / data._std).flatten()
    originals = [images[0] for images, _ in plain.train_batches(0)]
    plan = data._epoch_plan(0)
    produced = torch.cat([images for images, _ in data.train_batches(0)])
    for position in range(24):
        _, top, left, mirrored = plan[:, position].tolist()
        expected = torch.empty_like(originals[position])
        for channel in range(data.channels):
            for row in range(side):
                for column in range(side):
                    flip = mirrored and data.name == "cifar10"
                    y, x = row + top - pad, (side - 1 - column if flip else column) + left - pad
                    inside = 0 <= y < side and 0 <= x < side
                    value = originals[position][channel, y, x] if inside else black[channel]
                    expected[channel, row, column] = value
        torch.testing.assert_close(produced[position], expected, rtol=0, atol=1e-6)


def test_all_crops_and_flips_occur(opened):
    data = opened(batch_size=24)
    _, top, left, mirrored = torch.cat([data._epoch_plan(epoch) for epoch in range(3)], dim=1)
    widest = 2 if data.name == "digits" else 8
    assert top.unique().tolist() == left.unique().tolist() == list(range(widest + 1))
    assert 0.4 < mirrored.float().mean() < 0.6
    assert not torch.equal(top, left)


def test_channels_last_holds_the_same_values(opened):
    plain, other = opened(batch_size=24), opened(batch_size=24).to("cpu", channels_last=True)
    assert same(plain.train_batches(0), other.train_batches(0))
    assert same(plain.eval_batches(), other.eval_batches())
    for images, _ in (next(other.train_batches(0)), next(other.eval_batches())):
        assert images.is_contiguous(memory_format=torch.channels_last)
    back = other.to("cpu")
    assert next(back.train_batches(0))[0].is_contiguous()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("eval_batch_size", [1, 10, 512])
def test_evaluation_covers_each_sample_once(opened, world_size, eval_batch_size):
    data = opened(batch_size=24, eval_batch_size=eval_batch_size)
    whole = list(opened(batch_size=24).eval_batches())
    shares = [list(data.eval_batches(rank=rank, world_size=world_size)) for rank in range(world_size)]
    batches = [batch for share in shares for batch in share]
    assert all(1 <= len(labels) <= eval_batch_size for _, labels in batches)
    for part in (0, 1):
        assert torch.equal(torch.cat([b[part] for b in batches]), torch.cat([b[part] for b in whole]))
    if eval_batch_size > 1:
        assert len({len(share) for share in shares}) == 1


def test_more_processes_than_samples_to_evaluate(cifar10_root):
    data = open_data(DataConfig(name="cifar10"), str(cifar10_root), 0)
    labels = [labels for rank in range(50) for _, labels in data.eval_batches(rank=rank, world_size=50)]
    assert len(torch.cat(labels)) == data.eval_samples == 37


def test_batch_larger_than_the_training_set(opened):
    with pytest.raises(UserError, match=r"data\.batch_size: 5000 is not valid; expected at most (100|1438)"):
        opened(batch_size=5000)


@pytest.mark.parametrize("batch_size", [10, 2])
def test_batch_that_the_processes_cannot_share(opened, batch_size):
    data = opened(batch_size=batch_size)
    data.check_world(2)
    message = rf"data\.batch_size: {batch_size} is not valid with 4 processes; expected a multiple of 4"
    with pytest.raises(UserError, match=message):
        data.check_world(4)
    with pytest.raises(UserError, match=message):
        data.train_batches(0, rank=0, world_size=4)


def test_image_size_that_the_set_does_not_have(opened):
    with pytest.raises(UserError, match=r"data\.image_size: 64 is not valid; expected null or (8|32)"):
        opened(image_size=64)


@pytest.mark.gpu
def test_gpu_batches_equal_those_of_the_cpu_and_never_wait_for_the_host(opened):
    data, reference = opened(batch_size=24).to("cuda", channels_last=True), opened(batch_size=24)
    stream = data.train_batches(0)
    next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels = next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = list(reference.train_batches(0))[1]
    torch.testing.assert_close(images.cpu(), expected[0])
    assert torch.equal(labels.cpu(), expected[1])
