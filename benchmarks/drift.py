"""Drift of 1,000,000 × 20 (16 numeric, 4 text): `aiexec drift` beside a bare numpy index, and Evidently and NannyML where they are.

python benchmarks/drift.py [ROUNDS] [--evidently PYTHON] [--nannyml PYTHON] [--rows 1000000] [--long 20000000]   (0 rounds: the long table only)
Evidently 0.7 wants pandas 2, NannyML 0.13 wants statsmodels: each is asked in an environment of its own, given by its python."""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from beside import AIEXEC, environment, in_turn, seconds, tell

BARE = """
import numpy as np, pandas as pd, sys
def index(before, now):
    edges = np.quantile(before, np.linspace(0, 1, 11)[1:-1])
    old, new = [np.maximum(np.bincount(np.searchsorted(edges, each), minlength=10) / len(each), 1e-6) for each in (before, now)]
    return float(((new - old) * np.log(new / old)).sum())
def whole(before, now):
    return [index(before[name].to_numpy(), now[name].to_numpy()) for name in before if before[name].dtype.kind == "f"]
if len(sys.argv) == 3:
    print(whole(*map(pd.read_parquet, sys.argv[1:])))
"""
EVIDENTLY = """
import pandas as pd, sys, time, warnings; warnings.filterwarnings("ignore")
from evidently import Report; from evidently.presets import DataDriftPreset
before, now = map(pd.read_parquet, sys.argv[1:3]); begun = time.perf_counter()
Report([DataDriftPreset()]).run(now, before).dict(); print(time.perf_counter() - begun)
"""
NANNYML = """
import pandas as pd, sys, time, warnings; warnings.filterwarnings("ignore")
import nannyml
before, now = map(pd.read_parquet, sys.argv[1:3])
for numbers, names in ((["kolmogorov_smirnov"], ["chi2"]), (["kolmogorov_smirnov", "jensen_shannon", "wasserstein"], ["chi2", "jensen_shannon"])):
    begun = time.perf_counter()
    nannyml.UnivariateDriftCalculator(column_names=list(before), continuous_methods=numbers, categorical_methods=names,
        chunk_number=1).fit(before).calculate(now); print(time.perf_counter() - begun)
"""


def batch(rows: int, seed: int, shift: float = 0.0) -> pd.DataFrame:
    """Sixteen columns of numbers and four of text."""
    rng = np.random.default_rng(seed)
    numbers = {f"number {i}": rng.normal(shift * (i == 0), 1 + i, rows) if i % 2 else rng.lognormal(0, 1, rows) for i in range(16)}
    texts = {f"text {i}": pd.Series(np.array([f"value {j}" for j in range(size)], dtype=object)[rng.integers(0, size, rows)], dtype="str")
             for i, size in enumerate((5, 20, 100, 1000))}
    return pd.DataFrame(numbers | texts)


def written(folder: Path, rows: int) -> list[Path]:
    """Two files, the second of which has drifted a little."""
    paths = [folder / "before.parquet", folder / "now.parquet"]
    for seed, path in enumerate(paths):
        batch(rows, seed, 0.3 * seed).to_parquet(path, row_group_size=200_000)
    return paths


def in_memory(before: pd.DataFrame, now: pd.DataFrame) -> float:
    """All default tests of the library: profiles of both, every column, all columns together."""
    from aiexec.monitor.windows import baseline, compare_tables

    begun = time.perf_counter()
    assert compare_tables(baseline(before), now).rows == len(now)
    return time.perf_counter() - begun


def per_column(before: pd.DataFrame, now: pd.DataFrame) -> float:
    """The same without the look at all columns together, as the peers have none."""
    from aiexec.monitor.multivariate import LEAST
    from aiexec.monitor.tallies import tally
    from aiexec.monitor.windows import baseline, column_verdicts, signs

    begun = time.perf_counter()
    base = baseline(before)
    current = tally(now, base.tally.profile, base.ends)
    found = {name: signs(base, name, current, name not in base.kinds, 0.1, 0.25) for name in base.columns}
    column_verdicts(base.columns, current.profile.columns, base.kinds, {name: one for name, (one, _) in found.items()},
                    {name: figures for name, (_, figures) in found.items()}, 0.25)
    assert LEAST
    return time.perf_counter() - begun


