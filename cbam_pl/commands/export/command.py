"""The command: read a checkpoint, write what was asked for, and verify it before it is kept."""

import os
import shlex
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from cbam_pl.commands.export.graph import (
    INPUT,
    OPSET,
    PROBABILITIES,
    ExportedNetwork,
    Graph,
    Outputs,
    Runner,
    import_onnxruntime,
    read_onnx,
    read_pt2,
    trace,
    write_onnx,
    write_pt2,
)
from cbam_pl.commands.export.weights import read_record, write_pretrained
from cbam_pl.data.datamodule import data_for_test, in_proportion
from cbam_pl.data.folder import show, stored_size
from cbam_pl.data.loader import Normalise
from cbam_pl.environment import describe_environment, processor_name
from cbam_pl.errors import UserError, as_user_error, cannot_write
from cbam_pl.inspect.gates import attention_maps, attention_modules
from cbam_pl.settings import command_parser, given_data, parse
from cbam_pl.tables import print_table
from cbam_pl.timing import time_in_turns
from cbam_pl.training.checkpoint import find_checkpoint, load_classifier, network_name
from cbam_pl.training.classifier import Classifier

_FILES = {"pt2": "model.pt2", "onnx": "model.onnx"}
_WRITERS: dict[str, Callable[[Graph, Mapping[str, Any], Path], None]] = {"onnx": write_onnx, "pt2": write_pt2}
_READERS: dict[str, Callable[[Path], Runner]] = {"onnx": read_onnx, "pt2": read_pt2}
_OF_FILES = ("--gates", "--input_type", "--benchmark", "--model.", "--data.")  # options of only these two formats
NUM_IMAGES = 64  # that a file is verified on
# The largest difference from the checkpoint, in float32, that any output may have. Half precision has three digits.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2}
_MORE_MEMORY = "end other programs, or export on a machine that has more"
_BATCH_SIZES, _ROUNDS, _SECONDS = (1, 64), 5, 0.5  # of the benchmark; the seconds are those of a round, at least


def export(options: list[str]) -> None:
    """Write a checkpoint's network, by the command line's options: as one file, or as a folder of weights."""
    parser = command_parser("export")
    settings = parse(parser, options)
    path, checkpoint = find_checkpoint(Path(settings.trainer.default_root_dir), settings.ckpt_path)
    output = Path(settings.output).expanduser()
    if settings.format == "safetensors":
        for key in (word.partition("=")[0] for word in options):
            if key.startswith(_OF_FILES):
                raise UserError(f"{key} has no effect with --format safetensors; leave it out")
        with as_user_error(_MORE_MEMORY):
            print(*write_pretrained(path, output, settings.precision, settings.trust, settings.licence), sep="\n")
        return
    _check_output(output)
    if settings.format == "onnx" or settings.benchmark:
        import_onnxruntime()
    with as_user_error(_MORE_MEMORY):
        _export_file(path, checkpoint, settings, output)


def _export_file(path: Path, checkpoint: dict[str, Any], settings: Namespace, output: Path) -> None:
    """Write the network as one file, once that was run and agrees with the checkpoint."""
    classifier = load_classifier(path, checkpoint, settings.model.test_time_flip, settings.trust).eval()
    metadata = _describe(path, checkpoint, classifier, settings)
    print(f"exporting {path}: {metadata['network']}, attention {metadata['attention']}, epoch {metadata['epoch']}")
    pixels, images = _verification_images(checkpoint, given_data(settings))
    expected = _outputs_of(path, checkpoint, classifier, pixels, settings.gates)
    statistics = metadata["mean"], metadata["std"]
    network = ExportedNetwork(
        classifier.network, *statistics, classifier.test_time_flip, settings.gates, settings.precision
    )
    graph = trace(network, metadata["image_size"], settings.input_type, metadata["network"])
    inputs = pixels.float() / 255 if settings.input_type == "float32" else pixels
    runners: dict[str, Runner] = {"PyTorch": network}
    name = _FILES[settings.format]
    # In a folder of its own beside the output, so that nothing is left of a file that is rejected or incomplete.
    beside = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=beside) as scratch:
            for kind in _FILES if settings.benchmark else [settings.format]:
                file = Path(scratch) / _FILES[kind]
                _WRITERS[kind](graph, metadata, file)
                runners[kind] = _READERS[kind](file)
                _verify(file.name, runners[kind], inputs, expected, settings.precision, images)
            output.mkdir(parents=True, exist_ok=True)
            os.replace(Path(scratch) / name, output / name)
    except OSError as error:
        raise cannot_write(output, error, "name another folder with --output") from error
    size = (output / name).stat().st_size / 1e6
    kind = f"ONNX, opset {OPSET}" if settings.format == "onnx" else "torch.export"
    print(f"{output / name}: {size:.2f} MB, {kind}, {settings.precision}; {_interface(graph, metadata)}")
    if settings.benchmark:
        _benchmark(runners, inputs, settings.precision)


