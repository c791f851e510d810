"""What the attention modules share: the gate, checks of their arguments, and pooling with a fast backward pass."""

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def in_float32_on_cpu(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """On a CPU under autocast, compute a layer in float32: half precision slows its elementwise operations.

    The result has the input's type. A layer whose weights are of another type is left to autocast.
    """

    @wraps(forward)
    def wrapped(layer: nn.Module, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return forward(layer, x)
        if any(weights.dtype != torch.float32 for weights in layer.parameters()):
            return forward(layer, x)
        with torch.autocast("cpu", enabled=False):
            return forward(layer, x.float()).to(x.dtype)

    return wrapped


class Gate(nn.Module):
    """A module with one gate: x · sigmoid(logits(x))."""

    gate_name: Literal["channel", "spatial", "joint"]

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, to multiply (see mean_and_max), and the gate before the sigmoid, shaped to multiply x."""
        raise NotImplementedError

    @in_float32_on_cpu
    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → x · σ(logits), (B, C, H, W)."""
        x, logits = self.logits(x)
        return x * torch.sigmoid(logits)

    def gate(self, x: Tensor) -> Tensor:
        """The weight of each channel or place. x (B, C, H, W) → (B, C, 1, 1) or (B, 1, H, W), in (0, 1)."""
        return torch.sigmoid(self.logits(x)[1])

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """The gate by its name: channel, spatial or joint."""
        return {self.gate_name: self.gate(x)}


class IdentityStart(nn.Module):
    """Attention that begins as the identity: x + α · (attention(x) − x), where α is learned and starts at zero.

    At α = 0 the output is x itself, to the bit, for any attention with finite gates; at α = 1 it is the attention as it
    is without this module. For one gate it is x · (1 + α · (gate − 1)). The first step's gradient reaches α alone, as
    that of the attention's own weights is α times what it would be; from the second step on it reaches all.

    Source: ReZero (Bachlechner et al., UAI 2021, arXiv:2003.04887) and SkipInit (De and Smith, NeurIPS 2020,
    arXiv:2002.10444) multiply a residual branch by a learned scalar that starts at zero; LayerScale (Touvron et al.,
    ICCV 2021, arXiv:2103.17239) by one a channel, which starts near zero. The branch here is attention(x) − x.

    Shape:
        x (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.factor = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """Begin as the identity again; the layers of the attention reset themselves, as PyTorch's do."""
        nn.init.zeros_(self.factor)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, H, W)."""
        return x + self.factor * (self.attention(x) - x)


def check_at_least(minimum: int, **numbers: int) -> None:
    """Reject a number below the minimum."""
    for name, value in numbers.items():
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def check_one_of(allowed: Collection[str], **choices: str) -> None:
    """Reject a choice that is not among the allowed ones."""
    for name, value in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")


def check_odd(kernel_size: int) -> None:
    """Reject a kernel size without a middle."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd and at least 1, such as 3, 5 or 7")


