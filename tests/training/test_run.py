import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cbam_pl.errors import UserError
from cbam_pl.training.checkpoint import newest_checkpoint
from cbam_pl.training.run import Run, is_result_of, new_run, run_of


def test_versions_count_up_from_zero_past_either_folder(tmp_path):
    assert new_run(tmp_path, "a").version == 0
    (tmp_path / "logs/a/version_7").mkdir(parents=True)
    assert new_run(tmp_path, "a").version == 8
    assert new_run(tmp_path, "b").version == 0


def test_runs_started_at_once_take_different_versions(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        versions = [run.version for run in pool.map(lambda _: new_run(tmp_path, "a"), range(32))]
    assert sorted(versions) == list(range(32))


def test_an_unusable_folder_is_named(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write into the run's folder .*logs.*default_root_dir"):
        new_run(tmp_path, "a")


def test_a_checkpoint_tells_its_run():
    assert run_of(Path("/x/checkpoints/a/version_3/best.ckpt")) == Run(Path("/x"), "a", 3)
    assert run_of(Path("/x/best.ckpt")) is None
    assert run_of(Path("/x/elsewhere/a/version_3/best.ckpt")) is None


def test_the_newest_checkpoint_is_the_last_written(tmp_path):
    for index, name in enumerate(["a/version_1", "a/version_0", "b/version_0"]):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "best.ckpt").touch()
        os.utime(folder / "best.ckpt", (index, index))
    assert newest_checkpoint(tmp_path, "best").parent.parent.name == "b"
    assert newest_checkpoint(tmp_path, "best", "a").parent.name == "version_0"
    with pytest.raises(UserError, match=re.escape("no last.ckpt of a under")):
        newest_checkpoint(tmp_path, "last", "a")


def test_a_result_is_of_one_checkpoint_alone():
    result = {"epoch": 3, "step": 9, "saved_at": 1.5}
    assert is_result_of(result, 3, 9, 1.5)
    assert is_result_of(result, 3, None)
    assert is_result_of({"epoch": 3}, 3, 9, 1.5), "of an earlier version"
    assert is_result_of({**result, "saved_at": None}, 3, 9, 1.5), "of its checkpoint"
    others = ((2, 9, 1.5), (3, 8, 1.5), (3, 9, 2.5))  # the last: another folder of weights of the same name
    assert not any(is_result_of(result, *other) for other in others)


def test_only_an_unused_run_is_discarded(tmp_path):
    unused, begun, saved = (new_run(tmp_path, "a") for _ in range(3))
    (unused.logs / "events").touch()
    (begun.logs / "config.yaml").touch()
    (saved.checkpoints / "last.ckpt").touch()
    for run in (unused, begun, saved):
        run.discard_if_unused()
    assert [run.logs.exists() for run in (unused, begun, saved)] == [False, True, True]
    assert [run.checkpoints.exists() for run in (unused, begun, saved)] == [False, True, True]
