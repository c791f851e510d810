"""The controls of a comparison: for each recipe with attention, the baseline at the same cost spent otherwise."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from cbam_pl.commands.compare.costs import TimedRecipe, in_new_process
from cbam_pl.commands.compare.jobs import threads_per_job
from cbam_pl.commands.compare.plan import Control, Cost, Plan, labels_of, name_of, nest
from cbam_pl.errors import UserError, as_user_error
from cbam_pl.models import stage_channels
from cbam_pl.models.cost import count_parameters
from cbam_pl.settings import command_parser, make_training
from cbam_pl.timing import time_in_turns

TOLERANCE = 0.05  # how far the time of a step may be from the recipe's
_CLOSE = 0.03  # of a trial, in the logarithm of times, so that the measurement that follows is within the tolerance
_MOST_TRIALS = 8
_ROUNDS, _SECONDS = 5, 0.3
# The arguments of each schedule that count steps or epochs; one that is null spans the training by itself.
_LENGTHS: dict[str, tuple[str, ...]] = {
    "ConstantLR": ("total_iters",),
    "CosineAnnealingLR": ("T_max",),
    "CosineAnnealingWarmRestarts": ("T_0",),
    "CyclicLR": ("step_size_up", "step_size_down"),
    "ExponentialLR": (),
    "LinearLR": ("total_iters",),
    "MultiStepLR": ("milestones",),
    "OneCycleLR": ("total_steps", "epochs"),
    "PiecewiseConstantLR": (),
    "PolynomialLR": ("total_iters",),
    "ReduceLROnPlateau": (),
    "StepLR": ("step_size",),
    "WarmupCosineLR": ("total_steps",),
}
_REPEATING = ("CosineAnnealingWarmRestarts", "CyclicLR", "StepLR")
_SHIFT = 0.01  # by which a period may be rounded
_SCHEDULE = "model.lr_scheduler."


def add_controls(plan: Plan, costs: Sequence[Cost], may_choose: bool) -> Plan:
    """The plan with its controls: those that its output folder records, others chosen now.

    Args:
        plan: the recipes to compare.
        costs: in which each control equals its recipe.
        may_choose: whether controls that are not recorded are measured and chosen.

    Raises:
        UserError: the baseline has attention or cannot be widened, no other recipe has attention, or the baseline's
            schedule cannot be stretched.
    """
    baseline, *others = plan.configs
    settings = plan.configs[baseline]
    if (kind := settings["model.attention.kind"]) != "none":
        raise UserError(
            f"--controls needs a baseline without attention, and {baseline} has model.attention.kind={kind}; "
            "name one without as the first"
        )
    if "parameters" in costs and not _has_width(settings):
        fixed = "model.weights" if settings.get("model.weights") else "model.network"
        raise UserError(
            f"--controls parameters: the {fixed} of {baseline} cannot be widened; use --controls time, which trains it "
            "for longer"
        )
    recipes = [name for name in others if plan.configs[name]["model.attention.kind"] != "none"]
    if not recipes:
        raise UserError(f"--controls: none of {', '.join(others)} has attention, so there is nothing to control for")
    if "time" in costs:
        with_more_epochs(settings, settings["trainer.max_epochs"] + 1)  # rejects what cannot be stretched
    recorded = plan.recorded_controls()
    controls = []
    for cost in dict.fromkeys(costs):
        for name in recipes:
            found = [one for one in recorded if (one.recipe, one.cost) == (name, cost)]
            if not found and not may_choose:
                raise UserError(
                    f"--recompute: {plan.output} has no control of {name} with the same {cost} yet; leave "
                    "--recompute out, to choose and train it"
                )
            controls += found or (_same_time(plan, name) if cost == "time" else [_same_parameters(plan, name)])
    configs, labels, added = dict(plan.configs), dict(plan.labels), []
    for control in controls:
        changed = _changed(settings, control.change)
        if configs.setdefault(control.name, changed) != changed:
            raise UserError(f"a recipe is called {control.name}, as a control is; rename its file")
        if control.name not in labels:
            labels[control.name] = " ".join([labels[baseline], *labels_of(control.change)])
            added.append(control.name)
    return replace(plan, configs=configs, labels=labels, controls=controls, added=added)


def note_left_out(plan: Plan, costs: Sequence[Cost]) -> Plan:
    """The plan with a note of the controls that its output folder records and that are not of these costs, if any."""
    left_out = dict.fromkeys(one.cost for one in plan.recorded_controls() if one.cost not in costs)
    if not left_out:
        return plan
    note = (
        f"This comparison has controls with the same {' and '.join(left_out)}, which are left out here, as is their "
        f"part in Holm's correction; --controls {' '.join([*costs, *left_out])} includes them."
    )
    return replace(plan, notes=[*plan.notes, note])


def describe(control: Control, plan: Plan) -> dict[str, Any]:
    """What a control and its recipe cost, as text; by what share the control costs more; and a note if it is much."""
    recipe, own = control.measured["recipe"], control.measured["control"]
    texts = [f"{value:,.0f} parameters" if control.cost == "parameters" else _step(value) for value in (recipe, own)]
    if control.means == "epochs":
        both = [plan.configs[name] for name in (control.recipe, control.name)]
        epochs, steps = ([settings.get(f"trainer.max_{unit}", -1) for settings in both] for unit in ("epochs", "steps"))
        limits = ["" if limit < 0 else f" or {limit:,} steps" for limit in steps]
        texts = [f"{count} epochs{limit}, {text}" for count, limit, text in zip(epochs, limits, texts, strict=True)]
        recipe, own = recipe * epochs[0], own * epochs[1]
    excess = own / recipe - 1
    note, names = None, [plan.labels[name] for name in (control.name, control.recipe)]
    if control.cost == "time" and abs(excess) > TOLERANCE:
        if control.means == "width":
            note = (
                f"The training step of {names[0]} was measured {abs(excess):.0%} "
                f"{'slower' if excess > 0 else 'faster'} than that of {names[1]}; none of the widths tried came nearer."
            )
        else:
            end = ", although it has no more epochs" if excess > 0 else "; with one epoch more it would exceed that"
            note = (
                f"The training of {names[0]} takes {abs(excess):.0%} {'more' if excess > 0 else 'less'} time than that "
                f"of {names[1]}{end}."
            )
    return {"recipe_cost": texts[0], "control_cost": texts[1], "excess": excess, "note": note}


def control_line(control: Control, plan: Plan) -> str:
    """What was chosen, as printed before the runs."""
    costs, name = describe(control, plan), plan.labels[control.name]
    which = f"{name}: {costs['control_cost']}, {costs['excess']:+.1%}"
    unchanged = {"width": "the baseline itself comes nearest", "epochs": "one epoch more would exceed its time"}
    nearest = "" if control.change else f"; {unchanged[control.means]}"
    return f"control of {plan.labels[control.recipe]} ({costs['recipe_cost']}), same {control.cost}: {which}{nearest}"


def _step(milliseconds: float) -> str:
    return f"{milliseconds:,.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f} ms a step"


def _has_width(settings: dict[str, Any]) -> bool:
    """Whether the network can be widened: one of this program's own, and not started from a file of weights."""
    fixed = ("model.network", "model.weights")
    return not any(key.startswith(fixed) and value is not None for key, value in settings.items())


