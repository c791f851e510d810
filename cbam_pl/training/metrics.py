"""Mean loss and accuracy over an epoch's images, over all processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class LossAndAccuracy(Metric):
    """Σ loss · images / Σ images, and the share of images that are classified correctly.

    The sums are float64, so that their order does not matter, and stay on the device: nothing waits for it until
    `compute`. A loss that is not finite makes the mean not finite.
    """

    full_state_update = False
    loss_sum: Tensor
    num_correct: Tensor
    num_images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss_sum", "num_correct", "num_images"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch. loss (): the batch's mean; logits (B, classes); labels (B,)."""
        self._keep_precision()
        correct = (logits.detach().argmax(1) == labels).sum()
        self.add(loss.detach().to(self.loss_sum.dtype) * len(labels), correct, len(labels))

    def add(self, loss_sum: Tensor | float, num_correct: Tensor | float, num_images: float) -> None:
        """Add sums, such as those that a checkpoint holds of an interrupted epoch."""
        self._keep_precision()
        # Not in place: a test leaves tensors of inference mode, which a training after it cannot change.
        self.loss_sum = self.loss_sum + loss_sum
        self.num_correct = self.num_correct + num_correct
        self.num_images = self.num_images + num_images

    def _keep_precision(self) -> None:
        """Undo the conversion of a network to half precision, which includes its metrics."""
        dtype = torch.float32 if self.loss_sum.device.type == "mps" else torch.float64  # which mps does not have
        if self.loss_sum.dtype != dtype:
            self.set_dtype(dtype)

    def compute(self) -> tuple[float, float, int]:
        """Mean loss, accuracy in [0, 1], and the number of images."""
        loss, acc = self.loss_sum / self.num_images, self.num_correct / self.num_images
        return float(loss), float(acc), int(self.num_images)

    def sums(self) -> list[float]:
        """The arguments of `add` that give this state, over all processes, all of which must call this."""
        with self.sync_context():
            return [float(self.loss_sum), float(self.num_correct), float(self.num_images)]
