"""Independent random streams: every random choice is a function of what it is for, not of what was drawn before it."""

import random


def derive_seed(*purpose: str | int) -> int:
    """A 63-bit seed that depends on `purpose` alone, such as derive_seed("order", seed, epoch)."""
    return random.Random("/".join(map(str, purpose))).getrandbits(63)
