"""Faults, done for real: killed processes, full memory, full disks; docs/reliability.md has what they show."""

import contextlib
import ctypes
import random
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from cbam_pl.training.checkpoint import read_checkpoint
from tests.helpers import RUN, assert_same_run, callbacks, checkpoint, fit, one_line

# Processes


@pytest.mark.slow
def test_kill_at_fifty_moments(launch, recipe, tmp_path):
    output, root = tmp_path / "output", tmp_path / "killed"
    steady = ["--trainer.max_epochs", 8, "--data.batch_size", 16, "--checkpoint_minutes", 1e-5]  # at every step
    process = launch(output, *fit(recipe, tmp_path / "whole", *steady))
    process.join(300)
    assert process.exitcode == 0, output.read_text()

    last = root / "checkpoints" / RUN / "last.ckpt"
    moments = random.Random(0)
    kills = inside = finished = steps = 0
    while kills < 50:
        written = last.stat().st_mtime_ns if last.exists() else 0
        process = launch(output, *fit(recipe, root, *steady, *(["--ckpt_path", "last"] if written else [])))
        # One of five while it starts and reads, two while it trains and writes, two soon after a write has begun.
        if kills % 5 == 0 and written:
            time.sleep(moments.uniform(0, 1.5))
        else:
            begun = last.with_name(f".last.ckpt.{process.pid}")
            while process.is_alive() and not (last.exists() and last.stat().st_mtime_ns != written):
                time.sleep(0.001)
            while process.is_alive() and kills % 5 > 2 and not begun.exists():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.03 if kills % 5 > 2 else 0.3))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before the signal came
            assert_same_run(root, tmp_path / "whole")
            finished, steps = finished + 1, 0
            shutil.rmtree(root)
            continue
        assert process.exitcode == -9, output.read_text()
        kills += 1
        inside += bool(list(last.parent.glob(f".*.ckpt.{process.pid}")))
        for path in last.parent.glob("*.ckpt"):
            read_checkpoint(path)
        reached = read_checkpoint(last)["global_step"]
        assert reached >= steps, "a checkpoint went back"
        steps = reached
    process = launch(output, *fit(recipe, root, *steady, "--ckpt_path", "last"))
    process.join(300)
    assert process.exitcode == 0, output.read_text()
    assert_same_run(root, tmp_path / "whole")
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    print(f"{kills} kills, {inside} of them inside a write, in {finished + 1} trainings")
    assert inside >= 10


@pytest.mark.slow
def test_two_runs_started_at_once_share_nothing(launch, recipe, tmp_path):
    outputs = [tmp_path / f"output{index}" for index in range(2)]
    processes = [launch(output, *fit(recipe, tmp_path / "both")) for output in outputs]
    for process, output in zip(processes, outputs, strict=True):
        process.join(300)
        assert process.exitcode == 0, output.read_text()
    for kind in ("checkpoints", "logs"):
        folder = tmp_path / "both" / kind / "tiny"
        assert sorted(path.name for path in folder.iterdir()) == ["version_0", "version_1"]
        names = [sorted(path.name.split(".")[0] for path in version.iterdir()) for version in folder.iterdir()]
        assert names[0] == names[1]
    # Each is whole, as if alone: moved by itself, it equals the other.
    for kind in ("checkpoints", "logs"):
        (tmp_path / "second" / kind / "tiny").mkdir(parents=True)
        (tmp_path / "both" / kind / "tiny/version_1").rename(tmp_path / "second" / kind / RUN)
    assert_same_run(tmp_path / "second", tmp_path / "both")


@pytest.mark.slow
def test_too_little_memory_says_what_to_lower(launch, recipe, tmp_path):
    # Enough for all but activations, of which one layer's take 268 MB: what meets the limit is one of them, not, by
    # chance, the start of a thread.
    output = tmp_path / "output"
    process = launch(
        output, *fit(recipe, tmp_path, "--model.arch", "resnet18", "--data.image_size", 128, "--data.batch_size", 64),
        limits={resource.RLIMIT_AS: 700_000_000},
    )  # fmt: skip
    process.join(300)
    text = output.read_text()
    assert process.exitcode == 2, text
    assert "Traceback" not in text
    assert "error: out of memory; lower data.batch_size (and raise trainer.accumulate_grad_batches" in text


# Disks


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """A file system of its own at `folder`, by root alone."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, option):
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


class Fill(Callback):
    """Fills a disk where the second epoch begins."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            fill(Path(self.folder))


