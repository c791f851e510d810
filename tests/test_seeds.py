import torch

from cbam_pl.seeds import derive_seed, seed_device


def test_a_seed_depends_on_every_part_of_its_purpose():
    seeds = [derive_seed("dropout", 1, 2), derive_seed("dropout", 2, 1), derive_seed("order", 1, 2)]
    assert len(set(seeds)) == 3
    assert derive_seed("dropout", 1, 2) == seeds[0]


def test_seeding_a_device_draws_what_manual_seed_draws():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(8)
    seed_device(7, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
