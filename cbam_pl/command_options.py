"""What the commands are called, and the options that each takes."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Imports that take seconds stand inside the functions that need them, so that help and mistakes answer at once.

COMMANDS = {
    "fit": "train a network: --config configs/cbam_cnn.yaml; resume with --ckpt_path last",
    "test": "measure a checkpoint on the test images; by default the newest run's best",
    "validate": "measure a checkpoint on the validation images; by default the newest run's best",
    "predict": "classify your own images: --images FILE_OR_FOLDER ...",
    "visualize": "draw features, attention, Grad-CAM and curves of a checkpoint; --measure gives numbers",
    "compare": "train several recipes with several seeds, and report whether they differ, how surely, at what cost",
}


def command_parser(command: str) -> "ArgumentParser":
    """The options of a command; each is a parameter of the class that it configures."""
    import warnings

    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    if command == "visualize":
        return _visualize_parser()
    from jsonargparse import ArgumentParser
    from lightning import Trainer

    from cbam_pl.data.datamodule import ImageDataModule
    from cbam_pl.settings import STRICT_YAML, RecipeFile
    from cbam_pl.training.classifier import Classifier

    parser = ArgumentParser(
        prog=f"train.py {command}",
        description=COMMANDS[command],
        exit_on_error=False,
        allow_abbrev=False,
        usage=f"python train.py {command} [OPTIONS]",
        parser_mode=STRICT_YAML,
    )
    if command == "fit":
        parser.add_argument("--config", action=RecipeFile, help="YAML file; a later one or option wins")
        parser.add_argument("--seed", type=int, default=0, help="decides weights, order, augmentation and dropout")
        parser.add_argument("--ckpt_path", type=str, help="resume from FILE, or from this recipe's newest run: last")
        parser.add_argument(
            "--checkpoint_minutes", type=float, default=5.0, help="longest time between two checkpoints"
        )
        parser.add_argument(
            "--pictures_every",
            type=int,
            default=5,
            help="epochs from one set of TensorBoard's pictures to the next, beside the first and last; 0: none",
        )
        parser.add_class_arguments(
            Classifier, "model", skip={"num_classes", "image_size", "seed"}, instantiate=False, sub_configs=True
        )
    else:
        parser.add_argument("--ckpt_path", type=str, default="best", help="a FILE, or the newest run's best or last")
        parser.add_argument(
            "--model.test_time_flip",
            type=bool | None,
            help="classify by the mean of the logits of each image and its mirror image; by default as in training",
        )
    if command == "predict":
        parser.add_argument("--images", nargs="+", type=str, help="image files, or folders of them", required=True)
        parser.add_argument("--output", type=str, default="predictions.csv", help="the CSV file to write")
        parser.add_argument("--top", type=int, default=3, help="classes to show for each image")
    else:
        parser.add_class_arguments(ImageDataModule, "data", skip={"seed"}, instantiate=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    parser.set_defaults(
        {
            "trainer.max_epochs": 50,
            "trainer.log_every_n_steps": 1,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_model_summary": False,
            "trainer.default_root_dir": ".",
            # One, so that a recipe means the same on every machine.
            "trainer.devices": 1,
        }
    )
    return parser


def _visualize_parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    from cbam_pl.data.datamodule import ImageDataModule
    from cbam_pl.settings import STRICT_YAML

    parser = ArgumentParser(
        prog="train.py visualize",
        description=COMMANDS["visualize"],
        exit_on_error=False,
        allow_abbrev=False,
        usage="python train.py visualize [OPTIONS]",
        parser_mode=STRICT_YAML,
    )
    add = parser.add_argument
    add("--ckpt_path", nargs="+", type=str, default=["best"], help="FILES, or the newest run's best or last")
    add("--images", nargs="+", type=str, help="your own image files, or folders of them")
    add("--indices", nargs="+", type=int, help="test images, by number from 0")
    add("--class_name", type=str, help="the first test images of a class")
    add("--num_images", type=int, help="images to show (default: 3); --images and --indices show all that they name")
    add("--output", type=str, help="folder to write to (default: pictures, beside the logs of the first run)")
    add("--format", type=Literal["png", "svg", "pdf"], default="png", help="of the pictures")
    add("--measure", action="store_true", help="measure on test images whether attention falls on what matters")
    add("--measure_images", type=int, help="test images to measure on, evenly chosen (default: 1000)")
    add("--trainer.default_root_dir", type=str, default=".", help="the folder that holds checkpoints and logs")
    parser.add_class_arguments(ImageDataModule, "data", skip={"seed"}, instantiate=False)
    return parser
