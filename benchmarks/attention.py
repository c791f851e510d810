"""What attention costs: python -m benchmarks.attention (one layer), python -m benchmarks.attention --part networks

Every kind against none, and our CBAM of timm's form (preset timm, with batch norm, which the paper's has not) against
timm's CbamModule, with the time that the bytes alone would take: a forward pass must read its input and write its
output once, a backward pass read input and gradient and write one gradient.

    python -m benchmarks.attention --dtypes bfloat16                       the layers in bfloat16
    python -m benchmarks.attention --kinds se spatial eca --modes eager    other kinds
    python -m benchmarks.attention --part networks --archs resnet18        training steps and their memory
"""

import argparse
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import (
    RoundClock,
    Spread,
    Table,
    machine,
    parser,
    ratio,
    report,
    take_turns,
)
from cbam_pl.attention import CBAM, AttentionConfig, AttentionKind
from cbam_pl.models import build_network
from cbam_pl.process import keep_freed_memory
from cbam_pl.timing import time_in_turns

SHAPES = {  # arch → (channels, height and width) of each attention's input, for images of 32×32
    "resnet18": [(64, 32), (128, 16), (256, 8), (512, 4)],
    "resnet20": [(16, 32), (32, 16), (64, 8)],
    "cnn": [(32, 16), (64, 8), (128, 4)],
}
TIMMS_FORM = "cbam_of_timms_form"  # ours; kind timm is timm's own
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _build(kind: str, channels: int) -> nn.Module:
    if kind == "timm":
        from timm.layers.cbam import CbamModule  # noqa: PLC0415  # which may be missing where the others are timed

        return CbamModule(channels, spatial_kernel_size=7)
    if kind == TIMMS_FORM:
        return CBAM(channels, preset="timm")
    return AttentionConfig(kind=kind).build(channels)  # type: ignore[arg-type]  # one of the choices


def _compiled(layer: Callable[[Tensor], Tensor], mode: str) -> Callable[[Tensor], Tensor]:
    # As one graph or with an error, so that no figure called compiled is an eager one.
    return torch.compile(layer, dynamic=False, fullgraph=True) if mode == "compiled" else layer