def hidden_width(channels: int, reduction: int, min_hidden: int, rounding: str = "down") -> int:
    """Hidden units of an MLP on the channels: channels / reduction, rounded, but at least min_hidden."""
    check_at_least(1, channels=channels, reduction=reduction)
    check_at_least(0, min_hidden=min_hidden)
    check_one_of(("down", "nearest"), rounding=rounding)
    if min_hidden == 0 and reduction > channels:
        leaves = f"reduction={reduction} leaves no hidden unit for channels={channels} with min_hidden=0"
        raise ValueError(f"{leaves}; use a reduction of at most {channels}, or a min_hidden of at least 1")
    half = reduction // 2 if rounding == "nearest" else 0
    return max(min_hidden, (channels + half) // reduction)


def reject_unused(allowed: Collection[str], given: Mapping[str, object], owner: str) -> None:
    """Reject each option that was given and that `owner` does not use."""
    for name, value in given.items():
        if value is not None and name not in allowed:
            options = f" (options: {', '.join(allowed)})" if allowed else ""
            raise ValueError(f"{name}={value!r} has no effect with {owner}; leave it out{options}")


def mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean of x (B, C, H, W) over dims, (1,) or (2, 3), which keep size 1."""
    if x.dtype == torch.float16:
        return x.mean(dims, keepdim=True)  # the sum of a large map overflows
    # Summed first, divided later: the backward of mean divides a gradient of the map's full size.
    return x.sum(dims, keepdim=True) / _count(x, dims)


def _count(x: Tensor, dims: tuple[int, ...]) -> int:
    return x.shape[1] if dims == (1,) else x.shape[2] * x.shape[3]


def mean_and_max(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x itself, to go on with so that the gradients are joined in one pass, its mean and its maximum over dims."""
    # Where a backward pass can follow, on a CPU: a GPU computes max_pool2d of a whole map one position after another.
    # torch.compile joins the passes by itself, and torch.jit.trace cannot.
    training = x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled()
    if training and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return _MeanAndMax.apply(x, dims)[:3]
    return x, mean(x, dims), x.amax(dims, keepdim=True)


_MAX_ROW = 32  # places; the work of convolve_rows grows with their square


class MapConv2d(nn.Conv2d):
    """A convolution from one or two channels to one, the fastest way: x (B, C, H, W) → (B, 1, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d, by convolve_rows where that is faster."""
        # convolve_rows depends on the map's size, on which a traced or exported graph must not.
        any_size = torch.jit.is_tracing() or torch.compiler.is_exporting()
        training = x.requires_grad and torch.is_grad_enabled() and not any_size
        if training and x.device.type == "cpu" and x.shape[3] <= _MAX_ROW:
            return convolve_rows(x, self.weight, self.bias)
        return super().forward(x)


def convolve_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same convolution with each row's places as the channels, which fill a CPU's vectors as one channel does not.

    Two to three times as fast, forward and backward, on maps of 8×8 to 32×32. Along the row the convolution is a matrix
    with the kernel's row around its diagonal, so what remains is a convolution down the columns.

    Args:
        x: (B, C, H, W), fastest as channels_last.
        weight: (1, C, K, K), K odd.
        bias: (1,).

    Shape:
        (B, C, H, W) → (B, 1, H, W).
    """
    batch, channels, height, width = x.shape
    side = weight.shape[3]
    places = torch.arange(width, device=x.device)
    column = places - places[:, None] + side // 2  # (W of the output, W of the input): the kernel's column between them
    column = torch.where((column >= 0) & (column < side), column, side)
    matrices = F.pad(weight[0], (0, 1))[:, :, column]  # (C, K, W, W), zero beyond the kernel
    kernel = matrices.permute(2, 3, 0, 1).reshape(width, width * channels, side, 1)
    rows = x.permute(0, 2, 3, 1).reshape(batch, height, 1, width * channels).permute(0, 3, 1, 2)  # (B, W · C, H, 1)
    bias = None if bias is None else bias.expand(width)
    out = F.conv2d(rows, kernel, bias, padding=(side // 2, 0))  # (B, W, H, 1)
    return out.permute(0, 2, 3, 1).reshape(batch, 1, height, width)


class _MeanAndMax(torch.autograd.Function):
    """x, its mean and its maximum, with a backward pass that goes over the map once.

    Autograd alone makes a map for each of the three gradients and adds them up, and amax takes five passes to share
    its own among ties. Here, too, tied channels share the gradient; of tied places, one gets it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        index = None
        if dims == (1,):
            maximum = x.amax(1, keepdim=True)  # four times as fast as max, which finds the index as well
        else:
            maximum, index = F.max_pool2d(x, x.shape[2:], return_indices=True)  # index along H · W
        return x.view_as(x), mean(x, dims), maximum, index

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, ctx.dims = inputs
        _, _, maximum, index = output
        ctx.count = _count(x, ctx.dims)
        saved = (x, maximum, None)
        if index is not None:
            saved = (None, None, index)
            ctx.mark_non_differentiable(index)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_x, of_mean, of_maximum, _ = gradients
        x, maximum, index = ctx.saved_tensors
        joined = of_x + (of_mean / ctx.count).to(of_x.dtype)
        if index is None:
            tied = _tied(x, maximum)
            return torch.addcmul(joined, tied, of_maximum / tied.sum(1, keepdim=True)), None
        batch, channels, height, width = of_x.shape
        joined = joined.reshape(batch, channels, height * width)  # flatten has no rule for batched gradients
        joined = joined.scatter_add_(2, *(one.reshape(batch, channels, 1) for one in (index, of_maximum)))
        return joined.reshape(of_x.shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor, None]:
        x, maximum, index = ctx.saved_tensors
        if index is None:
            tied = _tied(x, maximum)
            of_maximum = (tied * tangent).sum(1, keepdim=True) / tied.sum(1, keepdim=True)
        else:
            of_maximum = tangent.flatten(2).gather(2, index.flatten(2))[..., None]  # (B, C, 1, 1)
        return tangent.view_as(tangent), mean(tangent, ctx.dims), of_maximum, None


def _tied(x: Tensor, maximum: Tensor) -> Tensor:
    """1 where x equals the maximum, else 0; converting the bools of x == maximum takes longer."""
    return (x - maximum).sign_().add_(1)
