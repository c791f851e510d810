"""The CBAM authors' released checkpoints in this project's networks: their names of each tensor, and the loading.

Source: github.com/Jongchan/attention-module, MODELS/model_resnet.py and MODELS/cbam.py.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Each of their names, as a pattern, and ours.
_NAMES = [
    (r"conv1", r"stem.0"),
    (r"bn1", r"stem.1"),
    (r"fc", r"classifier"),
    (r"layer(\d)\.(\d+)\.downsample\.([01])", r"stages.\1.\2.shortcut.\3"),
    (r"layer(\d)\.(\d+)\.(conv|bn)([123])", r"stages.\1.\2.branch.\3\4"),
    (r"layer(\d)\.(\d+)\.cbam\.ChannelGate\.mlp\.1", r"stages.\1.\2.attention.channel.reduce"),
    (r"layer(\d)\.(\d+)\.cbam\.ChannelGate\.mlp\.3", r"stages.\1.\2.attention.channel.expand"),
    (r"layer(\d)\.(\d+)\.cbam\.SpatialGate\.spatial\.conv", r"stages.\1.\2.attention.spatial.conv"),
    (r"layer(\d)\.(\d+)\.cbam\.SpatialGate\.spatial\.bn", r"stages.\1.\2.attention.spatial.norm"),
]


def _our_name(name: str) -> str | None:
    """`layer1.0.conv2.weight` → `stages.0.0.branch.3.weight`; None for a name that is not theirs."""
    layer, _, tensor = name.rpartition(".")
    for theirs, ours in _NAMES:
        match = re.fullmatch(theirs, layer)
        if match:
            renamed = match.expand(ours) + "." + tensor
            renamed = re.sub(r"^stages\.(\d)", lambda found: f"stages.{int(found[1]) - 1}", renamed)
            # A branch is convolution, norm, ReLU, convolution, …
            renamed = re.sub(r"conv(\d)", lambda found: str(3 * int(found[1]) - 3), renamed)
            return re.sub(r"bn(\d)", lambda found: str(3 * int(found[1]) - 2), renamed)
    return None


def load_official_state_dict(network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the weights of the authors' ResNet-CBAM into `network`, all of them or, after an error, none.

        network = build_network("resnet50", 1000, AttentionConfig(preset="official"), stem="imagenet")
        load_official_state_dict(network, torch.load("RESNET50_CBAM_new_name_wrap.pth")["state_dict"])

    Args:
        network: a ResNet with CBAM of the official preset and, for their ImageNet checkpoints, the imagenet stem.
        state_dict: tensors by the authors' names, such as layer1.0.cbam.ChannelGate.mlp.1.weight, with or without
            a leading "module.". The batch norms' num_batches_tracked may be left out, as PyTorch before 0.4.1 wrote
            none.

    Raises:
        ValueError: a tensor is unknown, missing or of another shape than the network's; all of them are listed.
    """
    wanted = network.state_dict()
    loaded: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in state_dict.items():
        ours = _our_name(name.removeprefix("module."))
        if ours is None or ours not in wanted:
            problems.append(f"unknown: {name}")
        elif ours in loaded:
            problems.append(f"twice, with and without 'module.': {name}")
        else:
            loaded[ours] = tensor
            if tensor.shape != wanted[ours].shape:
                shapes = f"has shape {tuple(tensor.shape)}, not {tuple(wanted[ours].shape)}"
                problems.append(f"misshapen: {name} {shapes}")
    optional = {name for name in wanted if name.endswith(".num_batches_tracked")}
    problems += [f"missing: the tensor of {name}" for name in wanted if name not in loaded.keys() | optional]
    if problems:
        raise ValueError(
            "state_dict does not fit the network, which must be a ResNet of the same depth with CBAM of "
            "preset='official' and the stem of the checkpoint: " + "; ".join(problems)
        )
    with torch.no_grad():
        for name, tensor in loaded.items():
            wanted[name].copy_(tensor)
