import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from cbam_pl.cli import COMMANDS
from cbam_pl.commands.compare.plan import make_plan, option_parser
from cbam_pl.settings import command_parser, parse_with_recipes
from tests.conftest import COLOURS, TEST_PER_CLASS
from tests.data.test_folder import png_bomb
from tests.helpers import REPOSITORY, checkpoint, scalars


def test_fit_writes_the_files_of_a_run(trained):
    root, outcome = trained
    run = root / "checkpoints/tiny/version_0"
    logs = root / "logs/tiny/version_0"
    assert sorted(path.name for path in run.iterdir()) == ["best.ckpt", "last.ckpt"]
    names = sorted(path.name for path in logs.iterdir() if not path.name.startswith("events"))
    assert names == [".lock", "config.yaml", "metrics.csv"]
    assert f"test it      python train.py test --ckpt_path {run}/best.ckpt" in outcome.out
    assert "1,147,305 parameters" in outcome.out  # three classes: 7 · 513 fewer than 1,150,896
    assert "84 training and 9 validation images" in outcome.out


def test_fit_writes_the_tags_at_their_steps(trained):
    root, _ = trained
    logged = scalars(root / "logs/tiny/version_0")
    gates = {tag for tag in logged if tag.startswith("val_gates/")}  # tests/test_monitor.py holds them to their values
    assert set(logged) - gates == {"train/loss_step", "train/loss", "train/acc", "val/loss", "val/acc", "lr"}
    assert [step for step, _ in logged["train/loss_step"]] == list(range(1, 13))  # 84 images are 6 batches of 16
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc", "lr"):
        assert [step for step, _ in logged[tag]] == [1, 2]
    sizes = torch.tensor([16, 16, 16, 16, 16, 4] * 2)
    losses = torch.tensor([value for _, value in logged["train/loss_step"]])
    means = (losses * sizes).view(2, 6).sum(1) / 84
    assert [value for _, value in logged["train/loss"]] == pytest.approx(means.tolist(), abs=1e-6)
    assert logged["lr"][0][1] == pytest.approx(0.002)


def test_metrics_csv_holds_what_tensorboard_shows(trained):
    root, _ = trained
    logged = scalars(root / "logs/tiny/version_0")
    with (root / "logs/tiny/version_0/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc", "lr"):
        assert [float(row[tag]) for row in rows] == pytest.approx([value for _, value in logged[tag]], rel=1e-6)


def test_best_is_the_epoch_of_the_highest_validation_accuracy(trained):
    root, _ = trained
    accuracies = [value for _, value in scalars(root / "logs/tiny/version_0")["val/acc"]]
    assert checkpoint(root, "best")["epoch"] == accuracies.index(max(accuracies))
    assert checkpoint(root, "last")["epoch"] == 1


def test_test_measures_the_newest_best_and_logs_it_once_at_its_epoch(trained, command, tmp_path, image_folder):
    root = shutil.copytree(trained[0], tmp_path / "run")
    for _ in range(2):
        outcome = command("test", "--trainer.default_root_dir", root)
        assert outcome.status == 0, outcome.err
    best = checkpoint(root, "best")
    printed = dict(re.findall(r"^(test/\w+)  ([\d.]+)$", outcome.out, re.MULTILINE))
    logged = scalars(root / "logs/tiny/version_0")
    for tag in ("test/loss", "test/acc"):
        ((step, value),) = logged[tag]
        assert step == best["epoch"] + 1
        assert float(printed[tag]) == pytest.approx(value, abs=1e-4)

    # By hand: every test image through the network of best.ckpt.
    from cbam_pl.data.folder import load_folder
    from cbam_pl.training.classifier import Classifier

    model = Classifier.load_from_checkpoint(root / "checkpoints/tiny/version_0/best.ckpt").eval()
    images = load_folder(str(image_folder)).test
    data = best["ImageDataModule"]
    x = (images.pixels / 255 - torch.tensor(data["mean"]).view(3, 1, 1)) / torch.tensor(data["std"]).view(3, 1, 1)
    with torch.no_grad():
        logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, images.labels)
    assert logged["test/loss"][0][1] == pytest.approx(float(loss), abs=1e-5)
    assert logged["test/acc"][0][1] == pytest.approx(float((logits.argmax(1) == images.labels).double().mean()))
    record = json.loads((root / "logs/tiny/version_0/test.json").read_text())
    counts = [[0] * 3 for _ in range(3)]
    for true, predicted in zip(images.labels.tolist(), logits.argmax(1).tolist(), strict=True):
        counts[true][predicted] += 1
    assert record["confusion"] == counts  # of one test, though two were made
    assert (record["epoch"], record["images"], record["classes"]) == (best["epoch"] + 1, 21, ["blue", "green", "red"])
    assert record["test/acc"] == pytest.approx(sum(counts[label][label] for label in range(3)) / 21)
    assert record["options"] == ["--trainer.default_root_dir", str(root)]


