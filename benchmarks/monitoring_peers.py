"""Drift beside Evidently 0.7 and NannyML 0.13, each in an environment of its own, in one run: how long it takes, and how right it is.

python benchmarks/monitoring_peers.py [ROUNDS] [--environments FOLDER] [--rows 1000000] [--windows 40] [--only speed|right]
The environments are made once by uv, in the folder given or in ~/.cache/aiexec-benchmarks: Evidently wants pandas 2, and NannyML
forgets to ask for statsmodels and reports its use unless NML_DISABLE_USAGE_LOGGING is 1."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from beside import AIEXEC, environment, seconds
from drift import BARE, bare, in_memory, per_column, written
from drift_simulation import SCENARIOS, naive, shifted, table

PEERS = {"evidently": ["evidently==0.7.*", "pandas<3", "pyarrow"], "nannyml": ["nannyml==0.13.*", "statsmodels", "pyarrow"]}
OUR_ENVIRONMENT = environment(NML_DISABLE_USAGE_LOGGING="1", DO_NOT_TRACK="1")
HEAD = """
import json, sys, time, warnings; warnings.filterwarnings("ignore")
import logging; logging.disable(logging.CRITICAL)
import pandas as pd
"""
EVIDENTLY = HEAD + """
from evidently import Report
from evidently.presets import DataDriftPreset
def ask(before, now, **how):
    return Report([DataDriftPreset(**how)]).run(now, before).dict()
def drifted(found):
    return int(found["metrics"][0]["value"]["count"])
"""
NANNYML = HEAD + """
import nannyml
PAIR = dict(continuous_methods=["kolmogorov_smirnov"], categorical_methods=["chi2"])
FOUR = dict(continuous_methods=["kolmogorov_smirnov", "jensen_shannon", "wasserstein"], categorical_methods=["chi2", "jensen_shannon"])
def fitted(before, chunks=dict(chunk_number=1), **how):
    return nannyml.UnivariateDriftCalculator(column_names=list(before), **chunks, **how).fit(before)
"""
TIMED = {
    "Evidently, its defaults": ("evidently", EVIDENTLY, "ask(before, now)"),
    "Evidently, PSI": ("evidently", EVIDENTLY, "ask(before, now, method='psi')"),
    "NannyML, Kolmogorov–Smirnov and chi-squared": ("nannyml", NANNYML, "fitted(before, **PAIR).calculate(now)"),
    "NannyML, with Jensen–Shannon and Wasserstein": ("nannyml", NANNYML, "fitted(before, **FOUR).calculate(now)"),
}
CLOCK = """
before, now = map(pd.read_parquet, sys.argv[1:3]); begun = time.perf_counter()
{}
print(time.perf_counter() - begun)
"""
# each prints, by window, whether it alarms, and whether the column that changed is among those it names
RIGHT = {
    "evidently": EVIDENTLY + """
from pathlib import Path
before = pd.read_parquet(sys.argv[1])
for path in sorted(Path(sys.argv[2]).iterdir()):
    now, changed = pd.read_parquet(path), path.stem.partition("@")[2]
    for method in (None, "psi"):
        found = ask(before, now, **({"method": method} if method else {}))["metrics"]
        words = {}
        for one in found[1:]:
            config = one.get("config", {}); column, value, limit = config.get("column"), float(one["value"]), float(config.get("threshold") or 0.1)
            name = str(config.get("method", method))
            words[column] = value < limit if "p_value" in name else value >= limit
        print(json.dumps(["Evidently, " + ("PSI" if method else "its defaults"), path.stem, any(words.values()), bool(words.get(changed))]), flush=True)
""",
    "nannyml": NANNYML + """
from pathlib import Path
before = pd.read_parquet(sys.argv[1])
known = {name: fitted(before, dict(chunk_size=5_000), **how) for name, how in (("NannyML, two tests", PAIR), ("NannyML, its defaults", dict(continuous_methods=["jensen_shannon"], categorical_methods=["jensen_shannon"])))}
for path in sorted(Path(sys.argv[2]).iterdir()):
    now, changed = pd.read_parquet(path), path.stem.partition("@")[2]
    for name, calculator in known.items():
        told = calculator.calculate(now).filter(period="analysis").to_df()
        alarms = [key[0] for key in told.columns if key[-1] == "alert" and bool(told[key].any())]
        print(json.dumps([name, path.stem, bool(alarms), changed in alarms]), flush=True)
""",
}


def python_of(name: str, folder: Path) -> Path:
    """The python of a peer's environment, made if need be."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        print(f"{name}: its environment is made in {folder / name} …", flush=True)
        uv = str(Path(sys.executable).parent / "uv") if (Path(sys.executable).parent / "uv").exists() else "uv"
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, folder / name], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *PEERS[name]], check=True)
    return python