class FullTable(Callback):
    """Lets metrics.csv lie on a full disk."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        fill(self.folder)
        trainer.logger.table.symlink_to(self.folder / "metrics.csv")


@pytest.mark.slow
def test_a_disk_that_is_full_of_checkpoints(command, recipe, tmp_path):
    assert command(*fit(recipe, tmp_path / "whole")).status == 0
    size = (tmp_path / "whole/checkpoints" / RUN / "last.ckpt").stat().st_size / 2**20
    folder = tmp_path / "full/checkpoints"
    with small_disk(folder, int(2.6 * size)):  # for two, but not for the third, before it replaces one
        error = one_line(command(*fit(recipe, tmp_path / "full")))
        message = rf"cannot write {folder / RUN}/(best|last)\.ckpt \(No space left on device\); [\d.]+ MB are free"
        assert re.search(message, error), error
        assert sorted(path.name for path in (folder / RUN).iterdir()) == ["best.ckpt", "last.ckpt"]
        for name in ("best", "last"):
            assert read_checkpoint(folder / RUN / f"{name}.ckpt")["global_step"] == 3
        remount(folder, f"size={int(4 * size)}m")
        outcome = command(*fit(recipe, tmp_path / "full", "--ckpt_path", "last"))
        assert outcome.status == 0, outcome.err
        assert_same_run(tmp_path / "full", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["events", "metrics.csv"])
def test_a_disk_that_is_full_of_logs(what, command, recipe, tmp_path):
    whole, root = tmp_path / "whole", tmp_path / "full"
    assert command(*fit(recipe, whole)).status == 0
    disk = root / "logs" if what == "events" else tmp_path / "disk"
    callback = Fill if what == "events" else FullTable
    with small_disk(disk, 4):
        error = one_line(command(*fit(recipe, root, *callbacks(callback, folder=disk))))
        path = f"{root}/logs/{RUN}" + ("" if what == "events" else "/metrics.csv")
        message = rf"cannot write {path} \(No space left on device\); [\d.]+ MB are free there"
        assert re.search(message, error), error
        assert not list((root / "logs").rglob(".*.[0-9]*"))
        (disk / "filler").unlink()
        if what == "events":
            # Of a whole epoch, intact: the second, where its points had room in the file's last page.
            assert checkpoint(root)["global_step"] in (3, 6)
            outcome = command(*fit(recipe, root, "--ckpt_path", "last"))
            assert outcome.status == 0, outcome.err
            assert_same_run(root, whole)


def test_a_file_that_may_not_grow(command, recipe, tmp_path):
    """As a full disk, without the rights of root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, before[1]))
    try:
        outcome = command(*fit(recipe, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    path, message = tmp_path / "checkpoints" / RUN / "best.ckpt", r"\(File too large\); [\d,.]+ MB are free there"
    assert re.search(rf"^error: cannot write {path} {message}", outcome.err, re.MULTILINE)
    assert not list(path.parent.iterdir())


@contextlib.contextmanager
def bound_by_permissions():
    """Take from root, for this thread, the right to write where nobody may (CAP_DAC_OVERRIDE)."""
    library = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert library.capget(header, held) == 0
    less = (ctypes.c_uint32 * 6)(*held)
    less[0] &= ~(1 << 1)
    assert library.capset(header, less) == 0
    try:
        yield
    finally:
        assert library.capset(header, held) == 0


IN_THE_WAY = ("file", "link to itself", "link to nothing")
CASES = [
    pytest.param(obstacle, kind, resumed, marks=[pytest.mark.slow] if "link" in obstacle else [])
    for obstacle in (*IN_THE_WAY, "no permission", "read-only disk")
    for kind in ("checkpoints", "logs")
    for resumed in (False, True)
    # In the way of a resumed run's checkpoints, there would be none to resume.
    if not (obstacle in IN_THE_WAY and kind == "checkpoints" and resumed)
]


@pytest.mark.parametrize(("obstacle", "kind", "resumed"), CASES)
def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_step(
    obstacle, kind, resumed, trained, command, recipe, tmp_path
):
    root = tmp_path / "root"
    folder = root / kind
    with contextlib.ExitStack() as stack:
        if obstacle == "read-only disk":
            stack.enter_context(small_disk(folder, 40))
        if resumed:
            shutil.copytree(trained[0], root, dirs_exist_ok=True)
            folder = folder / RUN
        before = sorted(root.rglob("*"))
        if obstacle == "read-only disk":
            remount(root / kind, "ro")
        elif obstacle == "no permission":
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o500)
            stack.enter_context(bound_by_permissions())
        else:
            if resumed:
                shutil.rmtree(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if obstacle == "file":
                folder.write_text("in the way")
            else:
                folder.symlink_to(folder if obstacle == "link to itself" else tmp_path / "nothing")
            before = sorted(root.rglob("*"))
        outcome = command("fit", "--config", recipe, "--trainer.default_root_dir", root, "--trainer.max_epochs", 3,
                          *(["--ckpt_path", "last"] if resumed else []))  # fmt: skip
        error = one_line(outcome)
        assert re.search(rf"run's folder {folder}.*make it writable, or name another", error), error
        assert "figures of an epoch" not in outcome.err, "training had begun"
        left = [path for path in sorted(root.rglob("*")) if path not in before and path.is_file()]
        assert not left
        if obstacle == "no permission":
            folder.chmod(0o700)