def test_validate_gives_the_figures_of_training(trained, command):
    root, _ = trained
    outcome = command("validate", "--trainer.default_root_dir", root, "--ckpt_path", "last")
    assert outcome.status == 0, outcome.err
    figures = checkpoint(root)["figures"]
    assert f"val/loss  {figures['val/loss']:.4f}" in outcome.out
    assert f"val/acc  {figures['val/acc']:.4f}" in outcome.out


def test_two_epochs_and_two_more_equal_four(trained, command, recipe, tmp_path):
    fit = ("fit", "--config", recipe, "--trainer.max_epochs", 4, "--trainer.default_root_dir")
    assert command(*fit, tmp_path / "whole").status == 0
    shutil.copytree(trained[0], tmp_path / "halves")
    outcome = command(*fit, tmp_path / "halves", "--ckpt_path", "last")
    assert outcome.status == 0, outcome.err
    whole, halves = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves")
    assert whole["epoch"] == halves["epoch"] == 3
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, halves["state_dict"][name]), name
    assert whole["lr_schedulers"] == halves["lr_schedulers"]
    assert whole["figures"] == halves["figures"]
    ours, theirs = (scalars(tmp_path / part / "logs/tiny/version_0") for part in ("whole", "halves"))
    assert ours == theirs
    csvs = [(tmp_path / part / "logs/tiny/version_0/metrics.csv").read_text() for part in ("whole", "halves")]
    assert csvs[0] == csvs[1]


