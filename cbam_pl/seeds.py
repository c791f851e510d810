"""Independent random streams: every random choice is a function of what it is for, not of what was drawn before it."""

import random

import torch


def derive_seed(*purpose: str | int) -> int:
    """A 63-bit seed that depends on `purpose` alone, such as derive_seed("order", seed, epoch)."""
    return random.Random("/".join(map(str, purpose))).getrandbits(63)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the CPU and one device; torch.manual_seed tries all kinds, which takes 0.2 ms where there is none."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)
