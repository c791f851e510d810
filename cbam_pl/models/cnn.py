"""The small CNN: three convolution blocks and two linear layers, with attention in every block."""

from collections import OrderedDict

from torch import Tensor, nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models.layers import he_conv, he_linear, scale_channels


def _block(in_channels: int, channels: int, attention: AttentionConfig, last: bool = False) -> nn.Sequential:
    """(B, in_channels, H, W) → (B, channels, H // 2, W // 2)."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv", he_conv(in_channels, channels, kernel_size=3, bias=True)),
        ("norm", nn.BatchNorm2d(channels)),
    ]
    relu, pool = ("relu", nn.ReLU(inplace=True)), ("pool", nn.MaxPool2d(2))
    # Squeeze-and-excitation, and ECA that replaces it, recalibrate the convolution's own output; the others refine
    # what leaves the block.
    place = attention.place or ("before_pool" if attention.kind in ("se", "eca") else "after_pool")
    module = ("attention", attention.build(channels))
    if place == "before_pool":
        layers += [relu, module, pool]
    elif last:  # heat maps and Grad-CAM show these activations, at the resolution before the pool
        layers += [relu, pool, module]
    else:  # the same, since ReLU and pool commute, gradients included, and a quarter of the values for the ReLU
        layers += [pool, relu, module]
    return nn.Sequential(OrderedDict(layers))


class CNN(nn.Module):
    """Three blocks of conv 3×3 → batch norm → ReLU → max pool, widths 32, 64, 128, then 512 hidden units.

    Args:
        num_classes: classes to tell apart.
        attention: the attention of each block; its place is before_pool or after_pool.
        image_size: height and width of the images in pixels, at least 8.
        dropout: share of the hidden units that each training step leaves out, from 0 to below 1.
        width: factor on the channels of the blocks, not on the hidden units.

    Shape:
        images (B, 3, image_size, image_size) → logits (B, num_classes).

    Raises:
        ValueError: a number out of its range, or an attention with stages or with a place in the ResNets.
    """

    def __init__(
        self,
        num_classes: int,
        attention: AttentionConfig,
        image_size: int = 32,
        dropout: float = 0.5,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        if image_size < 8:
            raise ValueError(f"image_size={image_size} leaves nothing after three poolings; use at least 8")
        if attention.place not in (None, "before_pool", "after_pool"):
            raise ValueError(f"place={attention.place!r} is not in the cnn; use before_pool or after_pool")
        if attention.stages is not None:
            raise ValueError(f"stages={attention.stages!r} has no effect in the cnn, which has none; leave it out")
        first, second, third = scale_channels((32, 64, 128), width)
        self.blocks = nn.Sequential(
            _block(3, first, attention),
            _block(first, second, attention),
            _block(second, third, attention, last=True),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            he_linear(third * (image_size // 8) ** 2, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(512, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → logits (B, num_classes)."""
        return self.classifier(self.blocks(images))
