"""What several tests share."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cbam_pl.training.checkpoint import completed_epochs

REPOSITORY = Path(__file__).parents[1]

RUN = "tiny/version_0"
EPOCHS, STEPS = 4, 3  # 84 training images of which 20 are held out, in batches of 24


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def checkpoint(root, name="last", version=0):
    return torch.load(root / f"checkpoints/tiny/version_{version}/{name}.ckpt", weights_only=True)


def without_places(saved):
    """All of a checkpoint but where and when it was written."""
    saved = {name: value for name, value in saved.items() if name != "saved_at"}
    loop = saved["loops"]["fit_loop"]  # the rest of Lightning's counters depends on how often it was started
    saved["loops"] = (loop["epoch_loop.batch_progress"]["current"], loop["state_dict"], completed_epochs(saved))
    saved["callbacks"] = {
        name: {key: value for key, value in state.items() if "path" not in key and key != "best_k_models"}
        for name, state in saved["callbacks"].items()
    }
    return saved


def assert_equal(ours, theirs, place="checkpoint"):
    """Equality to the bit, through dictionaries and lists."""
    assert type(ours) is type(theirs), place
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), place
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{place}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{place}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, place
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place


def assert_same_run(ours: Path, theirs: Path):
    """Both checkpoints, every point of TensorBoard and every row of metrics.csv."""
    for name in ("best", "last"):
        assert_equal(*(without_places(checkpoint(root, name)) for root in (ours, theirs)), name)
    logged = [scalars(root / "logs" / RUN) for root in (ours, theirs)]
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[0]["train/loss_step"]] == list(range(1, len(logged[0]["train/loss_step"]) + 1))
    rows = [(root / "logs" / RUN / "metrics.csv").read_text() for root in (ours, theirs)]
    assert rows[0] == rows[1]
    assert [path.name for path in (ours / "logs/tiny").iterdir()] == ["version_0"]


def fit(recipe, root, *options):
    return (
        "fit", "--config", recipe, "--trainer.default_root_dir", root, "--trainer.max_epochs", EPOCHS,
        "--data.val_size", 29, "--data.batch_size", 24, "--pictures_every", 0, *options,
    )  # fmt: skip
