"""Networks of another width: the channels of each stage times one factor."""

import math
from collections.abc import Sequence

_LEAST = 8  # channels: fewer leave the attention's bottleneck nothing to choose from


def scale_channels(channels: Sequence[int], width: float) -> list[int]:
    """The channels of each stage times `width`, rounded to whole channels.

    Args:
        channels: of each stage, the narrowest first.
        width: the factor; 1 leaves all as they are.

    Raises:
        ValueError: width is not a positive number, or leaves a stage fewer than 8 channels.
    """
    if not 0 < width < math.inf:
        raise ValueError(f"width={width} must be a positive number")
    scaled = [round(count * width) for count in channels]
    if scaled[0] < _LEAST:
        raise ValueError(
            f"width={width} leaves {scaled[0]} of the first stage's {channels[0]} channels; "
            f"use at least {_LEAST / channels[0]}, which leaves {_LEAST}"
        )
    return scaled