def bare(before: pd.DataFrame, now: pd.DataFrame) -> float:
    """The index of the numeric columns by numpy alone."""
    space: dict = {"__name__": "bare", "sys": sys}
    exec(BARE.replace("len(sys.argv) == 3", "False"), space)
    begun = time.perf_counter()
    space["whole"](before, now)
    return time.perf_counter() - begun


def peer(python: str | None, name: str, code: str, paths: list[Path]) -> None:
    """What a peer takes, once, in its own environment."""
    if not python:
        print(f"{name}: not measured: give the python of an environment that has it.")
        return
    done = subprocess.run([python, "-c", code, *map(str, paths)], capture_output=True, text=True,
                          env=environment(NML_DISABLE_USAGE_LOGGING="1", DO_NOT_TRACK="1"))
    print(f"{name}: " + (", ".join(f"{float(line):.1f} s" for line in done.stdout.split()[-2:]) if not done.returncode else done.stderr[-400:]), flush=True)


def stored(windows: int = 52, columns: int = 20) -> None:
    """A new window against stored ones: their profiles are merged and compared, no row is read."""
    from aiexec.monitor.drift import drift
    from aiexec.monitor.profiles import merge, profile, profile_on

    reference = profile(batch(20_000, 0))
    kept = [profile_on(batch(2_000, number), reference) for number in range(windows + 1)]
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        drift(merge(*kept[:windows]), kept[-1])
        times.append(time.perf_counter() - begun)
    print(f"a new window against {windows} stored ones, {columns} columns: {1000 * sorted(times)[3]:.0f} ms", flush=True)


def long(folder: Path, rows: int) -> None:
    """A table that is too long to be held, by the command in 2 GB of memory: time and the largest size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(batch(1_000_000, 0), preserve_index=False)
    needed, free = 180 * rows, shutil.disk_usage(folder).free
    if needed > free / 2:
        raise SystemExit(f"{rows:,} rows take about {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB that are free: set TMPDIR, or ask for fewer.")
    for size in (rows // 4, rows):
        with pq.ParquetWriter(folder / f"{size}.parquet", table.schema) as writer:
            for _ in range(size // len(table)):
                writer.write_table(table, row_group_size=250_000)
        begun = time.perf_counter()
        child = subprocess.Popen([AIEXEC, "drift", folder / f"{size}.parquet", folder / "now.parquet", "--json"], stdout=subprocess.DEVNULL,
                                 env=environment(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30)))
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        print(f"{size:,} rows × 20 by the command within 2 GB: {time.perf_counter() - begun:.0f} s, at most {used.ru_maxrss / 1024:,.0f} MB, "
              f"exit code {child.returncode}", flush=True)
        (folder / f"{size}.parquet").unlink()


if __name__ == "__main__":
    words = argparse.ArgumentParser()
    words.add_argument("rounds", nargs="?", type=int, default=5)
    words.add_argument("--rows", type=int, default=1_000_000)
    words.add_argument("--long", type=int, default=0)
    words.add_argument("--evidently")
    words.add_argument("--nannyml")
    said = words.parse_args()
    with tempfile.TemporaryDirectory() as place:
        files = written(Path(place), said.rows)
        if said.rounds:
            tables = [pd.read_parquet(file) for file in files]
            print(f"{said.rows:,} rows × 20, in memory")
            tell(in_turn(said.rounds, {"bare numpy, numbers only": lambda: bare(*tables), "aiexec, every column's tests": lambda: per_column(*tables),
                                       "aiexec, all columns together too": lambda: in_memory(*tables)}))
            del tables
            (Path(place) / "bare.py").write_text(BARE, encoding="utf-8")
            print("whole commands, with reading")
            tell(in_turn(said.rounds, {"bare numpy, numbers only": lambda: seconds(sys.executable, "bare.py", *files, cwd=Path(place)),
                                       "aiexec drift": lambda: seconds(AIEXEC, "drift", *files, cwd=Path(place))}))
            stored()
            peer(said.nannyml, "NannyML, KS + chi-squared; with Jensen–Shannon and Wasserstein", NANNYML, files)
            peer(said.evidently, "Evidently, its defaults", EVIDENTLY, files)
        if said.long:
            long(Path(place), said.long)
