"""Several real processes on the CPU, with gloo."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cbam_pl.environment import missing_to_compile
from tests.helpers import REPOSITORY, free_port

# test_resume.py has two processes in the fast lane.
pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(command, **variables):
    done = subprocess.run(
        [str(word) for word in command], cwd=REPOSITORY, env=ENVIRONMENT | variables, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def worker(image_folder, output, devices, batch_size, what):
    output.mkdir()
    run([sys.executable, "-m", "tests.training.distributed_worker", image_folder, output, devices, batch_size, what])
    return [torch.load(output / f"{rank}.pt") for rank in range(devices)]


@pytest.fixture(scope="module")
def shares(image_folder, tmp_path_factory):
    """What each of two processes trained on, with batches of 16, in two epochs."""
    return worker(image_folder, tmp_path_factory.mktemp("shares") / "out", 2, 16, "share")


def test_each_process_has_its_own_images_and_its_own_draws(shares, image_folder, tmp_path):
    (alone,) = worker(image_folder, tmp_path / "alone", 1, 32, "share")
    images = [share["images"] for share in shares]  # (64, 3, 32, 32) each: 2 epochs of 64 training images
    assert len(images[0]) == len(images[1]) == 64
    # Dealt out in turn, they are the batches of one process, augmentation included.
    for epoch in range(2):
        part = slice(32 * epoch, 32 * (epoch + 1))
        together = torch.stack([images[0][part], images[1][part]], 1).flatten(0, 1)
        assert torch.allclose(together, alone["images"][64 * epoch : 64 * (epoch + 1)], atol=1e-6)
    first_epoch = torch.cat([images[0][:32], images[1][:32]]).flatten(1)
    assert len(first_epoch.unique(dim=0)) == 64  # nobody's image is another's


def test_two_times_32_trains_as_one_times_64(image_folder, tmp_path):
    (alone,) = worker(image_folder, tmp_path / "alone", 1, 64, "steps")
    both = worker(image_folder, tmp_path / "both", 2, 32, "steps")
    for name, value in alone["weights"].items():
        assert torch.equal(both[0]["weights"][name], both[1]["weights"][name]), name
        assert torch.allclose(both[0]["weights"][name], value, atol=2e-6), name


@pytest.mark.parametrize(("stage", "processes"), [("validate", 2), ("test", 3)])
def test_figures_are_those_of_one_process_whatever_the_sizes(trained, tmp_path, stage, processes):
    # 9 validation and 21 test images; in batches of 4 × 1 per process.
    script = (
        "import sys, json, cbam_pl.cli as cli, lightning\n"
        "name = sys.argv[1]; original = getattr(lightning.Trainer, name)\n"
        "def measure(self, *arguments, **options):\n"
        "    original(self, *arguments, **options)\n"
        "    if self.is_global_zero:\n"
        "        print('FIGURES', json.dumps({k: float(v) for k, v in self.callback_metrics.items()}))\n"
        "setattr(lightning.Trainer, name, measure)\n"
        "cli.main(sys.argv[1:])\n"
    )
    program = tmp_path / "measure.py"
    program.write_text(script)
    checkpoint = tmp_path / "best.ckpt"  # away from its run, which other tests look at
    checkpoint.write_bytes((trained[0] / "checkpoints/tiny/version_0/best.ckpt").read_bytes())
    figures = {}
    for count in (1, processes):
        options = ["--ckpt_path", checkpoint, "--data.batch_size", 1, "--trainer.devices", count]
        options += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp" if count > 1 else "auto"]
        printed = run([sys.executable, program, stage, *options], PYTHONPATH=str(REPOSITORY))
        figures[count] = json.loads(re.findall(r"FIGURES (.*)", printed)[-1])
    assert len(figures[1]) == 2
    assert figures[processes] == pytest.approx(figures[1], abs=1e-6)


def test_each_image_is_stored_once_whatever_the_number_of_processes(trained, tmp_path):
    found = {}
    for count in (1, 3):
        root = shutil.copytree(trained[0], tmp_path / str(count))
        options = [
            "--trainer.default_root_dir",
            root,
            "--data.batch_size",
            1,
            "--trainer.devices",
            count,
            "--calibrate",
        ]
        options += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp" if count > 1 else "auto"]
        run([sys.executable, "train.py", "test", *options])
        with np.load(root / "logs/tiny/version_0/test.npz") as file:
            found[count] = dict(file), json.loads((root / "logs/tiny/version_0/test.json").read_text())
    (alone, figures), (together, others) = found.values()
    assert together["image"].tolist() == list(range(21))
    for name, values in alone.items():
        assert together[name] == pytest.approx(values, abs=1e-3 if name == "probabilities" else 1e-5), name
    assert others["confusion"] == figures["confusion"]
    assert others["measures"] == pytest.approx(figures["measures"], abs=1e-6)
    assert others["calibration"]["temperature"] == pytest.approx(figures["calibration"]["temperature"], rel=1e-3)
    assert others["calibration"]["images"] == 9


def test_two_nodes_train_as_one_and_write_one_log_and_one_set_of_checkpoints(recipe, tmp_path):
    port = free_port()
    fit = ["train.py", "fit", "--config", recipe, "--trainer.max_epochs", 1, "--trainer.strategy", "ddp",
           "--trainer.devices", 1]  # fmt: skip
    root = tmp_path / "nodes"
    nodes = [
        subprocess.Popen(
            [str(word) for word in [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", rank,
                "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port,
                *fit, "--trainer.num_nodes", 2, "--trainer.default_root_dir", root,
            ]],
            cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for node in nodes:
        output, _ = node.communicate(timeout=300)
        assert node.returncode == 0, output
    assert [path.name for path in (root / "checkpoints/tiny").iterdir()] == ["version_0"]
    assert [path.name for path in (root / "logs/tiny").iterdir()] == ["version_0"]
    logs, checkpoints = root / "logs/tiny/version_0", root / "checkpoints/tiny/version_0"
    assert len(list(logs.glob("events*"))) == 1
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]
    # One node with two processes takes the same steps.
    run([sys.executable, *fit[:-1], 2, "--trainer.default_root_dir", tmp_path / "one"])
    weights = [
        torch.load(path / "checkpoints/tiny/version_0/last.ckpt")["state_dict"] for path in (root, tmp_path / "one")
    ]
    for name, value in weights[0].items():
        assert torch.allclose(value.float(), weights[1][name].float(), atol=1e-6), name


@pytest.mark.skipif(bool(missing_to_compile("cpu")), reason="no C++ compiler")
def test_compiled_steps_of_two_processes_are_those_of_eager_ones(recipe, tmp_path):
    weights = []
    for compiled in ("true", "false"):
        words = ["fit", "--config", recipe, "--trainer.max_epochs", 1, "--trainer.strategy", "ddp"]
        words += [
            "--trainer.devices",
            2,
            "--trainer.default_root_dir",
            tmp_path / compiled,
            "--model.compile",
            compiled,
        ]
        words += ["--model.optimizer", "SGD", "--model.optimizer.lr", 0.01]  # Adam enlarges differences near zero
        run([sys.executable, "train.py", *words])
        weights.append(torch.load(tmp_path / compiled / "checkpoints/tiny/version_0/last.ckpt")["state_dict"])
    for name, value in weights[0].items():
        assert torch.allclose(value.float(), weights[1][name].float(), atol=1e-5), name


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes through /proc")
@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_killed_process_takes_the_others_down_with_an_error(recipe, tmp_path, victim):
    command = [sys.executable, "train.py", "fit", "--config", recipe, "--trainer.default_root_dir", tmp_path]
    command += ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--trainer.max_epochs", 10_000]
    first = subprocess.Popen(
        [str(word) for word in command], cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        table = tmp_path / "logs/tiny/version_0/metrics.csv"
        deadline = time.monotonic() + 120
        while not table.exists():
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline, "the training did not begin"
            time.sleep(0.2)
        (second,) = descendants(first.pid)
        os.kill(first.pid if victim == "first" else second, signal.SIGKILL)
        killed = time.monotonic()
        survivor = second if victim == "first" else first.pid
        while Path(f"/proc/{survivor}/stat").exists():
            if Path(f"/proc/{survivor}/stat").read_text().rsplit(")")[-1].split()[0] == "Z":
                break
            assert time.monotonic() - killed < 60, f"process {survivor} goes on without the other"
            time.sleep(0.2)
        output, _ = first.communicate(timeout=30)
        assert first.returncode != 0
        assert re.search(r"[Ee]rror|terminated|failed", output), output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