def _check_output(output: Path) -> None:
    """Reject a folder with other content, before anything is computed."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is not a folder; name a folder")
    others = [one.name for one in output.glob("*") if one.name not in _FILES.values() and not one.name.startswith(".")]
    if others:
        raise UserError(f"--output {output} holds other files, such as {min(others)}; name another folder")


def _verification_images(checkpoint: dict[str, Any], given: dict[str, Any]) -> tuple[Tensor, str]:
    """NUM_IMAGES test images, evenly chosen, (N, 3, H, W) uint8, or noise where they are not at hand; and its name."""
    data = data_for_test(checkpoint, given)
    reason = f"no test images of {data.dataset} in {show(data.root)}"
    if data.is_at_hand():
        try:
            data.prepare_data()
            data.setup("test")
            test = data.images("test")
            count = min(NUM_IMAGES, len(test))
            return test.take(torch.arange(count) * len(test) // count), f"{count} test images of {data.dataset}"
        except UserError as error:
            reason = str(error)
    print(f"{reason}, so the file is verified on noise")
    shape = (NUM_IMAGES, 3, data.image_size, data.image_size)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return noise, f"{NUM_IMAGES} images of noise"


def _outputs_of(
    path: Path, checkpoint: dict[str, Any], classifier: Classifier, pixels: Tensor, with_gates: bool
) -> Outputs:
    """What `predict` computes of pixels (N, 3, H, W) uint8, and the gates, by name, as a file should give them."""
    data = checkpoint["ImageDataModule"]
    inputs = Normalise(data["mean"], data["std"], torch.device("cpu"))(pixels)
    if with_gates and not attention_modules(classifier.network):
        raise UserError(f"--gates: the network of {path} has none; leave it out")
    with torch.no_grad():
        outputs = {PROBABILITIES: classifier.predict_step((inputs, torch.zeros(len(inputs))), 0)}
    if not outputs[PROBABILITIES].isfinite().all():
        raise UserError(f"{path} gives probabilities that are not finite: it has diverged; choose an earlier one")
    for block, maps in attention_maps(classifier.network, inputs).items() if with_gates else ():
        outputs |= {f"{block}.{kind}": gate for kind, gate in vars(maps).items() if gate is not None}
    return outputs


def _describe(path: Path, checkpoint: dict[str, Any], classifier: Classifier, settings: Namespace) -> dict[str, Any]:
    """The metadata of a file: what goes in and comes out, where the network is from, and how good it was measured."""
    data, model = checkpoint["ImageDataModule"], checkpoint["hyper_parameters"]
    environment, record = describe_environment(torch.device("cpu")), read_record(path, checkpoint)
    proportional = in_proportion(checkpoint["datamodule_hyper_parameters"])
    described = {
        "classes": data["classes"],
        "mean": data["mean"],
        "std": data["std"],
        "image_size": model["image_size"],
        "shorter_side": stored_size(model["image_size"]) if proportional else None,
        "input_type": settings.input_type,
        "precision": settings.precision,
        "test_time_flip": classifier.test_time_flip,
        "network": network_name(model),
        "attention": model["attention"]["kind"],
        "epoch": checkpoint["epoch"] + 1,
        **{name: record[name] for name in ("recipe", "version", "seed")},
        "trained": record["date"],
        "licence": settings.licence or record.get("licence"),
        **{name: environment[name] for name in ("versions", "commit", "date")},  # of the export
    }
    # Of these very weights, where a folder of weights has both, and only of predictions that are made as the file's.
    tested = record["stored"] if "figures" in (record.get("stored") or {}) else record["test"] or {}
    if tested and classifier.test_time_flip == tested.get("test_time_flip", model.get("test_time_flip", False)):
        described |= {"test_accuracy": tested["figures"]["accuracy"], "test_images": tested["images"]}
        described |= {"test_options": shlex.join(tested.get("options", ()))}
        described |= {"test_commit": tested["environment"]["commit"]}
    return {name: value for name, value in described.items() if value is not None}


def _verify(name: str, run: Runner, inputs: Tensor, expected: Outputs, precision: str, images: str) -> None:
    """Reject a file that does not give what the checkpoint gives, for a batch of one image and one of all others."""
    parts = [run(part) for part in (inputs[:1], inputs[1:]) if len(part)]
    largest = {name: (torch.cat([part[name] for part in parts]) - one).abs().max() for name, one in expected.items()}
    differences = {PROBABILITIES: float(largest.pop(PROBABILITIES))}
    if largest:
        differences["gates"] = float(torch.stack([*largest.values()]).max())  # NaN, if any is
    tolerance = TOLERANCES[precision]
    text = ", ".join(f"{kind} {value:.1e}" for kind, value in differences.items())
    if not all(value <= tolerance for value in differences.values()):
        fix = "; use --precision float32" if precision == "float16" else ""
        raise UserError(
            f"{name} differs from the checkpoint by more than {tolerance:.0e} on {images} ({text}), so it was "
            f"removed{fix}"
        )
    print(f"{name}: largest difference from the checkpoint on {images}: {text} (at most {tolerance:.0e} is accepted)")


def _interface(graph: Graph, metadata: Mapping[str, Any]) -> str:
    size = metadata["image_size"]
    values = "float32 in [0, 1]" if metadata["input_type"] == "float32" else "uint8"
    gates = len(graph.outputs) - 1
    beside = f" and {gates} gates" if gates else ""
    return f"{INPUT} (B, 3, {size}, {size}) {values} → {PROBABILITIES} (B, {len(metadata['classes'])}){beside}"


def _benchmark(runners: Mapping[str, Runner], inputs: Tensor, precision: str) -> None:
    """Print how long each way to run the network takes, in turns."""
    rows = []
    for size in _BATCH_SIZES:
        batch = inputs[torch.arange(size) % len(inputs)]
        with torch.no_grad():
            works = {name: partial(run, batch) for name, run in runners.items()}
            times = time_in_turns(works, _ROUNDS, _SECONDS, torch.device("cpu"))
        milliseconds = [[1000 * one for one in times[name]] for name in runners]
        rows.append([str(size), *(f"{median(one):.2f} ({min(one):.2f}–{max(one):.2f})" for one in milliseconds)])
    threads = torch.get_num_threads()
    print(
        f"milliseconds a batch on the CPU ({processor_name()}; threads: {threads}), {precision}: median (least–most) "
        f"of {_ROUNDS} rounds in turns"
    )
    labels = {"onnx": "onnxruntime"}
    print_table(["images", *(labels.get(name, name) for name in runners)], rows)
