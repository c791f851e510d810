"""Three recipes that train in a second, and a finished comparison of them, that several tests share."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from cbam_pl.cli import main
from cbam_pl.commands.compare import command as command_module
from cbam_pl.commands.compare import controls, costs, jobs

_CALL = jobs._call  # before `quick` replaces it
KINDS = ("none", "se", "cbam")


@pytest.fixture(scope="session")
def recipes(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of attention → recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    paths = {}
    for kind in KINDS:
        paths[kind] = folder / f"{kind}.yaml"
        paths[kind].write_text(recipe.read_text().replace("kind: cbam", f"kind: {kind}"))
    return paths


@pytest.fixture(scope="package")
def quick() -> Any:
    """Commands of jobs run in this process, and costs are measured in a moment: a process of its own takes seconds."""

    def call(job: Any, environment: Any, stop: Any, arguments: Any) -> Any:
        calls.append([job.name, job.seed, arguments[0]])
        with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                main([*arguments])
            except SystemExit as end:
                return f"{arguments[0]} ended with status {end.code}" if end.code else None
        return None

    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_call", call)
        for module in (controls, costs, command_module):
            patch.setattr(module, "in_new_process", lambda threads, work, *arguments: work(*arguments))
        patch.setattr(command_module, "_COST_ROUNDS", 1)
        patch.setattr(command_module, "_COST_SECONDS", 0.0)
        patch.setattr(controls, "_ROUNDS", 1)
        patch.setattr(controls, "_SECONDS", 0.0)
        yield calls


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of jobs run in processes of their own, as they do outside of tests."""
    monkeypatch.setattr(jobs, "_call", _CALL)


@pytest.fixture(scope="package")
def compared(command: Any, recipes: Any, quick: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished comparison of three recipes and two seeds: the command's options and its outcome. Read only."""
    root = tmp_path_factory.mktemp("compared")
    options = ["--configs", *recipes.values(), "--seeds", 0, 1, "--jobs", 1, "--output", root / "report"]
    options += ["--trainer.default_root_dir", root]
    quick.clear()
    outcome = command("compare", *options)
    assert outcome.status == 0, outcome.err
    content = json.loads((root / "report/report.json").read_text())
    return root, options, outcome, content, list(quick)