def layer_calls(
    kind: str, channels: int, x: Tensor, dtype: torch.dtype, mode: str
) -> tuple[Callable[[], Tensor], Callable[[], None], str]:
    """The forward pass without gradients; forward and backward; and the memory of the latter. x (B, C, H, W)."""
    torch.manual_seed(0)
    layer = _build(kind, channels).to(x.device, dtype, memory_format=torch.channels_last).train()
    run = _compiled(layer, mode)
    leaf = x.clone().requires_grad_()
    gradient = torch.ones_like(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(x)

    def both() -> None:
        leaf.grad = None
        run(leaf).backward(gradient)

    both()
    return forward, both, _layer_memory(lambda: run(leaf), x)


def _layer_memory(forward_with_graph: Callable[[], Any], x: Tensor) -> str:
    """What the forward pass keeps for the backward one, its input included, in units of the input."""
    kept: dict[int, int] = {}  # storage → bytes

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward_with_graph()  # held, so that no storage's address is used twice
    del output
    return f"{sum(kept.values()) / x.nbytes:.1f}"


def layers(options: argparse.Namespace) -> list[Table]:
    """One table for each precision: time of each kind at each shape."""
    device = torch.device(options.device)
    keep_freed_memory()
    tables = []
    for name in options.dtypes:
        rows: list[list[Any]] = []
        best: dict[tuple[int, int], dict[str, float]] = {}
        compared = [TIMMS_FORM, "timm"] if "cbam" in options.kinds else []
        for arch in options.archs:
            for channels, size in SHAPES[arch]:
                # Every shape is compiled for itself; of one function dynamo compiles eight at most, then none.
                torch.compiler.reset()
                x = torch.randn(options.batch_size, channels, size, size, device=device, dtype=_DTYPES[name])
                x = x.to(memory_format=torch.channels_last)
                y = torch.empty_like(x)
                functions: dict[str, Callable[[], Any]] = {"copy": lambda x=x, y=y: y.copy_(x)}  # type: ignore[misc]
                memory = {}
                for mode in options.modes:
                    for kind in [*options.kinds, *compared]:
                        key = f"{kind} {mode}"
                        forward, both, memory[key] = layer_calls(kind, channels, x, _DTYPES[name], mode)
                        functions[f"{key} forward"], functions[f"{key} both"] = forward, both
                times = time_in_turns(functions, options.rounds, options.seconds, device)
                # One copy reads and writes once, as the forward pass must; the backward pass has half as much again.
                copy = Spread.of(times["copy"]).median
                fastest = best.setdefault((channels, size), {})
                for key, held in memory.items():
                    kind = key.split()[0]
                    forward_time, both_time = (Spread.of(times[f"{key} {part}"]).median for part in ("forward", "both"))
                    fastest[kind] = min(fastest.get(kind, float("inf")), both_time)
                    microseconds = [f"{1e6 * time:,.0f}" for time in (forward_time, copy, both_time, 2.5 * copy)]
                    rows.append([f"{arch} {channels}×{size}×{size}, {key}", *microseconds, held])
                if compared:
                    quotient = fastest[TIMMS_FORM] / fastest["timm"]
                    rows.append([f"our CBAM of timm's form ÷ timm's, each at its best: {quotient:.2f}", *[""] * 5])
        columns = [
            "layer",
            "forward, µs",
            "bytes alone",
            "forward + backward, µs",
            "bytes alone",
            "kept for backward ÷ input",
        ]
        tables.append(Table(f"{name}, batches of {options.batch_size}, channels_last", columns, rows))
    return tables


def training_steps(clock: RoundClock, arch: Any, kind: AttentionKind, mode: str, dtype: str, batch_size: int) -> None:
    """Training steps of a whole network on one batch."""
    keep_freed_memory()
    torch.manual_seed(0)
    device = clock.device
    network = build_network(arch, 10, kind).to(device, memory_format=torch.channels_last)
    run = _compiled(network.forward, mode)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)  # as in the recipes
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(run(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.step(batch_size)


def networks(options: argparse.Namespace) -> list[Table]:
    """One table for each precision: training steps of each network with each kind and without."""
    tables = []
    for name in options.dtypes:
        rows = []
        for arch in options.archs:
            variants = {
                (kind, mode): (
                    training_steps,
                    {"arch": arch, "kind": kind, "mode": mode, "dtype": name, "batch_size": options.batch_size},
                )
                for mode in options.modes
                for kind in ["none", *options.kinds]
            }
            measured = take_turns(
                {" ".join(key): work for key, work in variants.items()},
                options.rounds, options.seconds, options.threads, options.device,
            )  # fmt: skip
            for kind, mode in variants:
                one, none = measured[f"{kind} {mode}"], measured[f"none {mode}"]
                time = ratio(none.rates, one.rates)
                rows.append(
                    [f"{arch} {kind}, {mode}", Spread.of(one.rates), time.text(2), f"{one.memory:,.0f}",
                     f"{one.memory / none.memory:.2f}"]
                )  # fmt: skip
        columns = ["network", "images/s", "time of a step ÷ none", "peak memory, MB", "÷ none"]
        tables.append(Table(f"training steps in {name}, batches of {options.batch_size}", columns, rows))
    return tables


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", rounds=3, seconds=0.2)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = [kind for kind in get_args(AttentionKind) if kind != "none"]
    options.add_argument("--part", choices=["layers", "networks"], default="layers", help="default: %(default)s")
    options.add_argument("--archs", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--kinds", nargs="+", choices=kinds, default=["cbam"], help="default: cbam")
    options.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    options.add_argument("--dtypes", nargs="+", choices=list(_DTYPES), default=["float32"], help="default: float32")
    options.add_argument("--batch_size", type=int, default=64, help="images (default: %(default)s)")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    header = machine(given.device, given.threads)
    if given.part == "networks":
        given.seconds = max(given.seconds, 2.0)  # a step of a ResNet takes a second on a CPU
    report(header, (layers if given.part == "layers" else networks)(given), given.json)


if __name__ == "__main__":
    main()
