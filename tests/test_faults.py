"""Faults, done for real: killed processes, full disks, broken checkpoints; docs/reliability.md has what they show."""

import contextlib
import ctypes
import io
import random
import re
import resource
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cbam_pl.errors import UserError, is_out_of_memory
from cbam_pl.training.run import AtomicCheckpointIO, read_checkpoint
from tests.helpers import assert_equal, assert_same_run, checkpoint, fit

RUN = "tiny/version_0"
KILLS = 50


def one_line(outcome):
    """The error of a command that ended as a user's mistake should."""
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err, outcome.err
    (line,) = re.findall("^error: .*$", outcome.err, re.MULTILINE)
    assert outcome.err.endswith(f"{line}\n")
    return line


# Processes


def test_kill_at_fifty_moments(launch, recipe, tmp_path, record_property):
    output, root = tmp_path / "output", tmp_path / "killed"
    steady = ["--trainer.max_epochs", 8, "--data.batch_size", 16, "--checkpoint_minutes", 1e-5]  # at every step
    process = launch(output, *fit(recipe, tmp_path / "whole", *steady))
    process.join(300)
    assert process.exitcode == 0, output.read_text()

    last = root / "checkpoints" / RUN / "last.ckpt"
    moments = random.Random(0)
    kills = inside = finished = steps = 0
    while kills < KILLS:
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
    assert inside >= KILLS // 5


