"""The command line: `python train.py fit --config configs/cbam_cnn.yaml`, then `python train.py test`."""

import difflib
import errno
import os
import sys
from importlib import import_module
from pathlib import Path

# How the user started it: from a clone, or, where it is installed, by its own name.
PROGRAM = "cbam-pl" if Path(sys.argv[0]).name == "cbam-pl" else "python train.py"

# Command → the file of its function, which is imported only when it is called: help and mistakes answer at once.
COMMANDS = {
    "fit": ("fit", "train a network: --config configs/cbam_cnn.yaml; resume with --ckpt_path last"),
    "test": ("evaluate", "measure a checkpoint on the test images; by default the newest best.ckpt"),
    "validate": ("evaluate", "measure a checkpoint on the validation images; by default the newest best.ckpt"),
    "predict": ("predict", "classify your own images: --images FILE_OR_FOLDER ..."),
    "visualize": ("visualize.command", "draw attention, Grad-CAM and curves of a checkpoint; --measure gives numbers"),
    "export": ("export.command", "write a network for use elsewhere: --format onnx | pt2 | safetensors --output DIR"),
    "compare": (
        "compare.command",
        "train recipes with several seeds, and report whether they differ, at what cost",
    ),
}


# Read once, when torch is loaded: how often a thread looks whether the others are done before it sleeps. By default
# 300,000 times, milliseconds in which it may keep a core from the very thread that it waits for; with another program
# on one of two cores, steps took over ten times as long (benchmarks/NOTES.md).
WAITING = {"GOMP_SPINCOUNT": "30000"}


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process: status 0 when done, 2 with one line for what the user can fix."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else ""
    try:
        if command in ("-h", "--help"):
            print(f"usage: {PROGRAM} COMMAND [OPTIONS]\n\nTrain, evaluate and inspect CIFAR attention networks.\n")
            print("commands:", *(f"  {name:<13}{text}" for name, (_, text) in COMMANDS.items()), sep="\n")
            print(f"\noptions of a command: {PROGRAM} COMMAND --help")
        elif command in COMMANDS:
            _run(command, arguments[1:])
        else:
            near = difflib.get_close_matches(command, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)} ({PROGRAM} --help)"
            _fail(f"unknown command {command!r}; {hint}" if command else f"no command given; {hint}")
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted outside of the training; there is nothing to save", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python does not try again when it ends
        if error.errno == errno.EPIPE:
            sys.exit(128 + 13)  # as after SIGPIPE: `| head` has read enough
        name = str(error.filename or "standard output")
        _fail(f"{error.strerror}: {name[:300]!r}{'…' if len(name) > 300 else ''}")  # such as a name that is too long


def _run(command: str, options: list[str]) -> None:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(WAITING | os.environ)  # what is set already stays
    from cbam_pl.errors import Interrupted, UserError
    from cbam_pl.process import configure_process

    try:
        configure_process()
        getattr(import_module(f"cbam_pl.commands.{COMMANDS[command][0]}"), command)(options)
    except UserError as error:
        _fail(str(error))
    except Interrupted as interruption:
        sys.exit(128 + interruption.number)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
