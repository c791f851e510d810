import torch

from cbam_pl.data.images import Images


def numbered(count: int, size: int = 6) -> Images:
    """Images whose pixels are their index, but the first row and column, with labels and ids that show it too."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, size, size)
    pixels[:, :, 0], pixels[:, :, :, 0] = 255, 255
    return Images(pixels, torch.arange(count) % 3, pixels[:, :1] == 255, torch.arange(count) + 100)


def test_subsets_of_subsets_share_the_store():
    images = numbered(8)
    part = images.subset(torch.tensor([7, 5, 2, 0])).subset(torch.tensor([2, 0]))
    assert part.store.data_ptr() == images.store.data_ptr()
    assert len(part) == 2
    assert part.labels.tolist() == [2, 1]
    assert part.ids.tolist() == [102, 107]
    assert part.masks.shape == (2, 1, 6, 6)
    assert part.pixels[:, 0, 3, 3].tolist() == [2, 7]
    assert part.take(torch.tensor([1]))[:, 0, 3, 3].tolist() == [7]
    assert part.nbytes == 2 * 3 * 36


def test_a_copy_is_made_part_by_part_of_the_subset_alone():
    images = numbered(8).subset(torch.tensor([7, 5, 2, 0, 4]))
    copy = images.copy_to(torch.device("cpu"), part=2)
    assert torch.equal(copy.store, images.pixels)
    assert torch.equal(copy.labels, images.labels)


def test_the_centre_is_cut_from_pixels_and_masks():
    images = numbered(4).subset(torch.tensor([3, 1]))
    centre = images.centre(4)
    assert centre.store.data_ptr() != images.pixels.data_ptr()
    assert torch.equal(centre.pixels, torch.tensor([3, 1]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert not centre.masks.any()
    assert centre.nbytes == 2 * 3 * 16
    assert centre.labels.tolist() == [0, 1]
    assert torch.equal(images.centre(6).pixels, images.pixels)
