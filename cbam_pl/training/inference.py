"""A trained network for use from Python: cbam_pl.load_network("weights/cbam_resnet20_cifar10")"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cbam_pl.data.datamodule import in_proportion
from cbam_pl.data.folder import decode, fit_image, fit_tensor
from cbam_pl.data.loader import Normalise
from cbam_pl.training.checkpoint import load_classifier, read_checkpoint
from cbam_pl.training.classifier import Classifier

OneImage = Tensor | Image.Image | str | Path


class PretrainedNetwork(nn.Module):
    """A trained network with its classes and the preparation of images that it was trained with.

    Args:
        classifier: the network.
        checkpoint: what it was read from.

    Shape:
        prepared images (B, 3, H, W) → logits (B, classes), as `predict` computes them.
    """

    def __init__(self, classifier: Classifier, checkpoint: dict[str, Any]) -> None:
        super().__init__()
        self.classifier = classifier
        data = checkpoint["ImageDataModule"]
        self.classes: list[str] = data["classes"]  # names, in the order of the logits
        self.image_size: int = checkpoint["hyper_parameters"]["image_size"]
        self._mean, self._std = data["mean"], data["std"]
        self._in_proportion = in_proportion(checkpoint["datamodule_hyper_parameters"])

    @property
    def network(self) -> nn.Module:
        """The network alone, for what looks into its modules, such as cbam_pl.attention_maps."""
        return self.classifier.network

    def forward(self, images: Tensor) -> Tensor:
        """Prepared images (B, 3, H, W) → logits (B, classes)."""
        return self.classifier.evaluation_logits(images)

    def preprocess(self, images: OneImage | Sequence[OneImage]) -> Tensor:
        """Images of any size → the network's input, resized and normalised as `predict` does, on its device.

        Args:
            images: a tensor (3, H, W) or (B, 3, H, W), uint8 or floats in [0, 1]; an image of Pillow; the path of an
                image file; or several of them.

        Shape:
            (B, 3, image_size, image_size), float32.

        Raises:
            ValueError: a tensor of another shape, type or range.
            UserError: a file that is not an image.
        """
        several = [images] if isinstance(images, (Tensor, Image.Image, str, Path)) else images
        if len(several) == 0:
            raise ValueError("images=[] must be one image or more")
        device = next(self.parameters()).device
        batches = [self._fit(one).to(device) for one in several]
        return Normalise(self._mean, self._std, device)(torch.cat(batches))

    def _fit(self, images: OneImage) -> Tensor:
        """Resized images (B, 3, image_size, image_size), floats in [0, 1]."""
        if isinstance(images, Image.Image):
            pixels = fit_image(images, self.image_size, self._in_proportion)[None]
        elif isinstance(images, (str, Path)):
            pixels = decode(images, self.image_size, self._in_proportion)[None]
        else:
            pixels = fit_tensor(_checked(images), self.image_size, self._in_proportion)
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def load_network(path: str | Path, trust: Sequence[str] = ()) -> PretrainedNetwork:
    """The network in a folder of weights, or in a checkpoint, in evaluation mode on the CPU.

    No code in it is run; networks that are not of this program are imported as the commands do, so only from
    torchvision.models, timm and the packages of `trust`.

    Example:
        >>> network = load_network("weights/cbam_resnet20_cifar10")
        >>> probabilities = network(network.preprocess("my_cat.jpg")).softmax(1)  # (1, 10)
        >>> network.classes[probabilities.argmax()]

    Raises:
        UserError: the folder or the checkpoint cannot be read.
    """
    checkpoint = read_checkpoint(Path(path))
    return PretrainedNetwork(load_classifier(Path(path), checkpoint, trust=trust), checkpoint).eval()


def _checked(images: Any) -> Tensor:
    """A tensor of images, (B, 3, H, W)."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images={type(images).__name__} must be a tensor, an image of Pillow or a path, or several")
    shape = tuple(images.shape)
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images of shape {shape} must be (3, H, W) or (B, 3, H, W)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images of {images.dtype} must be uint8, or floats in [0, 1]")
    if images.is_floating_point():
        low, high = (float(value) for value in images.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images with values from {low:.3g} to {high:.3g} must be floats in [0, 1], or uint8")
    return images
