"""A network as one graph, from pixels to probabilities and gates, and the files that hold it: ONNX and pt2."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cbam_pl.data.loader import Normalise
from cbam_pl.errors import UserError
from cbam_pl.inspect.gates import recorded_maps
from cbam_pl.process import quiet_export
from cbam_pl.training.weights_folder import Precision

InputType = Literal["float32", "uint8"]
Outputs = dict[str, Tensor]  # by name, the probabilities first
Runner = Callable[[Tensor], Outputs]

OPSET = 18  # of ONNX: the one that torch's operators are written in, so that none is converted
INPUT, PROBABILITIES = "images", "probabilities"
METADATA_FILE = "metadata.json"  # in a pt2 file
_LONGEST_REASON = 300


class ExportedNetwork(nn.Module):
    """Images → class probabilities, with normalisation, test-time flip and softmax, and the gates of each block.

    Normalisation and softmax are computed in float32 whatever the precision of the network.

    Args:
        network: normalised images (B, 3, H, W) → logits (B, classes); a copy of it is taken.
        mean: of each channel of the images in [0, 1].
        std: of each channel.
        test_time_flip: whether the logits are the mean of those of each image and of its mirror image.
        gates: whether the gates are outputs, too: those of the images, not of the mirror images.
        precision: of the network's weights and activations.

    Shape:
        images (B, 3, H, W), float in [0, 1] or uint8 → by name, float32: probabilities (B, classes); BLOCK.channel
        (B, C) and BLOCK.spatial (B, H', W') for each block, as `attention_maps` gives them.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: list[float],
        std: list[float],
        test_time_flip: bool = False,
        gates: bool = False,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        # channels_last, in which convolutions are faster in PyTorch; ONNX has no such thing.
        self.dtype = getattr(torch, precision)
        copy = deepcopy(network).eval().requires_grad_(False).to("cpu", self.dtype)
        self.network = copy.to(memory_format=torch.channels_last)
        self.normalise = Normalise(mean, std, torch.device("cpu"))
        self.test_time_flip = test_time_flip
        self.gates = gates

    def forward(self, images: Tensor) -> Outputs:
        """Images (B, 3, H, W) → the outputs by name."""
        x = self.normalise(images).to(self.dtype, memory_format=torch.channels_last)
        with ExitStack() as recording:
            maps = recording.enter_context(recorded_maps(self.network)) if self.gates else {}
            logits = self.network(x)  # (B, classes)
        if self.test_time_flip:
            logits = (logits + self.network(x.flip(3))) / 2
        gates = {f"{block}.{kind}": gate for block, pair in maps.items() for kind, gate in vars(pair).items()}
        return {PROBABILITIES: logits.float().softmax(1), **{n: gate for n, gate in gates.items() if gate is not None}}


@dataclass(frozen=True)
class Graph:
    """What is written to a file."""

    program: torch.export.ExportedProgram
    outputs: list[str]  # names, in their order
    name: str  # of the network, for messages


def trace(network: ExportedNetwork, image_size: int, input_type: InputType, name: str) -> Graph:
    """The graph of a network, for any number of images.

    Raises:
        UserError: torch.export cannot, with the reason.
    """
    example = torch.zeros(2, 3, image_size, image_size, dtype=getattr(torch, input_type))
    try:
        program = _export(network, example, {INPUT: {0: torch.export.Dim("batch", min=1)}})
    except Exception as error:  # whatever a network of the user's may raise, or torch about it
        reason = _reason(error)
        with suppress(Exception):
            _export(network, example, None)
            reason = "its code works for only one batch size; take the batch size from the input's shape"
        raise UserError(f"{name} cannot be exported: {reason}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which are a third of a small network's file
    with torch.no_grad():
        return Graph(program, list(network(example)), name)


def _export(network: nn.Module, example: Tensor, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    with quiet_export(), torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=dynamic_shapes)


def _reason(error: BaseException) -> str:
    """The first line of what an error is caused by."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:_LONGEST_REASON]}" if lines else type(error).__name__


def write_pt2(graph: Graph, metadata: Mapping[str, Any], path: Path) -> None:
    """Write a graph for torch.export.load, with the metadata as JSON in its extra file METADATA_FILE."""
    with quiet_export():
        torch.export.save(graph.program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def read_pt2(path: Path) -> Runner:
    """What runs a file of write_pt2."""
    with quiet_export():
        module = torch.export.load(path).module()

    def run(images: Tensor) -> Outputs:
        with torch.no_grad():
            return module(images)

    return run


def write_onnx(graph: Graph, metadata: Mapping[str, Any], path: Path) -> None:
    """Write a graph for ONNX runtimes, with the metadata as texts, JSON but for what is text already.

    Raises:
        UserError: an operator has no counterpart in ONNX, or the weights are too large for one file.
    """
    try:
        with quiet_export():
            made: Any = torch.onnx.export(
                graph.program,
                input_names=[INPUT],
                output_names=graph.outputs,
                opset_version=OPSET,
                dynamic_shapes={INPUT: {0: "batch"}},  # the name of that dimension, which is dynamic already
                verbose=False,
            )
    except Exception as error:  # whatever the converter raises, which has no class of its own that is public
        raise UserError(f"{graph.name} cannot be converted to ONNX: {_reason(error)}") from error
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    made.model.metadata_props.update(texts)
    for part in (made.model.graph, *made.model.graph):  # the nodes: what they were in PyTorch, longer than the weights
        part.metadata_props.clear()
    with quiet_export():
        made.save(path, external_data=False)
    if path.with_name(f"{path.name}.data").exists():  # of torch's own accord, from 1.5 GiB on
        raise UserError(
            f"{graph.name} has weights that are too large for one ONNX file; use --precision float16 or --format pt2"
        )


def read_onnx(path: Path) -> Runner:
    """What runs a file of write_onnx, in onnxruntime on the CPU, with as many threads as torch has.

    Raises:
        UserError: onnxruntime cannot run it.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no class in common that is public
        raise UserError(f"{path.name} cannot be run by onnxruntime: {_reason(error)}") from error
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Outputs:
        arrays = session.run(names, {INPUT: images.numpy()})
        return dict(zip(names, map(torch.from_numpy, arrays), strict=True))

    return run


def import_onnxruntime() -> Any:
    """The optional package, once all that ONNX needs is there; a UserError that says what to install."""
    try:
        return [import_module(name) for name in ("onnx", "onnxscript", "onnxruntime")][-1]
    except ImportError as error:
        raise UserError("ONNX needs three more packages: pip install onnx onnxscript onnxruntime") from error
