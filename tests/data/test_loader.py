import numpy as np
import pytest
import torch

from cbam_pl.data.augmentation import augment, num_draws
from cbam_pl.data.images import Images
from cbam_pl.data.loader import EvaluationLoader, Normalise, Shard, TrainingLoader, _place
from cbam_pl.seeds import derive_seed

CPU = torch.device("cpu")
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def numbered(count):
    """Images whose label is their index."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count))


def training(images, batch_size=4, augmentation="rich", seed=0, epoch=0, shard=None):
    shard = shard or Shard()
    return TrainingLoader(images, batch_size, augmentation, Normalise(MEAN, STD, CPU), CPU, seed, lambda: epoch, shard)


def collect(loader):
    batches = list(loader)
    assert len(batches) == len(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_normalise_is_the_difference_over_the_deviation():
    images = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    normalise = Normalise(MEAN, STD, CPU)
    assert torch.allclose(normalise(images), expected, atol=1e-6)
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    assert torch.equal(normalise(pixels), normalise(pixels / 255))


def test_an_epoch_holds_every_image_once_in_another_order_each_time():
    orders = [collect(training(numbered(10), epoch=epoch))[1].tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(10))


def test_an_epoch_is_a_function_of_seed_and_epoch():
    first, again = training(numbered(10), epoch=2), training(numbered(10), epoch=2)
    list(training(numbered(10), epoch=1))  # what ran before does not matter
    assert torch.equal(collect(first)[0], collect(again)[0])
    assert not torch.equal(collect(first)[0], collect(training(numbered(10), epoch=2, seed=1))[0])
    assert torch.equal(collect(first)[0], collect(first)[0])


def test_images_stay_where_they_are_if_the_devices_memory_is_taken_meanwhile(monkeypatch):
    def copy_to(images, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Images, "copy_to", copy_to)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 40, 1 << 40))
    images = numbered(3)
    assert _place(images, torch.device("cuda")) is images


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_change_of_the_pixels_gets_each_image_with_its_number(shuffle):
    images, seen = numbered(11), []

    def mark(pixels, indices):
        assert torch.equal(pixels, images.pixels[indices])
        seen.extend(indices.tolist())
        return torch.full_like(pixels, 255)

    for rank in range(2):
        loader = EvaluationLoader(images, 4, Normalise([0.0] * 3, [1.0] * 3, CPU), CPU, Shard(rank, 2), shuffle, mark)
        pixels, labels = collect(loader)
        assert torch.equal(pixels, torch.ones_like(pixels))
        assert labels.tolist() == seen[-len(labels) :]
    assert sorted(seen) == list(range(11))
    assert (seen == [*range(0, 11, 2), *range(1, 11, 2)]) != shuffle


def labels_of(batches):
    return [labels.tolist() for _, labels in batches]


def test_an_epoch_starts_at_its_first_batch_after_one_that_was_cut_short():
    loader = training(numbered(10))
    whole = labels_of(loader)
    assert len(whole) == 3
    cut = iter(loader)
    next(cut)
    assert loader.state_dict() == {"batches_done": 1}
    assert labels_of(loader) == whole
    assert loader.state_dict() == {"batches_done": 0}


def test_a_loaded_start_holds_for_one_iteration():
    loader = training(numbered(10))
    whole = labels_of(loader)
    loader.load_state_dict({"batches_done": 2})
    iter(loader)  # as Lightning does before it asks for batches
    assert loader.state_dict() == {"batches_done": 2}
    assert labels_of(loader) == whole[2:]
    assert labels_of(loader) == whole


def test_draws_belong_to_images_not_to_batches():
    ours, labels = collect(training(numbered(10), batch_size=3))
    theirs, other_labels = collect(training(numbered(10), batch_size=7))
    assert torch.equal(labels, other_labels)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_no_augmentation_gives_the_normalised_pixels():
    images = numbered(6)
    x, labels = collect(training(images, augmentation="none"))
    assert torch.allclose(x, Normalise(MEAN, STD, CPU)(images.pixels[labels] / 255), atol=1e-6)


def test_the_batches_of_all_processes_together_are_those_of_one():
    alone = training(numbered(16), batch_size=8)
    shards = [training(numbered(16), batch_size=4, shard=Shard(rank, 2)) for rank in range(2)]
    for (_, together), *parts in zip(alone, *shards, strict=True):
        assert sorted(together.tolist()) == sorted(torch.cat([labels for _, labels in parts]).tolist())
    x = [collect(shard)[0] for shard in shards]
    assert not torch.allclose(x[0], x[1])


@pytest.mark.parametrize(("count", "world_size"), [(10, 3), (11, 4), (201, 2)])
def test_training_shards_are_equal_disjoint_and_leave_out_less_than_one_each(count, world_size):
    shards = [collect(training(numbered(count), shard=Shard(rank, world_size)))[1] for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {count // world_size}
    assert len(torch.cat(shards).unique()) == count // world_size * world_size


@pytest.mark.parametrize(("count", "world_size", "batch_size"), [(201, 2, 100), (10, 3, 2), (7, 1, 3), (5, 4, 8)])
def test_evaluation_counts_every_image_once_in_equally_many_batches(count, world_size, batch_size):
    normalise = Normalise(MEAN, STD, CPU)
    loaders = [
        EvaluationLoader(numbered(count), batch_size, normalise, CPU, Shard(rank, world_size), shuffle=True)
        for rank in range(world_size)
    ]
    collected = [collect(loader) for loader in loaders]
    assert torch.cat([labels for _, labels in collected]).sort().values.tolist() == list(range(count))
    assert len({len(loader) for loader in loaders}) == 1
    assert all(len(labels) <= batch_size for loader in loaders for _, labels in loader)
    for x, labels in collected:
        assert torch.allclose(x, normalise(numbered(count).pixels[labels] / 255), atol=1e-6)


def test_evaluation_comes_in_the_order_given_or_in_a_fixed_random_one():
    normalise = Normalise(MEAN, STD, CPU)
    assert labels_of(EvaluationLoader(numbered(7), 3, normalise, CPU, Shard())) == [[0, 1, 2], [3, 4], [5, 6]]
    classes = Images(torch.zeros(300, 3, 8, 8, dtype=torch.uint8), torch.arange(3).repeat_interleave(100))
    for world_size in (1, 2):
        shards = [Shard(rank, world_size) for rank in range(world_size)]
        loaders = [EvaluationLoader(classes, 30, normalise, CPU, shard, shuffle=True) for shard in shards]
        labels = torch.cat([collect(loader)[1] for loader in loaders])
        assert labels.bincount().tolist() == [100, 100, 100]
        assert labels_of(loaders[0]) == labels_of(loaders[0])
        half = torch.cat([collect(loader)[1][: len(loader.images) // 2 // world_size] for loader in loaders])
        assert half.bincount().tolist() == pytest.approx([50, 50, 50], abs=12)


def test_the_draws_are_those_of_the_image_index():
    images = numbered(5)
    x, labels = collect(training(images, seed=4, epoch=6))
    generator = torch.Generator().manual_seed(derive_seed("order", 4, 6))
    torch.randperm(5, generator=generator)
    draws = torch.rand(5, num_draws("rich"), generator=generator)
    expected = Normalise(MEAN, STD, CPU)(augment(images.pixels, draws, "rich"))
    assert torch.allclose(x, expected[labels], atol=1e-6)


def test_alternating_epochs_show_an_image_and_its_mirror_image():
    images = numbered(10)
    seen = []
    for epoch in range(4):
        x, labels = collect(training(images, augmentation="alternating", epoch=epoch))
        seen.append(x[labels.argsort()])
    plain = Normalise(MEAN, STD, CPU)(images.pixels / 255)
    for image in range(10):
        crops = {flip: all_crops(plain[image], flip) for flip in (False, True)}

        def shows(epoch, flip, image=image, crops=crops):
            return any(torch.allclose(seen[epoch][image], crop) for crop in crops[flip])

        assert any(all(shows(epoch, first ^ (epoch % 2 == 1)) for epoch in range(4)) for first in (False, True))


def all_crops(image, flip):
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), "symmetric"))
    crops = [padded[:, top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
    return [crop.flip(2) for crop in crops] if flip else crops
