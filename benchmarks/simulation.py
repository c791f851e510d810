"""How often intervals find a difference where there is none, in simulated comparisons: python -m benchmarks.simulation

Each network classifies an image correctly where difficulty + preference + seed + noise > 0: the image's difficulty for
all networks, the recipe's preference for the image, the network's own strength, and chance, all normal. Two recipes of
one comparison have the same distribution of each, so that neither is better. Figures are in docs/compare.md.
"""

import argparse
import time

import numpy as np
from scipy import stats

from cbam_pl.commands.compare.statistics import compare_pairs, interval_over_images

ACCURACY_SHIFT = 1.405  # standard deviations: 92 % of the images are classified correctly
DIFFICULTY, STRENGTH = 3.0, 0.03  # two seeds of a recipe disagree on 5 % of the images, and differ by 0.2 points
PREFERENCES = {"the same images are easy for both": 0.0, "each recipe has images of its own": 1.0}


def simulate(
    comparisons: int, seeds: int, images: int, preference: float, generator: np.random.Generator
) -> np.ndarray:
    """Differences (comparisons, seeds, images) int8 of correctness: 1 where the first recipe alone is right, or −1."""
    shift = ACCURACY_SHIFT * np.sqrt(1 + DIFFICULTY**2 + preference**2)
    differences = np.empty((comparisons, seeds, images), np.int8)
    for one in differences:
        score = shift + DIFFICULTY * generator.standard_normal(images, np.float32)
        score = score + preference * generator.standard_normal((2, 1, images), np.float32)
        score = score + STRENGTH * generator.standard_normal((2, seeds, 1), np.float32)
        correct = score + generator.standard_normal((2, seeds, images), np.float32) > 0
        one[:] = correct[0].astype(np.int8) - correct[1]
    return differences


def false_findings(differences: np.ndarray) -> dict[str, float]:
    """The share of comparisons whose interval excludes 0, in per cent, by interval."""
    zeros = [0.0] * differences.shape[1]
    by_seed = [compare_pairs(one, zeros).interval for one in differences.mean(2).tolist()]
    intervals = {
        "paired t over seeds": [interval or (0.0, 0.0) for interval in by_seed],  # equal differences find nothing
        "over seeds and images": [interval_over_images(one) for one in differences],
    }
    return {name: 100 * float(np.mean(np.prod(ends, 1) > 0)) for name, ends in intervals.items()}


def found_by_adding(first: int, last: int, comparisons: int, generator: np.random.Generator) -> float:
    """The share of comparisons in which a seed from the `first` to the `last` makes the difference significant, in %.

    Seeds are added one by one, up to the first p value below 0.05; the differences are normally distributed.
    """
    differences = generator.standard_normal((comparisons, last))
    p_values = [stats.ttest_1samp(differences[:, :count], 0, axis=1).pvalue for count in range(first, last + 1)]
    return 100 * float((np.min(p_values, 0) < 0.05).mean())


def main() -> None:
    """Print the share of each kind of comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    print(f"{options.comparisons:,} comparisons without a difference, {options.images:,} images; found, in %:")
    for name, preference in PREFERENCES.items():
        for seeds in (3, 5):
            start = time.perf_counter()
            sample = simulate(options.comparisons, seeds, options.images, preference, np.random.default_rng(0))
            found = ", ".join(f"{share:.1f} {what}" for what, share in false_findings(sample).items())
            print(f"{name}, {seeds} seeds: {found} ({time.perf_counter() - start:.0f} s)", flush=True)
    for last in (3, 5, 10):
        share = found_by_adding(3, last, 20 * options.comparisons, np.random.default_rng(0))
        print(f"looking after each seed from the third to number {last}: {share:.1f} by paired t over seeds")


if __name__ == "__main__":
    main()
