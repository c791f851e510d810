"""Images per second of a notebook's loop, of this program and of its parts: python -m benchmarks.throughput

By default configs/cbam_cnn.yaml on generated shapes, about six minutes on two cores. On CIFAR-10, and for a GPU:

    python -m benchmarks.throughput --data.dataset cifar10 --data.root data
    python -m benchmarks.throughput --device cuda --seconds 8

Options with a dot are those of `train.py fit`.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.io import write_png

from benchmarks import variants as loops
from benchmarks.measure import Measurement, Spread, Table, machine, parser, ratio, report, take_turns
from cbam_pl.data.folder import load_folder
from cbam_pl.data.shapes import load_shapes

_LARGE_BATCH = 512
_NUM_TRAIN, _NUM_TEST = 5_120, 512  # a tenth is held out; batches of 64 and of 512 divide the rest


def shapes_as_files(root: Path) -> list[str]:
    """Write generated shapes as PNG files, as a user's own images come. Returns the options of `fit` that read them."""
    source = load_shapes(0, _NUM_TRAIN, _NUM_TEST)
    for split, images in (("train", source.train), ("test", source.test)):
        for name in source.classes:
            (root / split / name).mkdir(parents=True)
        for index, label in enumerate(images.labels.tolist()):
            write_png(images.pixels[index], str(root / split / source.classes[label] / f"{index}.png"))
    load_folder(str(root))  # decodes once, so that the children find the cache
    return ["--data.dataset", "folder", "--data.root", str(root), "--data.val_size", str(_NUM_TRAIN // 10)]


def _groups(options: list[str], root: Path) -> list[dict[str, tuple[Callable[..., None], dict[str, Any]]]]:
    """Name → loop and its arguments, in groups whose rounds are interleaved.

    Each loop is a process with most of a gigabyte: all at once would not fit on a small machine.
    """

    def ours(*more: str) -> dict[str, Any]:
        return {"options": [*options, *more]}

    def fit(name: str, *more: str) -> dict[str, Any]:
        return ours("--trainer.default_root_dir", str(root / name), *more)

    large = ("--data.batch_size", str(_LARGE_BATCH))
    bfloat16 = ("--trainer.precision", "bf16-mixed")
    without = ("--model.attention", '{"kind": "none"}')
    end_to_end = {
        "plain loop, 0 workers": (loops.plain_loop, ours() | {"workers": 0}),
        "plain loop, 2 workers": (loops.plain_loop, ours() | {"workers": 2}),
        "fit": (loops.fit, fit("fit")),
        "fit, bf16-mixed": (loops.fit, fit("fit_bf16", *bfloat16)),
        "bare loop": (loops.bare_loop, ours() | {"bfloat16": False}),
        "bare loop, memory handed back": (loops.bare_loop, ours() | {"bfloat16": False, "keep_memory": False}),
    }
    networks = {
        "network alone": (loops.network_alone, ours() | {"bfloat16": False}),
        "network alone, no attention": (loops.network_alone, ours(*without) | {"bfloat16": False}),
        "naive network alone": (loops.naive_network_alone, ours()),
        "network alone, bfloat16": (loops.network_alone, ours() | {"bfloat16": True}),
    }
    large_batches = {
        f"fit, batch {_LARGE_BATCH}": (loops.fit, fit("fit_large", *large)),
        f"bare loop, batch {_LARGE_BATCH}": (loops.bare_loop, ours(*large) | {"bfloat16": False}),
    }
    data = {
        "data alone": (loops.our_data, ours()),
        "plain loop's data alone": (loops.plain_data, ours()),
    }
    return [end_to_end, networks, large_batches, data]


def _ratios(measured: dict[str, Measurement], device: str) -> list[list[Any]]:
    """Label, what is asked on two CPU cores and on a GPU, and the ratio, of all pairs that were measured."""
    plain = ["plain loop, 0 workers", "plain loop, 2 workers"]
    best = max((name for name in plain if name in measured), key=lambda name: Spread.of(measured[name].rates).median)
    pairs = [
        ("fit ÷ plain loop, 0 workers", "fit", plain[0], "≥ 1.8", "≥ 20"),
        (f"fit ÷ the best plain loop ({best.split(', ')[1]})", "fit", best, "≥ 1.8", "≥ 8"),
        ("fit with bf16-mixed ÷ plain loop, 0 workers", "fit, bf16-mixed", plain[0], "≥ 2.2", ""),
        ("time of a training step, with attention ÷ without", "network alone, no attention", "network alone",
         "≤ 1.25", "≤ 1.25"),
        ("fit ÷ bare loop", "fit", "bare loop", "≥ 0.90", "≥ 0.80"),
        (f"the same, batch {_LARGE_BATCH}", f"fit, batch {_LARGE_BATCH}", f"bare loop, batch {_LARGE_BATCH}",
         "≥ 0.97", "≥ 0.95"),
        ("data alone ÷ plain loop's data alone", "data alone", "plain loop's data alone", "≥ 4", "≥ 200"),
        ("bare loop ÷ the same with memory handed back", "bare loop", "bare loop, memory handed back", "", ""),
        ("network alone ÷ naive network alone", "network alone", "naive network alone", "", ""),
    ]  # fmt: skip
    rows = []
    for label, above, below, cpu, cuda in pairs:
        spread = ratio(measured[above].rates, measured[below].rates)
        rows.append([label, spread.text(2), cuda if device == "cuda" else cpu])
    return rows


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", rounds=4, seconds=3.0)
    options.add_argument("--config", default="configs/cbam_cnn.yaml", help="the recipe (default: %(default)s)")
    given, recipe_options = options.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = "as given"
        if not any(option.startswith("--data.root") for option in recipe_options):
            recipe_options += shapes_as_files(root / "shapes")
            data = f"{_NUM_TRAIN:,} generated shapes, as PNG files"
        header = machine(given.device, given.threads) | {"recipe": given.config, "data": data}
        config = shutil.copy(given.config, root)  # the runs of a recipe of this name go below `root`
        measured: dict[str, Measurement] = {}
        for group in _groups(["--config", config, *recipe_options], root):
            measured |= take_turns(group, given.rounds, given.seconds, given.threads, given.device)
    rates = [[name, Spread.of(one.rates), f"{one.memory:,.0f}"] for name, one in measured.items()]
    kind = "on the device" if given.device == "cuda" else "resident"
    title = f"images/s: median of {given.rounds} interleaved rounds of {given.seconds} s (lowest to highest)"
    tables = [
        Table(title, ["loop", "images/s", f"peak memory {kind}, MB"], rates),
        Table(
            "ratios, round by round", ["ratio", "median (lowest to highest)", "asked"], _ratios(measured, given.device)
        ),
    ]
    report(header, tables, given.json)


if __name__ == "__main__":
    main()
