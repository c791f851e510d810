"""The command line: `python train.py fit --config configs/cbam_cnn.yaml`, then `python train.py test`."""

import difflib
import sys
from importlib import import_module

# Command → where its function is, which is imported only when it is called: help and mistakes answer at once.
COMMANDS = {
    "fit": ("cbam_pl.commands.fit", "train a network: --config configs/cbam_cnn.yaml; resume with --ckpt_path last"),
    "test": ("cbam_pl.commands.evaluate", "measure a checkpoint on the test images; by default the newest run's best"),
    "validate": (
        "cbam_pl.commands.evaluate",
        "measure a checkpoint on the validation images; by default the newest run's best",
    ),
    "predict": ("cbam_pl.commands.predict", "classify your own images: --images FILE_OR_FOLDER ..."),
    "visualize": (
        "cbam_pl.commands.visualize",
        "draw features, attention, Grad-CAM and curves of a checkpoint; --measure gives numbers",
    ),
    "compare": (
        "cbam_pl.commands.compare.command",
        "train several recipes with several seeds, and report whether they differ, how surely, at what cost",
    ),
}


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 4
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python train.py COMMAND [OPTIONS]",
            "",
            "Train, evaluate and inspect CIFAR attention networks.",
            "",
            "commands:",
            *lines,
            "",
            "options of a command: python train.py COMMAND --help",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process: status 0 when done, 2 with one line for what the user can fix."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print(_overview())
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)} (python train.py --help)"
        _fail(f"unknown command {command!r}; {hint}" if command else f"no command given; {hint}")
    try:
        _run(command, arguments[1:])
    except KeyboardInterrupt:
        print("interrupted before the first step; there is nothing to save", file=sys.stderr)
        sys.exit(130)


def _run(command: str, options: list[str]) -> None:
    from cbam_pl.errors import Interrupted, UserError
    from cbam_pl.process import configure_process

    try:
        configure_process()
        getattr(import_module(COMMANDS[command][0]), command)(options)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        name = str(error.filename)
        _fail(f"{error.strerror}: {name[:300]!r}{'…' if len(name) > 300 else ''}")  # such as a name that is too long
    except Interrupted as interruption:
        sys.exit(128 + interruption.number)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