def told(python: Path, code: str, *words: object) -> list[str]:
    """The lines that a peer prints."""
    done = subprocess.run([python, "-c", code, *map(str, words)], capture_output=True, text=True, env=OUR_ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{python.parents[1].name} failed: {done.stderr.strip()[-600:]}")
    return done.stdout.strip().splitlines()


def speed(rounds: int, rows: int, folder: Path) -> None:
    """Each in turn, on the same two files; the time is that of the work, without imports and reading unless said."""
    with tempfile.TemporaryDirectory() as place:
        files = written(Path(place), rows)
        (Path(place) / "bare.py").write_text(BARE, encoding="utf-8")
        tables = [pd.read_parquet(file) for file in files]
        asks = {"bare numpy, index of the numbers": lambda: bare(*tables), "aiexec, every column": lambda: per_column(*tables),
                "aiexec, all columns together too": lambda: in_memory(*tables),
                "bare numpy, whole command with reading": lambda: seconds(sys.executable, "bare.py", *files, cwd=Path(place)),
                "aiexec drift, whole command with reading": lambda: seconds(AIEXEC, "drift", *files, cwd=Path(place))}
        asks |= {name: lambda peer=peer, code=code, line=line: float(told(python_of(peer, folder), code + CLOCK.format(line), *files)[-1])
                 for name, (peer, code, line) in TIMED.items()}
        times = {name: [] for name in asks}
        for _ in range(rounds):
            for name, ask in asks.items():
                times[name].append(ask())
                print(f"  {name}: {times[name][-1]:.2f} s", flush=True)
    ours = statistics.median(times["aiexec, every column"])
    print(f"{rows:,} rows × 20, medians of {rounds}")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"{name:<48}{middle:>9.2f} s{middle / ours:>9.1f} × aiexec, every column", flush=True)


def right(windows: int, folder: Path) -> None:
    """The same windows for all: unchanged ones, and ones in which one column of fifty has an index of 0.25."""
    import json

    from aiexec.monitor.tallies import outline, tally
    from aiexec.monitor.windows import based, compare

    rng, before = np.random.default_rng(17), SCENARIOS["unchanged"][0]
    with tempfile.TemporaryDirectory() as place:
        reference, kept = table(rng, before), Path(place) / "windows"
        kept.mkdir()
        reference.to_parquet(Path(place) / "reference.parquet")
        like = outline(reference)
        base, lines = based(tally(reference, like)), []
        for number in range(windows):
            for kind in ("unchanged", "changed"):
                window, changed = table(rng, 5_000), ""
                if kind == "changed":
                    window, changed = shifted(rng, window, reference, 0.25, number % 2 == 1)
                name = f"{kind} {number:03d}@{changed}"
                window.to_parquet(kept / f"{name}.parquet")
                found = compare(base, tally(window, like, base.ends))
                lines.append(["aiexec", name, found.verdict in ("watch", "act"), bool(changed) and found.columns[changed]["verdict"] in ("watch", "act")])
                lines.append(["p < 0.05 on each column", name, naive(found), bool(changed) and found.columns[changed]["p"] < 0.05])
        for peer, code in RIGHT.items():
            lines += [json.loads(line) for line in told(python_of(peer, folder), code, Path(place) / "reference.parquet", kept)]
    print(f"{windows} windows unchanged and {windows} with an index of 0.25 in one of 50 columns; 5,000 rows against {before:,}")
    found = pd.DataFrame(lines, columns=["who", "window", "alarm", "found"])
    for who, of in found.groupby("who", sort=False):
        quiet, moved = of[of.window.str.startswith("unchanged")], of[of.window.str.startswith("changed")]
        print(f"{who:<28}false alarms {quiet.alarm.mean():>6.1%}   finds the column {moved.found.mean():>6.1%}   alarms when it changed {moved.alarm.mean():>6.1%}")


if __name__ == "__main__":
    words = argparse.ArgumentParser()
    words.add_argument("rounds", nargs="?", type=int, default=3)
    words.add_argument("--environments", type=Path, default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aiexec-benchmarks")
    words.add_argument("--rows", type=int, default=1_000_000)
    words.add_argument("--windows", type=int, default=40)
    words.add_argument("--only", choices=["speed", "right"])
    said = words.parse_args()
    said.environments.mkdir(parents=True, exist_ok=True)
    if said.only != "right":
        speed(said.rounds, said.rows, said.environments)
    if said.only != "speed":
        right(said.windows, said.environments)