def test_a_second_run_takes_the_next_version(trained, command, recipe, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    assert command("fit", "--config", recipe, "--trainer.default_root_dir", root, "--seed", 4).status == 0
    assert (root / "checkpoints/tiny/version_1/best.ckpt").is_file()
    first, second = checkpoint(root), checkpoint(root, version=1)
    assert not torch.equal(*(c["state_dict"]["network.blocks.0.conv.weight"] for c in (first, second)))


def test_a_saved_configuration_trains_the_same_again(trained, command, tmp_path):
    saved = trained[0] / "logs/tiny/version_0/config.yaml"
    outcome = command("fit", "--config", saved, "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 0, outcome.err
    weights = [checkpoint(root)["state_dict"]["network.blocks.0.conv.weight"] for root in (trained[0], tmp_path)]
    assert torch.equal(*weights)


def test_testing_again_replaces_the_point_and_a_refused_test_keeps_it(trained, command, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    test = ("test", "--trainer.default_root_dir", root)

    def points():
        return list((root / "logs/tiny/version_0").glob("events*.test-epoch*"))

    assert command(*test).status == 0
    (first,) = points()
    assert command(*test, "--data.root", tmp_path / "nowhere").status == 2
    assert points() == [first]
    assert command(*test).status == 0
    (second,) = points()
    assert second != first


def test_predict_prints_and_saves_the_top_classes(trained, command, image_folder, tmp_path):
    root, _ = trained
    images = [image_folder / "test/red/0.png", image_folder / "test/blue"]
    output = tmp_path / "out.csv"
    outcome = command(
        "predict", "--trainer.default_root_dir", root, "--images", *images, "--output", output, "--top", 2
    )
    assert outcome.status == 0, outcome.err
    with output.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 1 + TEST_PER_CLASS
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert {row["image"] for row in rows} == {str(images[0]), *(str(path) for path in images[1].iterdir())}
    for row in rows:
        assert 1 > float(row["probability_1"]) >= float(row["probability_2"]) > 0
        assert {row["class_1"], row["class_2"]} < set(COLOURS)
    assert rows[0]["class_1"] in outcome.out


def test_predict_takes_names_that_look_like_markup_or_no_text(trained, command, image_folder, tmp_path, monkeypatch):
    names = [b"a[/red].png", b"[bold]x.png", b"line\nbreak.png", b"caf\xe9.png"]
    (tmp_path / "images/a[").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "images")
    for name in names:
        with open(name, "wb") as stream:
            stream.write((image_folder / "test/red/0.png").read_bytes())
    outcome = command(
        "predict", "--trainer.default_root_dir", trained[0], "--images", ".", "--output", tmp_path / "out.csv"
    )
    assert outcome.status == 0, outcome.err
    with (tmp_path / "out.csv").open(newline="", errors="surrogateescape") as stream:
        assert sorted(os.fsencode(row["image"]) for row in csv.DictReader(stream)) == sorted(names)
    assert "[bold]x.png" in outcome.out


def test_predict_refuses_a_picture_that_would_fill_the_memory(trained, command, tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_bomb(20_000, 20_000))
    outcome = command("predict", "--trainer.default_root_dir", trained[0], "--images", bomb)
    assert outcome.status == 2
    assert re.fullmatch(r"error: .*bomb\.png cannot be decoded \(.*decompression bomb.*\n", outcome.err)


def test_val_size_zero_validates_on_the_test_split_and_says_so(command, recipe, tmp_path):
    with pytest.warns(UserWarning, match="selected on the test set"):
        outcome = command(
            "fit", "--config", recipe, "--data.val_size", 0, "--trainer.max_epochs", 1,
            "--trainer.default_root_dir", tmp_path,
        )  # fmt: skip
    assert outcome.status == 0, outcome.err
    tested = command("test", "--trainer.default_root_dir", tmp_path, "--ckpt_path", "last")
    figures = checkpoint(tmp_path)["figures"]
    assert f"test/loss  {figures['val/loss']:.4f}" in tested.out


@pytest.mark.filterwarnings("ignore:.*fp16 is not supported on CPU. Using .precision='bf16-mixed'")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains(command, recipe, tmp_path, precision):
    outcome = command(
        "fit", "--config", recipe, "--trainer.precision", precision, "--trainer.max_epochs", 4,
        "--trainer.default_root_dir", tmp_path,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    losses = [value for _, value in scalars(tmp_path / "logs/tiny/version_0")["train/loss"]]
    assert losses[-1] < losses[0]


def test_two_processes_measure_what_one_does(recipe, tmp_path):
    fit = [
        sys.executable, "train.py", "fit", "--config", str(recipe), "--trainer.max_epochs", "1",
        "--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.default_root_dir", str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(fit, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints/tiny").iterdir()) == ["version_0"]
    assert len(list((tmp_path / "logs/tiny/version_0").glob("events*"))) == 1
    both = checkpoint(tmp_path)["figures"]
    alone = [sys.executable, "train.py", "validate", "--ckpt_path", "last", "--trainer.default_root_dir", str(tmp_path)]
    done = subprocess.run(alone, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert f"val/loss  {both['val/loss']:.4f}" in done.stdout
    assert f"val/acc  {both['val/acc']:.4f}" in done.stdout


BAD = {
    "no command": ([], "no command given; use one of fit"),
    "unknown command": (["fitt"], "unknown command 'fitt'; did you mean fit"),
    "unknown key": (["fit", "--model.arhc", "cnn"], "model.arhc"),
    "unknown arch": (["fit", "--model.arch", "vgg"], "model.arch=vgg is unknown; use one of cnn, resnet"),
    "unknown kind": (["fit", "--model.attention.kind", "foo"], "model.attention.kind=foo is unknown; .*cbam"),
    "wrong type": (["fit", "--data.batch_size", "many"], "data.batch_size.*Got value: many"),
    "batch of zero": (["fit", "--data.batch_size", "0"], "batch_size=0 must be at least 1"),
    "negative val_size": (["fit", "--data.val_size", "-1"], "val_size=-1 must be at least 0"),
    "unknown preset": (["fit", "--model.attention.preset", "foo"], "attention.preset=foo is unknown; .*official"),
    "unknown order": (["fit", "--model.attention.order", "foo"], "model.attention.order=foo is unknown; .*parallel"),
    "unknown pool": (["fit", "--model.attention.pools", "[avg, foo]"], "model.attention.pools.*lse.*foo"),
    "option of another kind": (
        ["fit", "--model.attention.kind", "se", "--model.attention.kernel_size", "3"],
        "kernel_size=3 has no effect with kind='se'",
    ),
    "stages of the cnn": (["fit", "--model.attention.stages", "[3, 4]"], "stages=.* has no effect in the cnn"),
    "stem of the cnn": (["fit", "--model.stem", "imagenet"], "stem='imagenet' has no effect with arch='cnn'"),
    "dropout of a ResNet": (
        ["fit", "--model.arch", "resnet18", "--model.dropout", "0.2"],
        "dropout=0.2 has no effect with arch='resnet18'",
    ),
    "reduction of zero": (["fit", "--model.attention.reduction", "0"], "reduction=0 must be at least 1"),
    "even kernel": (["fit", "--model.attention.kernel_size", "4"], "kernel_size=4 must be odd"),
    "image size of CIFAR": (["fit", "--data.image_size", "64"], "image_size=64 does not fit dataset=cifar10"),
    "missing configuration": (["fit", "--config", "nope.yaml"], "nope.yaml"),
    "missing folder": (["fit", "--data.dataset", "folder", "--data.root", "nope"], "nope"),
    "val_size above the data": (["fit", "--config", "{recipe}", "--data.val_size", "93"], "val_size=93 leaves nothing"),
    "unknown strategy": (["fit", "--config", "{recipe}", "--trainer.strategy", "foo"], "strategy"),
    "unknown device": (["fit", "--config", "{recipe}", "--trainer.accelerator", "cuda"], "CUDAAccelerator|cuda"),
    "negative rate": (["fit", "--config", "{recipe}", "--model.optimizer.lr", "-1"], "Invalid learning rate: -1"),
    "rate before the data": (["fit", "--model.optimizer.lr", "-1", "--data.root", "nope"], "Invalid learning rate: -1"),
    "strategy before the data": (["fit", "--trainer.strategy", "foo", "--data.root", "nope"], "strategy"),
    "devices before the data": (
        ["fit", "--trainer.accelerator", "cpu", "--trainer.devices", "x", "--data.root", "nope"],
        "devices",
    ),
    "precision that is not installed": (["fit", "--trainer.precision", "transformer-engine"], "transformer"),
    "val_size above CIFAR": (["fit", "--data.val_size", "50000"], "val_size=50000 leaves nothing to train on"),
    "huge image_size": (["fit", "--data.dataset", "shapes", "--data.image_size", "5000"], "at most 512"),
    "huge kernel": (["fit", "--model.attention.kernel_size", "1000001"], "out of memory; lower .*kernel_size"),
    "huge batch": (["fit", "--data.batch_size", "10000000"], "batch_size=10000000 must be .* at most 1,000,000"),
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
    "validation that never comes": (
        ["fit", "--config", "{recipe}", "--trainer.val_check_interval", "100"],
        "trainer.val_check_interval=100 must be 1.0",
    ),
    "name that is too long": (["fit", "--data.dataset", "folder", "--data.root", "x" * 5000], "File name too long"),
    "nothing to resume": (["fit", "--config", "{recipe}", "--ckpt_path", "last"], "no last.ckpt of tiny"),
    "no run yet": (["test"], "no best.ckpt under .*train first"),
    "no checkpoint": (["test", "--ckpt_path", "nope.ckpt"], "no checkpoint at nope.ckpt"),
    "no images": (["predict", "--images", "nope.jpg", "--ckpt_path", "{best}"], "nope.jpg"),
    "not an image": (["predict", "--images", "{recipe}", "--ckpt_path", "{best}"], "tiny.yaml"),
    "other network": (
        ["fit", "--config", "{recipe}", "--model.attention.kind", "se", "--ckpt_path", "{best}"],
        "trained with other settings: model.attention.*se.* here",
    ),
    "other classes": (["test", "--data.dataset", "shapes", "--ckpt_path", "{best}"], "blue, green, red. are not those"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the case of the missing device needs a machine without CUDA")
def test_bad_input_ends_with_one_line_and_status_two(name, trained, command, recipe, tmp_path):
    arguments, message = BAD[name]
    places = {"recipe": recipe, "best": trained[0] / "checkpoints/tiny/version_0/best.ckpt"}
    arguments = [argument.format(**places) for argument in arguments]
    if arguments and arguments[0] in COMMANDS:
        arguments += ["--trainer.default_root_dir", str(tmp_path)]
    outcome = command(*arguments)
    assert outcome.status == 2
    last = outcome.err.strip().splitlines()
    assert last[-1].startswith("error: ")
    assert re.search(message, last[-1]), last[-1]
    assert "Traceback" not in outcome.err
    for kind in ("checkpoints", "logs"):
        assert not list((tmp_path / kind).glob("*")), "a refused run leaves nothing behind"


def test_a_callback_that_waits_for_a_metric_that_never_comes_is_refused(command, recipe, tmp_path):
    outcome = command(
        "fit", "--config", recipe, "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "foo",
        "--trainer.default_root_dir", tmp_path, "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    assert outcome.status == 2
    assert re.fullmatch("error: trainer.callbacks: .*monitor=foo is not logged.*\n", outcome.err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a checkpoint"),
        (b"PK\x03\x04 cut off", "cannot be read as a checkpoint"),
        ({"weights": torch.zeros(1)}, "not a checkpoint of this program"),
        ({"weights": re.compile("code")}, "could run code"),
    ],
)
def test_a_broken_or_foreign_checkpoint_is_refused(command, tmp_path, content, message):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    outcome = command("test", "--ckpt_path", path)
    assert outcome.status == 2
    assert re.fullmatch(rf"error: .*bad\.ckpt.*{message}.*\n", outcome.err)


def test_help_needs_no_torch(command):
    script = "import sys; sys.argv[1:] = ['--help']; import cbam_pl.cli as c; c.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "python train.py COMMAND" in done.stdout
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("False\n")


def test_the_help_of_a_class_stands_beside_other_options(command):
    outcome = command("fit", "--seed", 3, "--trainer.strategy.help", "--data", "{batch_size: 3}")
    assert (outcome.status, outcome.err) == (0, "")
    assert "--trainer.strategy.accelerator" in outcome.out


RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_header_names_itself(path):
    settings = parse_with_recipes(command_parser("fit"), ["--config", str(path)])
    written = yaml.safe_load(path.read_text())
    assert settings.trainer.max_epochs == written["trainer"]["max_epochs"]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config configs/{path.name}" in line for line in header)
    assert any(line.startswith("# Expect: ") and len(line) > 20 for line in header)


def readme_commands():
    """The commands of the README that run train.py, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "train.py" in line]


@pytest.mark.parametrize("line", readme_commands())
def test_commands_of_the_readme_parse(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line)
    command, *options = words[words.index("train.py") + 1 :]
    assert command in COMMANDS
    if command == "compare":
        make_plan(*option_parser().parse_known_args(options))
    else:
        parse_with_recipes(command_parser(command), options)
