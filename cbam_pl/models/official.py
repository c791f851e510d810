"""The CBAM authors' released checkpoints in this project's networks: their names of each tensor, and the loading.

Source: github.com/Jongchan/attention-module, MODELS/model_resnet.py and MODELS/cbam.py.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

_OUTSIDE_BLOCKS = {"conv1": "stem.0", "bn1": "stem.1", "fc": "classifier"}
_IN_A_BLOCK = {
    "conv1": "branch.0",
    "bn1": "branch.1",
    "conv2": "branch.3",
    "bn2": "branch.4",
    "conv3": "branch.6",
    "bn3": "branch.7",
    "downsample.0": "shortcut.0",
    "downsample.1": "shortcut.1",
    "cbam.ChannelGate.mlp.1": "attention.channel.reduce",
    "cbam.ChannelGate.mlp.3": "attention.channel.expand",
    "cbam.SpatialGate.spatial.conv": "attention.spatial.conv",
    "cbam.SpatialGate.spatial.bn": "attention.spatial.norm",
}


def _our_name(name: str) -> str:
    """`layer1.0.conv2.weight` → `stages.0.0.branch.3.weight`; "" for a name that is not theirs."""
    layer, _, tensor = name.removeprefix("module.").rpartition(".")
    block = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", layer)
    if block and block[3] in _IN_A_BLOCK:
        return f"stages.{int(block[1]) - 1}.{block[2]}.{_IN_A_BLOCK[block[3]]}.{tensor}"
    return f"{_OUTSIDE_BLOCKS[layer]}.{tensor}" if layer in _OUTSIDE_BLOCKS else ""


def load_official_state_dict(network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the weights of the authors' ResNet-CBAM into `network`, all of them or, after an error, none.

        network = build_network("resnet50", 1000, AttentionConfig(preset="official"), stem="imagenet")
        load_official_state_dict(network, torch.load("RESNET50_CBAM_new_name_wrap.pth")["state_dict"])

    Args:
        network: a ResNet with CBAM of the official preset and, for their ImageNet checkpoints, the imagenet stem.
        state_dict: tensors by the authors' names, such as layer1.0.cbam.ChannelGate.mlp.1.weight, with or without
            "module." before them. The batch norms' num_batches_tracked, new in PyTorch 0.4.1, may be missing.

    Raises:
        ValueError: tensors that are unknown, missing or of another shape.
    """
    wanted = network.state_dict()
    loaded: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in state_dict.items():
        ours = _our_name(name)
        if ours not in wanted:
            problems.append(f"unknown: {name}")
            continue
        loaded[ours] = tensor
        if tensor.shape != wanted[ours].shape:
            problems.append(f"wrong shape: {name} is {tuple(tensor.shape)}, not {tuple(wanted[ours].shape)}")
    optional = {name for name in wanted if name.endswith(".num_batches_tracked")}
    problems += [f"missing: the tensor of {name}" for name in wanted if name not in loaded.keys() | optional]
    if problems:
        raise ValueError(
            "state_dict does not fit the network, which must be a ResNet of the same depth with CBAM of "
            "preset='official' and the stem of the checkpoint: " + "; ".join(problems)
        )
    network.load_state_dict(loaded, strict=False)  # only the counters may be missing