def test_at_most_checkpoint_minutes_are_lost(command, recipe, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 25))  # each step takes 25 seconds
    now = [0.0]

    class Tick(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            now[0] = float(next(clock)) + 25

    saved = []
    save = AtomicCheckpointIO.save_checkpoint

    def spy(self, content, path, storage_options=None):
        saved.append((Path(path).name, content["global_step"]))
        save(self, content, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", spy)
    monkeypatch.setattr("cbam_pl.training.callbacks.time.monotonic", lambda: now[0])
    monkeypatch.setattr("tests.test_faults.Tick", Tick, raising=False)
    outcome = command("fit", "--config", recipe, "--trainer.default_root_dir", tmp_path, "--checkpoint_minutes", 1,
                      "--trainer.callbacks", "[tests.test_faults.Tick]")  # fmt: skip
    assert outcome.status == 0, outcome.err
    # Epochs of six steps; the first step that ends more than a minute after the last write is the third.
    assert [step for name, step in saved if name == "last.ckpt"] == [3, 6, 9, 12]


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
    assert "error: out of memory; lower data.batch_size, and raise trainer.accumulate_grad_batches" in text


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes.",
        "CUDA out of memory. Tried to allocate 20.00 GiB.",
        "could not create a primitive",  # oneDNN's convolution
        "std::bad_alloc",
    ],
)
def test_every_library_s_word_for_too_little_memory_is_known(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Poison(Callback):
    """Breaks a weight at an optimizer step, as an overflow would."""

    last_step = 0

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Poison.last_step = trainer.global_step + 1
        if Poison.last_step == self.step:
            pl_module.network.classifier[-1].weight.data.fill_(float("nan"))


@pytest.mark.parametrize("minutes", [5, 1e-5])
def test_a_loss_that_is_not_finite_stops_soon(minutes, command, recipe, tmp_path):
    # Epochs of 64 steps, of which the second breaks at its tenth.
    outcome = command(*fit(recipe, tmp_path, "--data.batch_size", 1, "--checkpoint_minutes", minutes,
                           "--trainer.callbacks",
                           "[{class_path: tests.test_faults.Poison, init_args: {step: 74}}]"))  # fmt: skip
    error = one_line(outcome)
    last = tmp_path / "checkpoints" / RUN / "last.ckpt"
    message = rf"the loss is not finite at step 74 \(learning rate 0\.00\d+\); the last good checkpoint is {last}"
    assert re.search(message, error), error
    assert Poison.last_step <= 74 + 50
    for name in ("best", "last"):
        saved = read_checkpoint(last.with_name(f"{name}.ckpt"))
        assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert saved["global_step"] == (64 if minutes == 5 else 73)


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


@pytest.mark.parametrize("what", ["events", "metrics.csv"])
def test_a_disk_that_is_full_of_logs(what, command, recipe, tmp_path):
    whole, root = tmp_path / "whole", tmp_path / "full"
    assert command(*fit(recipe, whole)).status == 0
    disk = root / "logs" if what == "events" else tmp_path / "disk"
    callback = "Fill" if what == "events" else "FullTable"
    with small_disk(disk, 4):
        callbacks = f"[{{class_path: tests.test_faults.{callback}, init_args: {{folder: {disk}}}}}]"
        error = one_line(command(*fit(recipe, root, "--trainer.callbacks", callbacks)))
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


def test_a_file_that_may_not_grow(launch, recipe, tmp_path):
    """As a full disk, without the rights of root."""
    output = tmp_path / "output"
    process = launch(output, *fit(recipe, tmp_path), limits={resource.RLIMIT_FSIZE: 5_000_000})
    process.join(300)
    text = output.read_text()
    assert process.exitcode == 2, text
    assert "Traceback" not in text
    path = tmp_path / "checkpoints" / RUN / "best.ckpt"
    assert re.search(rf"^error: cannot write {path} \(File too large\); [\d,.]+ MB are free there", text, re.MULTILINE)
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


@pytest.mark.parametrize("kind", ["checkpoints", "logs"])
@pytest.mark.parametrize("obstacle", ["file", "link to itself", "link to nothing", "no permission", "read-only disk"])
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
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
        elif kind == "checkpoints" and resumed:
            pytest.skip("there would be no checkpoint to resume")
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


# Checkpoints


@pytest.fixture(scope="module")
def damaged(trained, tmp_path_factory):
    """A copy of a finished run, whose last.ckpt a test may break."""
    root = tmp_path_factory.mktemp("damaged")
    return shutil.copytree(trained[0], root, dirs_exist_ok=True)


def refused(command, root, *arguments):
    """What `last` says of the broken last.ckpt; it names best.ckpt instead."""
    folder = root / "checkpoints" / RUN
    error = one_line(command(*arguments, "--trainer.default_root_dir", root, "--ckpt_path", "last"))
    assert error.startswith(f"error: {folder}/last.ckpt "), error
    assert error.endswith(f"; the newest complete one is {folder}/best.ckpt"), error
    return error


def test_a_checkpoint_cut_off_at_twenty_places(trained, damaged, command, recipe):
    whole = (trained[0] / "checkpoints" / RUN / "last.ckpt").read_bytes()
    last = damaged / "checkpoints" / RUN / "last.ckpt"
    for length in [0, 1, 100, *(len(whole) * part // 16 for part in range(1, 16)), len(whole) - 22, len(whole) - 1]:
        last.write_bytes(whole[:length])
        assert "cannot be read as a checkpoint" in refused(command, damaged, "validate")
    assert "cannot be read as a checkpoint" in refused(
        command, damaged, "fit", "--config", recipe, "--trainer.max_epochs", 3
    )


def test_a_checkpoint_with_a_flipped_bit(trained, damaged, command):
    whole = (trained[0] / "checkpoints" / RUN / "last.ckpt").read_bytes()
    last = damaged / "checkpoints" / RUN / "last.ckpt"
    places = random.Random(0)
    for _ in range(5):  # in the weights and the optimizer's state, which are nearly all of it
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole) // 10, len(whole) * 9 // 10)] ^= 1 << places.randrange(8)
        last.write_bytes(flipped)
        assert "cannot be read as a checkpoint" in refused(command, damaged, "validate")


def test_no_flipped_bit_changes_what_is_read(trained, tmp_path):
    content = checkpoint(trained[0])
    content["state_dict"] = {"weight": torch.arange(64.0)}
    content["optimizer_states"] = [{"state": {0: {"exp_avg": torch.arange(16.0)}}}]
    path = tmp_path / "small.ckpt"
    torch.save(content, path)
    whole = path.read_bytes()
    content = read_checkpoint(path)
    bits = random.Random(0)
    # Every byte of the archive's directory at the end, and every seventh of the rest.
    directory = zipfile.ZipFile(path).start_dir
    places = [*range(0, directory, 7), *range(directory, len(whole))]
    refusals = 0
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bits.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path)
        except UserError:
            refusals += 1
        else:  # in padding, or in what both readers know twice
            assert_equal(found, content)
    print(f"{refusals} of {len(places)} refused, the others harmless")
    assert refusals > len(places) // 2


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def archive(name, data):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as stream:
        stream.writestr(name, data)
    return content.getvalue()


def saved(content, zipped=True):
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def test_a_checkpoint_of_another_program_or_with_code(damaged, command, tmp_path):
    last = damaged / "checkpoints" / RUN / "last.ckpt"
    executed = tmp_path / "executed"
    complete = torch.load(last.with_name("best.ckpt"), weights_only=True)
    for content, message in [
        (b"a text file\n" * 100, "cannot be read as a checkpoint"),
        (archive("notes.txt", "a random archive"), "cannot be read as a checkpoint"),
        (saved(torch.nn.Linear(3, 3).state_dict()), "is not a checkpoint of this program"),
        (saved({"state_dict": {}, "epoch": 3}), "is not a checkpoint of this program"),
        (saved([1, 2, 3]), "is not a checkpoint of this program"),
        (saved({**complete, "extra": Payload(executed)}), "could run code"),
        (saved(Payload(executed)), "could run code"),
        (saved({**complete, "extra": Payload(executed)}, zipped=False), "cannot be read as a checkpoint"),
    ]:
        last.unlink()
        last.write_bytes(content)
        assert message in refused(command, damaged, "validate")
        assert not executed.exists()
    last.unlink()
    last.mkdir()
    assert "is a folder" in refused(command, damaged, "validate")
    last.rmdir()
    last.symlink_to(last)
    assert f"no checkpoint at {last}" in one_line(command("validate", "--ckpt_path", last))
    last.unlink()
    # The payload is a real one.
    torch.load(io.BytesIO(saved(Payload(executed))), weights_only=False)
    assert executed.exists()
