"""How often `aiexec drift` alarms when nothing has changed, and how often it finds what has: 50 columns of many shapes, seeded.

python benchmarks/drift_simulation.py [WINDOWS] [SCENARIO …] [--columns]   (--columns: without the look at all columns together, which is slow)
Beside the verdict at default settings stands what a test of each column at p < 0.05 would have said of the same window
(Kolmogorov–Smirnov for numbers, chi-squared for categories)."""

import sys
from collections import Counter

import numpy as np
import pandas as pd

from aiexec.monitor.tallies import outline, tally
from aiexec.monitor.windows import Window, based, compare

NUMBERS, CATEGORIES = 35, 15
SHAPES = {
    "normal": lambda rng, rows: rng.normal(size=rows),
    "exponential": lambda rng, rows: rng.exponential(size=rows),
    "lognormal": lambda rng, rows: rng.lognormal(0, 1.5, rows),
    "heavy tails": lambda rng, rows: rng.standard_t(2, rows),
    "counts": lambda rng, rows: rng.poisson(2, rows).astype(float),
    "two ends": lambda rng, rows: rng.beta(0.5, 0.5, rows),
    "noughts": lambda rng, rows: np.where(rng.random(rows) < 0.6, 0, rng.gamma(2, 1, rows)),
}
SIZES = (3, 8, 20, 60, 300)  # categories, as frequent as words are


def table(rng: np.random.Generator, rows: int, tails: bool = False, rare: bool = False, gaps: bool = False) -> pd.DataFrame:
    """Columns of all shapes; or of heavy tails only; or with rare categories; or with values missing."""
    shapes = [SHAPES["heavy tails"], SHAPES["lognormal"]] if tails else list(SHAPES.values())
    columns = {f"number {i}": shapes[i % len(shapes)](rng, rows) for i in range(NUMBERS)}
    for i in range(CATEGORIES):
        size = 2_000 if rare else SIZES[i % len(SIZES)]
        share = 1 / np.arange(1, size + 1) ** 1.2
        columns[f"category {i}"] = np.array([f"value {j}" for j in range(size)])[rng.choice(size, rows, p=share / share.sum())]
    found = pd.DataFrame(columns)
    return found.mask(rng.random(found.shape) < 0.05) if gaps else found


def shifted(rng: np.random.Generator, window: pd.DataFrame, pool: pd.DataFrame, index: float, category: bool) -> tuple[pd.DataFrame, str]:
    """One column drawn anew so that its true index on ten equal cells, or on its categories, is exactly this."""
    name = f"category {rng.integers(0, CATEGORIES // 5) * 5 + 1}" if category else f"number {rng.choice([0, 1, 2, 3, 5])}"
    cells = pool[name].astype("category").cat.codes.to_numpy() if category else pd.qcut(pool[name], 10, labels=False).to_numpy()
    share = np.bincount(cells) / len(cells)
    slope, low, high = np.linspace(-1, 1, len(share)), 0.0, 5.0
    for _ in range(60):
        tilted = share * np.exp((low + high) / 2 * slope)
        tilted /= tilted.sum()
        found = ((tilted - share) * np.log(tilted / share)).sum()
        low, high = ((low + high) / 2, high) if found < index else (low, (low + high) / 2)
    weights = (tilted / share)[cells]
    return window.assign(**{name: pool[name].to_numpy()[rng.choice(len(pool), len(window), p=weights / weights.sum())]}), name


def naive(window: Window) -> bool:
    """Whether any column's own test says p < 0.05."""
    return any(column["p"] is not None and column["p"] < 0.05 for column in window.columns.values())


SCENARIOS = {  # rows of the reference and of a window; what is special; the true index of the one column that changed
    "unchanged": (20_000, 5_000, {}, 0.0), "PSI 0.25 in a number": (20_000, 5_000, {}, 0.25),
    "PSI 0.25 in a category": (20_000, 5_000, {}, 0.25), "unchanged, 1,000 rows": (20_000, 1_000, {}, 0.0),
    "unchanged, 200 rows": (20_000, 200, {}, 0.0), "unchanged, reference of 1,000": (1_000, 1_000, {}, 0.0),
    "unchanged, reference of 300": (300, 5_000, {}, 0.0), "unchanged, heavy tails": (20_000, 5_000, {"tails": True}, 0.0),
    "unchanged, rare categories": (20_000, 5_000, {"rare": True}, 0.0), "unchanged, 5 % missing": (20_000, 5_000, {"gaps": True}, 0.0),
    "PSI 0.25 in a number, 1,000 rows": (20_000, 1_000, {}, 0.25), "PSI 0.25 in a number, 200 rows": (20_000, 200, {}, 0.25),
    "missing 5 % → 15 %": (20_000, 5_000, {"gaps": True}, -1.0), "PSI 0.05 in a number": (20_000, 5_000, {}, 0.05),
}


def simulated(name: str, windows: int, jointly: bool = True, seed: int = 0) -> dict:
    """Many windows of one scenario; every twentieth against a new reference."""
    before, rows, special, index = SCENARIOS[name]
    rng, counts = np.random.default_rng([seed, *name.encode()]), Counter()
    for number in range(windows):
        if number % 20 == 0:
            reference = table(rng, before, **special)
            like = outline(reference)
            base = based(tally(reference, like))
        window, changed = table(rng, rows, **special), None
        if index > 0:
            window, changed = shifted(rng, window, reference, index, "category" in name)
        elif index < 0:
            changed = f"number {rng.integers(0, NUMBERS)}"
            window[changed] = window[changed].mask(rng.random(rows) < 0.105)
        told = compare(base, tally(window, like, base.ends), jointly=jointly)
        counts[told.verdict] += 1
        counts["found"] += changed is not None and told.columns[changed]["verdict"] in ("watch", "act")
        counts["other column"] += any(column["verdict"] in ("watch", "act") for other, column in told.columns.items() if other != changed)
        counts["together"] += told.multivariate["verdict"] in ("watch", "act")
        counts["naive"] += naive(told)
    return {"scenario": name, "windows": windows, **{key: counts[key] / windows for key in
            ("act", "watch", "cannot tell", "found", "other column", "together", "naive")}}


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--columns"]
    many, chosen = int(words[0]) if words else 300, words[1:] or list(SCENARIOS)
    print(f"{'scenario':<34}windows    act  watch  cannot tell  found  other column  all together  p < 0.05 per column")
    for scenario in chosen:
        row = simulated(scenario, many, "--columns" not in sys.argv)
        print(f"{row['scenario']:<34}{row['windows']:>7}{row['act']:>7.1%}{row['watch']:>7.1%}{row['cannot tell']:>13.1%}{row['found']:>7.1%}"
              f"{row['other column']:>14.1%}{row['together']:>14.1%}{row['naive']:>21.1%}", flush=True)
