"""The small CNN: three convolution blocks and two linear layers, with attention in every block."""

from collections import OrderedDict

from torch import Tensor, nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models.layers import he_conv, scale_channels


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


CHANNELS = (32, 64, 128)  # of the blocks, at width 1


class CNN(nn.Module):
    """Three blocks of conv 3×3 → batch norm → ReLU → max pool, widths 32, 64, 128, then 512 hidden units.

    Arguments, shapes and errors are those of build_network.
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
        first, second, third = scale_channels(CHANNELS, width)
        self.blocks = nn.Sequential(
            _block(3, first, attention),
            _block(first, second, attention),
            _block(second, third, attention, last=True),
        )
        hidden = nn.Linear(third * (image_size // 8) ** 2, 512)
        nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
        nn.init.zeros_(hidden.bias)
        self.classifier = nn.Sequential(
            nn.Flatten(), hidden, nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(512, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → logits (B, num_classes)."""
        return self.classifier(self.blocks(images))
