"""Grad-CAM, in a file of its own: captum takes a second to import, and training does without it."""

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from cbam_pl.inspect.gates import as_input, evaluation_mode, last_activation, unwrap, upsample


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Evidence for a class at each position of the last convolution's activations.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391, equations 1 and 2, by captum's LayerGradCam.

    Args:
        network: a CNN or ResNet of cbam_pl.models, also compiled or wrapped.
        images: normalised as in training.
        classes: the class to explain, for each image.

    Shape:
        images (B, 3, H, W), classes (B,) → (B, H, W) ≥ 0, in units of the logits, upsampled bilinearly.

    Raises:
        ValueError: another network, or images that are not (B, 3, H, W).
    """
    network = unwrap(network)
    with evaluation_mode(network), torch.enable_grad():
        images = as_input(images, network)
        explain = LayerGradCam(network, last_activation(network))
        coarse = explain.attribute(images, target=classes.to(images.device), relu_attributions=True)
    return upsample(coarse.detach()[:, 0].float(), images.shape[-2:])