def _changed(settings: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    if epochs := change.get("trainer.max_epochs"):
        return with_more_epochs(settings, epochs)
    return settings | change


# The same time


def _same_time(plan: Plan, name: str) -> list[Control]:
    baseline, settings = next(iter(plan.configs.items()))
    finest = max(stage_channels(settings.get("model.arch", "cnn"))) if _has_width(settings) else 0
    widths = " at several widths" if finest else ""
    print(f"timing training steps of {name} and of {baseline}{widths}", flush=True)
    threads = threads_per_job()
    found = in_new_process(threads, match_width, settings, plan.configs[name], finest, _ROUNDS, _SECONDS)
    if found is None:
        raise UserError("--controls time: out of memory; lower data.batch_size")
    epochs = settings["trainer.max_epochs"]
    longer = max(epochs, math.floor(epochs * found["recipe"] / found["baseline"]))
    changes = [("width", "model.width", found["width"], found["control"])] if finest else []
    changes.append(("epochs", "trainer.max_epochs", longer, found["baseline"]))
    controls = []
    for means, key, value, milliseconds in changes:
        change = {} if value == settings[key] else {key: value}
        measured = {"recipe": found["recipe"], "control": milliseconds}
        control_name = name_of(baseline, change)
        controls.append(Control(name, "time", means, control_name, change, measured))  # type: ignore[arg-type]
    return controls


def match_width(
    baseline: dict[str, Any], recipe: dict[str, Any], finest: int, rounds: int, seconds: float
) -> dict[str, float]:
    """Find the width at which a training step of the baseline takes as long as the recipe's.

    Args:
        baseline: its settings, by dotted key.
        recipe: the same of the recipe.
        finest: widths are whole multiples of 1 / finest; 0: only the baseline's width.
        rounds: turns in which the two are timed.
        seconds: time of each turn.

    Returns:
        The width, and milliseconds of a training step of the recipe, the baseline, and the control of that width. They
        are measured once more, in turns, since the time by which a width was chosen is low or high by chance.
    """
    theirs = TimedRecipe(recipe)

    def compare_steps(widths: dict[str, float], rounds: int) -> tuple[float, dict[str, float]]:
        works = {"recipe": theirs.train_step}
        works |= {key: TimedRecipe(baseline | {"model.width": width}).train_step for key, width in widths.items()}
        times = time_in_turns(works, rounds, seconds, theirs.device)
        # Of the same round each, which a busy moment of the machine affects alike.
        pairs = {key: zip(times[key], times["recipe"], strict=True) for key in widths}
        ratios = {key: statistics.median(ours / other for ours, other in pair) for key, pair in pairs.items()}
        return statistics.median(times["recipe"]), ratios

    def find(rounds: int) -> dict[str, float]:
        start = baseline["model.width"]
        width = start
        if finest:
            width = search_width(lambda width: compare_steps({"": width}, rounds)[1][""], start, finest)
        seconds_per_step, ratios = compare_steps({"baseline": start, "control": width}, 2 * rounds)
        return {
            "width": width,
            "recipe": 1000 * seconds_per_step,
            **{key: 1000 * seconds_per_step * ratio for key, ratio in ratios.items()},
        }

    def distance(found: dict[str, float]) -> float:
        return abs(found["control"] / found["recipe"] - 1)

    found = find(rounds)
    if finest and distance(found) > TOLERANCE:  # a busy machine may have led to another width
        found = min(found, find(rounds), key=distance)
    return found


def search_width(time_ratio: Callable[[float], float], start: float, finest: int) -> float:
    """The widest width from `start` on whose time is close to the wanted one; if none is, the one that comes nearest.

    The widest, because the time may jump at the first channel more and then hardly grow up to the next multiple of 8 or
    16: one channel more would be a weak control. Tried are widths between one that is fast enough and one that is too
    slow, by interpolation until one is close, then by halving.

    Args:
        time_ratio: width → its time, divided by the wanted one.
        start: the narrowest width.
        finest: widths are whole multiples of 1 / finest.
    """
    ratios = {start: math.log(time_ratio(start))}
    if ratios[start] > _CLOSE:
        return start  # even the baseline is slower than the recipe
    fast, slow = start, None
    for _ in range(_MOST_TRIALS - 1):
        close = ratios[fast] >= -_CLOSE
        if slow is None:
            # The time grows like the width, or like its square.
            guess = fast * min(2.0, max(math.exp(-2 / 3 * ratios[fast]), 1 + 3 * _CLOSE))
        elif close:
            guess = (fast + slow) / 2
        else:
            guess = fast * (slow / fast) ** (ratios[fast] / (ratios[fast] - ratios[slow]))
        number = max(round(guess * finest), math.floor(fast * finest) + 1)
        if slow is not None:
            number = min(number, math.ceil(slow * finest) - 1)
            if number <= fast * finest or (close and slow <= fast * (1 + _CLOSE)):
                break
        width = number / finest
        ratios[width] = math.log(time_ratio(width))
        if ratios[width] <= _CLOSE:
            fast = width
        else:
            slow = width
    return fast if slow is None or abs(ratios[fast]) <= abs(ratios[slow]) else slow


def with_more_epochs(settings: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The settings of a training of more epochs, its limit of steps and its schedule stretched to the same share.

    Raises:
        UserError: the schedule is none of those that can be stretched, or its period is too short for that.
    """
    factor = Fraction(epochs, settings["trainer.max_epochs"])
    stretched = {**settings, "trainer.max_epochs": epochs}
    if (steps := settings.get("trainer.max_steps", -1)) > 0:
        stretched["trainer.max_steps"] = math.floor(steps * factor)
    path = settings.get(f"{_SCHEDULE}class_path")
    if path is None:
        return stretched
    schedule = path.rpartition(".")[2]
    if schedule not in _LENGTHS:
        raise UserError(
            f"--controls time: {_SCHEDULE.rstrip('.')}={path} cannot be stretched to more epochs; use one of "
            f"{', '.join(_LENGTHS)}, or --controls parameters"
        )
    if schedule == "StepLR" and settings.get("model.lr_interval") == "epoch":
        return _with_milestones(stretched, path, settings["trainer.max_epochs"], factor)
    for name in _LENGTHS[schedule]:
        key = f"{_SCHEDULE}init_args.{name}"
        if isinstance(length := settings.get(key), list):
            stretched[key] = [round(one * factor) for one in length]
        elif length is not None:
            stretched[key] = round(length * factor)
            if schedule in _REPEATING and abs(stretched[key] / (length * factor) - 1) > _SHIFT:
                raise UserError(
                    f"--controls time: {_SCHEDULE}{name}={length} cannot be stretched to {epochs} epochs in whole "
                    "ones; use a schedule without a period, or --controls parameters"
                )
    key = f"{_SCHEDULE}init_args.gamma"
    if schedule in ("ExponentialLR", "CyclicLR") and key in settings:  # of each step; that of others is of each length
        stretched[key] = settings[key] ** float(1 / factor)
    rates = f"{_SCHEDULE}init_args.rates."  # of PiecewiseConstantLR: the epoch is part of the key
    moved = {key: value for key, value in settings.items() if key.startswith(rates)}
    for key in moved:
        del stretched[key]
    return stretched | {f"{rates}{round(int(key.removeprefix(rates)) * factor)}": moved[key] for key in moved}


def _with_milestones(settings: dict[str, Any], path: str, epochs: int, factor: Fraction) -> dict[str, Any]:
    """The settings of a StepLR as a MultiStepLR's: rounded to whole epochs, its period would add up an error."""
    key = f"{_SCHEDULE}init_args.step_size"
    period = settings[key]
    milestones = [round(number * period * factor) for number in range(1, math.ceil(epochs / period))]
    changed = {f"{_SCHEDULE}class_path": path.replace("StepLR", "MultiStepLR")}
    kept = {name: value for name, value in settings.items() if name != key}
    return kept | changed | {f"{_SCHEDULE}init_args.milestones": milestones}


# The same number of parameters


def _same_parameters(plan: Plan, name: str) -> Control:
    baseline, settings = next(iter(plan.configs.items()))
    start, finest = settings["model.width"], max(stage_channels(settings.get("model.arch", "cnn")))
    wanted = _count(plan.configs[name])

    def count(number: int) -> int:
        return _count(settings | {"model.width": number / finest})

    first = math.floor(start * finest) + 1
    last = first
    while count(last) < wanted:
        last *= 2
    number = first + bisect_left(range(first, last), wanted, key=count)
    counts = {start: _count(settings)}
    counts |= {other / finest: count(other) for other in (number - 1, number) if other >= first}
    width = min(counts, key=lambda width: abs(counts[width] - wanted))  # of two, the narrower
    change = {} if width == start else {"model.width": width}
    measured = {"recipe": float(wanted), "control": float(counts[width])}
    return Control(name, "parameters", "width", name_of(baseline, change), change, measured)


def _count(settings: dict[str, Any]) -> int:
    parser = command_parser("fit")
    with as_user_error(), torch.device("meta"):
        values = parser.instantiate(parser.parse_object(nest(settings)))
        return count_parameters(make_training(values)[0].network)
