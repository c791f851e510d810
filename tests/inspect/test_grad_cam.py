import torch
import torch.nn.functional as F

from cbam_pl.inspect.grad_cam import grad_cam
from cbam_pl.models import build_network


def test_grad_cam_is_the_papers_equations():
    torch.manual_seed(1)
    network, x = build_network("cnn", 10, "cbam").eval(), torch.randn(3, 3, 32, 32)
    classes = torch.tensor([3, 0, 7])
    maps = grad_cam(network, x, classes)
    seen = []
    hook = network.blocks[2].relu.register_forward_hook(lambda module, arguments, output: seen.append(output))
    logits = network(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[range(3), classes].sum(), seen)
    coarse = F.relu((gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1, keepdim=True))  # (B, 1, 8, 8)
    expected = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(maps, expected.detach())
    assert maps.max() > 0
