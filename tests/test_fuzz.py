"""Bad input, by the hundred: whatever is given, a command does its work, or says in one line what is wrong.

The cases are the same on every machine. For 5,000 other ones: python -m pytest tests/test_fuzz.py --fuzz 5000
"""

import contextlib
import faulthandler
import io
import math
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cbam_pl.settings import command_parser
from tests.helpers import Official, Outcome, md5, png_bomb

pytestmark = pytest.mark.filterwarnings("ignore")

FEW, MANY = 10, 320  # cases, of all tests here together
SECONDS = 60  # for one case; on a quiet machine most take less than one

Command = Callable[..., Outcome]


class Hang(BaseException):
    """A case that does not end; no `except Exception` takes it."""


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """What settings such as trainer.deterministic and trainer.detect_anomaly change is as it was for the next test."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """End a case that hangs: with an exception, or with the process where no Python code runs any more."""

    def end(*_: object) -> None:
        raise Hang(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def listing(folder: Path, *without: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder, but for what a command may write."""
    found = {}
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(path, name) not in without]
        for name in (*folders, *files):
            entry = Path(path, name)
            if entry not in without and not name.startswith(".cbam_pl_"):
                status = entry.lstat()
                found[str(entry)] = (0, 0) if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def attempt(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command where everything around it is watched, in tmp_path/here; it may write into tmp_path/here/out."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    out = here / "out"

    def run(*arguments: object, may_write: Path = out) -> int:
        before = listing(tmp_path, out, may_write)
        with watched():
            outcome = command(*arguments)
        shutil.rmtree(out, ignore_errors=True)
        assert listing(tmp_path, out, may_write) == before, "a file beside the run's folder has changed"
        assert outcome.status in (0, 2), outcome.err
        # Of a short training that max_steps ends inside an epoch, the last two.
        expected = ("warning: ", "stopped by trainer.max_steps ", "resume")
        lines = [line for line in outcome.err.splitlines() if line.strip() and not line.startswith(expected)]
        assert len(lines) == (outcome.status == 2), outcome.err
        assert all(line.startswith("error: ") and len(line) > 20 for line in lines), outcome.err
        return outcome.status

    return run


@pytest.fixture(params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def explore(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Try a share of the cases: of few, and in the slow lane of many."""
    asked = request.config.getoption("--fuzz")
    cases = request.param if asked is None else asked

    def run(share: float, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
        seen: set[int] = set()

        def tallied(case: Any) -> None:
            seen.add(check(case))

        options = settings(
            max_examples=max(4, round(share * cases)),
            derandomize=asked is None,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        options(given(strategy)(tallied))()
        if cases >= MANY:
            assert seen == {0, 2}, "some cases should be accepted and some rejected"

    return run


# ------------------------------------------------------------------------- the command line and YAML

# What ends quickly where it is valid: a cnn on a dozen images of 8×8, one step.
QUICK = {
    "data.dataset": "folder",
    "data.image_size": 8,
    "data.val_size": 2,
    "pictures_every": 0,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.max_steps": 1,
}

# Where the settings are right and the data is tried, no run is written.
DRY = QUICK | {"trainer.fast_dev_run": True}

# Values that a key has, right and wrong ones; any other key has those of ANYTHING. Keys that would make a right value
# take long, start processes or load other data are here with few.
VALUES: dict[str, list[Any]] = {
    "seed": [0, 7, 2**32 - 1, 2**32, -1],
    "model.arch": ["cnn", "cnnn", "resnet"],
    "model.attention.kind": ["none", "se", "cbam", "eca", "bam", "channel", "spatial", "cbma"],
    "model.attention.reduction": [1, 8, 0, -3, 10**9],
    "model.attention.kernel_size": [3, 4, 0, -1, "7"],
    "model.attention.pools": [["avg"], ["avg", "max"], [], ["foo"], "avg"],
    "model.attention.stages": [[1], [9], [-1]],
    "model.compile": [False, "maybe"],
    "model.label_smoothing": [0.1, 0, 1, -0.1, math.nan],
    "model.optimizer": [
        {"class_path": f"torch.optim.{name}", "init_args": arguments}
        for name in ("Adam", "SGD", "AdamW", "LBFGS", "SparseAdam", "Muon", "Nothing")
        for arguments in ({}, {"lr": 0.01}, {"lr": -1}, {"lr": "x"}, {"lr": math.inf}, {"momentum": -0.5}, {"rate": 1})
    ],
    "model.lr_scheduler": [
        {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": arguments}
        for name in ("StepLR", "OneCycleLR", "CosineAnnealingLR", "ReduceLROnPlateau", "LambdaLR", "ConstantLR")
        for arguments in ({}, {"step_size": 0}, {"step_size": 2}, {"T_max": 0}, {"max_lr": 0.1}, {"factor": 3})
    ],
    "model.lr_interval": ["epoch", "step", "year"],
    "data.dataset": ["folder", "folders", "imagenet"],
    "data.root": ["nowhere", "", "~nobody", "/dev/null", "x" * 300, "x" * 5000],
    "data.batch_size": [1, 3, 0, -1, 10**7, 10**30],
    "data.val_size": [1, 0, 3, 12, 10**9, -1],
    "data.image_size": [8, 7, 0, 10**6, -8],
    "trainer.max_epochs": [1, 0, -2, "many"],
    "trainer.max_steps": [1, 0, -2],
    "trainer.devices": [1, "auto", 0, -1, 10**6, [0, 0], "gpu"],
    "trainer.num_nodes": [1, 0, -1, "two"],
    "trainer.strategy": ["auto", "fsdp", "nothing"],
    "trainer.accelerator": ["cpu", "auto", "tpu", "abacus"],
    "trainer.precision": ["32-true", "bf16-mixed", "64", "half", 17, "transformer-engine"],
    "trainer.default_root_dir": [None, "/dev/null", "/proc/nowhere", "x" * 300],
    "trainer.profiler": [None, "simple", "nothing"],
    "trainer.callbacks": [None, [], "EarlyStopping", {"class_path": "os.getcwd"}, [{"class_path": "Timer"}], 3],
    "trainer.logger": [False, "TensorBoard", 3],
    "trainer.plugins": [None, [], "nothing", {"class_path": "os.getcwd"}],
    "ckpt_path": ["last", "nowhere.ckpt", "/dev/null", "", "x" * 5000],
    "config": ["nowhere.yaml", None, 3],
}  # fmt: skip

ANYTHING = st.one_of(
    st.sampled_from([None, True, 0, -1, 1, 10**30, 0.5, -0.5, math.nan, math.inf, "", " ", "null", "[", "{", "*"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.sampled_from(["class_path", "init_args", "lr", "a.b", ""]), st.integers(-3, 3), max_size=3),
)  # fmt: skip


def keys_of_fit() -> list[str]:
    return sorted({action.dest for action in command_parser("fit")._actions} - {"help", "print_config"})


@st.composite
def mistyped(draw: st.DrawFn, key: str) -> str:
    """A key with a letter too few, too many or in the wrong place."""
    place = draw(st.integers(0, len(key) - 1))
    return draw(
        st.sampled_from([key[:place] + key[place + 1 :], key[:place] + "x" + key[place:], key[:place], key[::-1]])
    )


@st.composite
def some_settings(draw: st.DrawFn, keys: list[str]) -> dict[str, Any]:
    """A few keys with their values; seldom one that does not exist."""
    chosen: dict[str, Any] = {}
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(VALUES) * 2 + keys))
        usual = st.sampled_from(VALUES[key]) if key in VALUES else ANYTHING
        value = draw(usual if draw(st.integers(0, 3)) else ANYTHING)
        if key in ("trainer.max_epochs", "trainer.num_nodes", "trainer.default_root_dir", "data.root", "config"):
            value = draw(usual)  # others may be right, and take long or write elsewhere
        if draw(st.integers(0, 9)) == 0:
            key = draw(mistyped(key)) or "x"
        chosen[key] = value
    return chosen


def as_tree(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as mappings in mappings, where they do not exclude one another."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = tree
        for name in path:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                break
        else:
            inner[last] = value
    return tree


def as_text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that is cut off, or has other bytes in it."""
    place = draw(st.integers(0, len(content)))
    tokens = [b"\0", b"\xff", b"\t", b"&a ", b"*a", b"{", b"[" * 5000, b"- " * 5000, b"!!python/none ", b"---\n"]
    foreign = draw(st.sampled_from(tokens) | st.binary(min_size=1, max_size=8))
    line = content[content.rfind(b"\n", 0, place) + 1 :].split(b"\n")[0] + b"\n"
    return draw(
        st.sampled_from([
            content[:place],
            content[:place] + foreign + content[place:],
            content + line,  # a key twice
            line * 100 + content,
            b"",
            b"x" * 1_100_000,
        ])
    )  # fmt: skip


@st.composite
def fits(draw: st.DrawFn, keys: list[str]) -> tuple[bytes | None, list[str]]:
    """A recipe, or none, and options."""
    recipe = None
    if draw(st.booleans()):
        recipe = yaml.safe_dump(as_tree(draw(some_settings(keys))), allow_unicode=True).encode()
        if draw(st.integers(0, 2)) == 0:
            recipe = draw(damaged(recipe))
    options = []
    for key, value in draw(some_settings(keys)).items():
        options += draw(st.sampled_from([[f"--{key}", as_text(value)], [f"--{key}={as_text(value)}"], [f"--{key}"]]))
    options += draw(
        st.sampled_from([[], [], [], ["stray"], ["-"], ["--"], ["--data", "{batch_size: 3}"], ["--model", "3"]])
    )
    return recipe, options


def test_settings(
    explore: Callable[..., None], attempt: Callable[..., int], image_folder: Path, tmp_path: Path
) -> None:
    # Three images a class are enough, and quicker.
    for split, count in (("train", 4), ("test", 1)):
        for name in ("red", "green"):
            target = tmp_path / "images" / split / name
            target.mkdir(parents=True)
            for index in range(count):
                shutil.copy(image_folder / split / name / f"{index}.png", target)
    base = QUICK | {"data.root": str(tmp_path / "images"), "trainer.default_root_dir": "out"}
    first = tmp_path / "quick.yaml"
    first.write_text(yaml.safe_dump(as_tree(base)))

    def check(case: tuple[bytes | None, list[str]]) -> int:
        recipe, options = case
        arguments: list[object] = ["fit", "--config", first]
        if recipe is not None:
            (tmp_path / "recipe.yaml").write_bytes(recipe)
            arguments += ["--config", tmp_path / "recipe.yaml"]
        return attempt(*arguments, *options)

    explore(0.7, fits(keys_of_fit()), check)


# ------------------------------------------------------------------------------- folders of images


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def contents() -> dict[str, bytes]:
    """A file of every kind."""
    noise = Image.effect_noise((16, 16), 90).convert("RGB")
    png, jpeg = encoded(noise, "png"), encoded(noise, "jpeg")
    return {
        "png": png,
        "jpeg": jpeg,
        "webp": encoded(noise, "webp"),
        "bmp": encoded(noise, "bmp"),
        "one pixel": encoded(noise.crop((0, 0, 1, 1)), "png"),
        "line": encoded(Image.new("RGB", (3000, 1)), "png"),
        "cmyk": encoded(noise.convert("CMYK"), "jpeg"),
        "16 bits": encoded(Image.new("I;16", (9, 9), 40_000), "png"),
        "palette": encoded(noise.convert("P"), "png", transparency=0),
        "animated": encoded(noise, "webp", save_all=True, append_images=[noise.rotate(90)]),
        "gif": encoded(noise, "gif"),
        "tiff": encoded(noise, "tiff"),
        "empty": b"",
        "text": b"<html>404</html>",
        "half a png": png[: len(png) // 2],
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "png's head": png[:20],
        "bomb": png_bomb(20_000, 20_000),
        "endless": png_bomb(2**31 - 1, 2**31 - 1),
        "flat": png_bomb(0, 5),
    }


GOOD = ["png", "jpeg", "webp", "bmp", "one pixel", "line", "cmyk", "16 bits", "palette", "animated"]
STEMS = [
    b"0",
    b"a b",
    "图像".encode(),
    b"line\nbreak",
    b"caf\xe9",
    b"[/red]",
    b"[bold]x",
    b"-dash",
    b"%s{}",
    b"'\"$(x)",
    b"l" * 200,
]
SUFFIXES = [b".png", b".jpg", b".JPEG", b".webp", b".txt", b""]


@st.composite
def folders(draw: st.DrawFn) -> tuple[list[tuple[bytes, str]], str]:
    """Paths in a folder of images with what lies there, and the command that meets it."""
    classes = draw(st.lists(st.sampled_from([b"cat", *STEMS]), min_size=1, max_size=2, unique=True))
    sound = draw(st.integers(0, 2)) > 0  # else anything goes wrong
    entries = []
    for split, count in ((b"train", 3), (b"test", 1), (b"val", 1)):
        if split == b"val" and draw(st.integers(0, 3)):
            continue
        for name in classes:
            for index in range(count):
                stem, suffix = draw(st.sampled_from(STEMS)), draw(st.sampled_from(SUFFIXES[:4]))
                entries.append((split + b"/" + name + b"/%d" % index + stem + suffix, draw(st.sampled_from(GOOD))))
    for _ in range(0 if sound else draw(st.integers(1, 3))):
        parent = draw(st.sampled_from(entries))[0].rpartition(b"/")[0]
        parent = draw(st.sampled_from([parent, parent, parent, b"train", b"."]))
        name = b"x" + draw(st.sampled_from(STEMS)) + draw(st.sampled_from(SUFFIXES))
        kinds = ["dangling", "loop", "to the root", "pipe", "folder", *KINDS]
        entries.append((parent + b"/" + name, draw(st.sampled_from(kinds))))
    return entries, draw(st.sampled_from(["fit", "predict"]))


KINDS = list(contents())


def lay(root: Path, entries: list[tuple[bytes, str]], kinds: dict[str, bytes]) -> None:
    """Make what `folders` drew."""
    for relative, kind in entries:
        path = os.fsencode(root) + b"/" + relative
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(path):
            continue
        if kind == "dangling":
            os.symlink(b"nowhere.png", path)
        elif kind == "loop":
            os.symlink(os.path.basename(path), path)
        elif kind == "to the root":
            os.symlink(root, path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            os.mkdir(path)
        else:
            Path(os.fsdecode(path)).write_bytes(kinds[kind])


def test_folders(
    explore: Callable[..., None], attempt: Callable[..., int], trained: tuple[Path, Outcome], tmp_path: Path
) -> None:
    kinds, root = contents(), tmp_path / "images"
    best = trained[0] / "checkpoints/tiny/version_0/best.ckpt"

    def check(case: tuple[list[tuple[bytes, str]], str]) -> int:
        entries, name = case
        shutil.rmtree(root, ignore_errors=True)
        lay(root, entries, kinds)
        if name == "predict":
            output = tmp_path / "here" / "out.csv"
            return attempt("predict", "--images", root, "--ckpt_path", best, "--output", output, may_write=output)
        quick = [word for key, value in DRY.items() for word in (f"--{key}", as_text(value))]
        return attempt(
            "fit", *quick, "--data.val_size", "null" if (root / "val").is_dir() else 1, "--data.root", root,
            "--trainer.default_root_dir", "out",
        )  # fmt: skip

    explore(0.2, folders(), check)


# ------------------------------------------------------------------------------------------- CIFAR


@st.composite
def archives(draw: st.DrawFn) -> tuple[str, str, float, bool, bool]:
    """The set, what happened to its archive, where, whether its checksum is right all the same, and unpacked before."""
    kinds = [
        "whole",
        "truncated",
        "flipped",
        "longer",
        "member",
        "garbage",
        "empty",
        "folder",
        "absent",
        "batch",
        "no batch",
    ]
    return (
        draw(st.sampled_from(["cifar10", "cifar100"])),
        draw(st.sampled_from([*kinds, "no batch"])),
        draw(st.floats(0, 0.999)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def spoil(official: Official, kind: str, place: float) -> None:
    """Do to the archive, or to what was unpacked from it, what `archives` drew."""
    files = list(official.files)
    chosen = files[int(place * len(files))]
    if kind == "member":
        official.write_archive(without=chosen)
    elif kind in ("batch", "no batch") and official.folder.is_dir():
        batch = official.folder / chosen
        data = batch.read_bytes()
        batch.unlink()
        if kind == "batch":
            batch.write_bytes(data[: int(place * len(data))])
    elif kind == "folder":
        official.archive.unlink()
        official.archive.mkdir()
    elif kind == "absent":
        official.archive.unlink()
    else:
        data = bytearray(official.archive.read_bytes())
        at = int(place * len(data))
        if kind == "flipped":
            data[at] ^= 0xFF
        changed = {"truncated": data[:at], "longer": data + b"rubbish", "garbage": b"garbage" * 99, "empty": b""}
        official.archive.write_bytes(changed.get(kind, data))


def test_archives(explore: Callable[..., None], attempt: Callable[..., int], tmp_path: Path) -> None:
    quick = DRY | {"data.image_size": 32, "data.val_size": 0}
    options = [word for key, value in quick.items() for word in (f"--{key}", as_text(value))]

    def check(case: tuple[str, str, float, bool, bool]) -> int:
        name, kind, place, right_checksum, unpacked = case
        root = tmp_path / "here" / "cifar"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        with pytest.MonkeyPatch.context() as monkeypatch:
            official = Official(name, root, monkeypatch)
            official.write_archive()
            if unpacked:
                official.unpack()
            spoil(official, kind, place)
            if right_checksum and official.archive.is_file():
                monkeypatch.setattr(official.dataset, "tgz_md5", md5(official.archive.read_bytes()))
            return attempt(
                "fit", *options, "--data.dataset", name, "--data.root", root, "--trainer.default_root_dir", "out",
                may_write=root,
            )  # fmt: skip

    explore(0.1, archives(), check)
