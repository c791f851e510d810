import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cbam_pl.cli import COMMANDS
from cbam_pl.commands.compare.plan import make_plan, parse_options
from cbam_pl.settings import command_parser, parse_with_recipes
from tests.helpers import REPOSITORY, one_line

# What is wrong → the command, and what its line says. The values that one class rejects are tested with that class.
BAD = {
    "no command": ([], "no command given; use one of fit"),
    "unknown command": (["fitt"], "unknown command 'fitt'; did you mean fit"),
    "rejected by the data's class": (["fit", "--data.batch_size", "0"], "batch_size=0 must be at least 1"),
    "rejected by the network's class": (
        ["fit", "--model.attention.kind", "se", "--model.attention.kernel_size", "3"],
        "kernel_size=3 has no effect with kind='se'",
    ),
    "rejected by the optimizer": (
        ["fit", "--model.optimizer.lr", "-1", "--data.root", "nope"],
        "Invalid learning rate: -1",
    ),
    "cycle that is too short": (
        ["fit", "--config", "{recipe}", "--model.lr_scheduler", "{{class_path: torch.optim.lr_scheduler.OneCycleLR, "
         "init_args: {{max_lr: 0.1, total_steps: 3}}}}", "--model.lr_interval", "step"],
        "total_steps=3 is less than the training's 12",
    ),
    "cycle without an end": (
        ["fit", "--config", "{recipe}", "--model.lr_scheduler", "{{class_path: torch.optim.lr_scheduler.OneCycleLR, "
         "init_args: {{max_lr: 0.1}}}}", "--trainer.max_epochs", "-1"],
        "needs its end; set trainer.max_epochs",
    ),
    "rejected by the Trainer": (["fit", "--trainer.strategy", "foo", "--data.root", "nope"], "strategy"),
    "unknown device": (["fit", "--config", "{recipe}", "--trainer.accelerator", "cuda"], "CUDAAccelerator|cuda"),
    "devices that are no number": (["fit", "--trainer.accelerator", "cpu", "--trainer.devices", "x"], "devices"),
    "precision that is not installed": (["fit", "--trainer.precision", "transformer-engine"], "transformer"),
    "more memory than there is": (
        ["fit", "--model.attention.kernel_size", "10000001"],
        "out of memory; lower .*kernel_size",
    ),
    "missing folder": (["fit", "--data.dataset", "folder", "--data.root", "nope"], "nope"),
    "name that is too long": (["fit", "--data.dataset", "folder", "--data.root", "x" * 5000], "File name too long"),
    "nothing to resume": (["fit", "--config", "{recipe}", "--ckpt_path", "last"], "no last.ckpt of tiny"),
    "no run yet": (["test"], "no best.ckpt under .*train first"),
    "no checkpoint": (["test", "--ckpt_path", "nope.ckpt"], "no checkpoint at nope.ckpt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_status_two(name, command, recipe, tmp_path):
    words, message = BAD[name]
    words = [word.format(recipe=recipe) for word in words]
    if words and words[0] in COMMANDS:
        words += ["--trainer.default_root_dir", tmp_path]
    error = one_line(command(*words))
    assert re.search(message, error), error
    for kind in ("checkpoints", "logs"):
        assert not list((tmp_path / kind).glob("*")), "a rejected run leaves nothing behind"


def test_help_needs_no_torch_and_names_the_program_as_it_is_installed():
    script = "import sys; sys.argv = ['bin/cbam-pl', '--help']; import cbam_pl.cli as cli; cli.main(); "
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: cbam-pl COMMAND [OPTIONS]")
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("name", ["fit", "compare"])  # which have a parser each
def test_the_help_of_a_command_names_the_program_as_it_is_installed(name):
    script = f"import sys; sys.argv = ['bin/cbam-pl', '{name}', '--help']; import cbam_pl.cli as cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: cbam-pl {name} ")
    assert "train.py" not in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_output_that_cannot_be_written_is_one_line():
    words = [sys.executable, "train.py", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device: 'standard output'\n")


def test_ctrl_c_before_the_first_step_says_so(command, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("cbam_pl.commands.fit.fit", interrupt)
    outcome = command("fit")
    assert (outcome.status, outcome.err) == (130, "interrupted outside of the training; there is nothing to save\n")


def test_the_help_of_a_class_stands_beside_other_options(command):
    outcome = command("fit", "--seed", 3, "--trainer.strategy.help", "--data", "{batch_size: 3}")
    assert (outcome.status, outcome.err) == (0, "")
    assert "--trainer.strategy.accelerator" in outcome.out


def readme_commands():
    """The commands of the README that run train.py, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "train.py" in line]


def test_the_make_targets_of_the_readme_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", (REPOSITORY / "README.md").read_text()))
    assert {"train", "test", "test-all"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("line", readme_commands())
def test_commands_of_the_readme_parse(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line)
    command, *options = words[words.index("train.py") + 1 :]
    assert command in COMMANDS
    if command == "compare":
        make_plan(*parse_options(options))
    else:
        parse_with_recipes(command_parser(command), options)
