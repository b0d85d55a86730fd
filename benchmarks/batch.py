"""Rows that do not fit into memory: `aiexec score` beside a bare predict_proba over the same chunks, both within 2 GB.

python benchmarks/batch.py [ROWS in millions, 10] [ROUNDS, 1] [MODEL: boosting, logistic or both] [FOLDER to keep the rows in]

Memory is limited by RLIMIT_DATA; what is told is the most that was resident."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from beside import AIEXEC, environment, in_turn, tell

LIMIT, COLUMNS, MILLION = 2 << 30, 30, 1_000_000
BARE = """
import sys
import pyarrow.parquet as pq, skops.io
from aiexec.model.registry import TRUSTED
model = skops.io.load(sys.argv[1], trusted=list(TRUSTED))
for path in sys.argv[2:]:
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as rows:
        for batch in rows.iter_batches(100_000, columns=[f"f{number}" for number in range(30)]):
            model.predict_proba(batch.to_pandas())
"""


def limited() -> None:
    """Before a child starts: no more than 2 GB of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def begun(words: list) -> subprocess.Popen:
    """A process within the limit; scoring is not handed to a warm server, whose memory would not be limited."""
    return subprocess.Popen([*map(str, words)], env=environment(AIEXEC_KERNELS="cold"), preexec_fn=limited,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


class Measured:
    """Runs commands, and remembers the most memory of the last one."""

    peak = 0.0  # MB

    def seconds(self, words: list) -> float:
        start = time.monotonic()
        process = begun(words)
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(map(str, words))} failed:\n{printed.decode()}")
        self.peak = usage.ru_maxrss / 1024
        return time.monotonic() - start


def rows_in(folder: Path, millions: int) -> list[Path]:
    """Where the rows lie, a million a file."""
    return [folder / "rows" / f"block={number:02}" / "rows.parquet" for number in range(millions)]


def make_rows(folder: Path, millions: int) -> None:
    """Rows of thirty numbers with a text as id."""
    import numpy as np
    import pandas as pd

    for number, path in enumerate(rows_in(folder, millions)):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            frame = pd.DataFrame(np.random.default_rng(number).normal(size=(MILLION, COLUMNS)), columns=[f"f{n}" for n in range(COLUMNS)])
            frame.insert(0, "id", [f"case-{number:02}-{row:07}" for row in range(MILLION)])
            frame.to_parquet(path, index=False)


def make_project(folder: Path, rows: Path) -> None:
    """A project with two registered models."""
    import numpy as np
    import pandas as pd
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from aiexec.model.registry import promote, register
    from aiexec.settings import Settings
    from aiexec.store import open_ledger

    folder.mkdir()
    (folder / "settings.ini").write_text("[aiexec]\nkernels = cold\n")
    ledger = open_ledger(Settings(folder))
    frame = pd.read_parquet(rows).drop(columns="id").head(20_000)
    late = frame["f0"] + frame["f1"] * frame["f2"] + np.random.default_rng(0).normal(size=len(frame)) > 0
    for name, model in {"logistic": make_pipeline(StandardScaler(), LogisticRegression()), "boosting": HistGradientBoostingClassifier()}.items():
        register(name, model.fit(frame, late), frame, metrics={"roc_auc": 0.7}, trained_on={}, ledger=ledger)
        promote(name, 1, reason="benchmark", ledger=ledger)


def scoring(project: Path, name: str, inputs: Path, *more: str) -> list:
    """The command, on an output and log of its own."""
    return [AIEXEC, "score", name, "--input", inputs, "--id", "id", "--output", project / f"scores-{name}", "--project", project, "--json", *more]


def aside(make, *words) -> None:
    """Have something made by a process of its own: what a process once held counts as held by those that it starts."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=words)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{make.__name__} failed")


def cleared(project: Path, name: str) -> None:
    for place in (project / f"scores-{name}", project / ".aiexec" / "predictions"):
        shutil.rmtree(place, ignore_errors=True)


def killed_and_gone_on(project: Path, name: str, inputs: Path, parts: int) -> str:
    """Kill it when half of the parts are there, start it again, and count."""
    import pyarrow.dataset as ds

    cleared(project, name)
    process, out = begun(scoring(project, name, inputs)), project / f"scores-{name}"
    while len(list(out.rglob("part-*.parquet"))) < max(1, parts // 2) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = json.loads(subprocess.run([*map(str, scoring(project, name, inputs))], env=environment(AIEXEC_KERNELS="cold"), check=True,
                                     capture_output=True).stdout)
    ids = ds.dataset(out, format="parquet", partitioning=None).to_table(columns=["prediction_id"])["prediction_id"]
    return f"{done['kept']} of {done['parts']} parts kept, {len(ids):,} scores, {len(ids.unique()):,} ids"


def main(millions: int, rounds: int, models: list[str], folder: Path) -> None:
    aside(make_rows, folder, millions)
    files = rows_in(folder, millions)
    project = Path(tempfile.mkdtemp(dir=folder)) / "project"
    try:
        aside(make_project, project, files[0])
        quarter = project.parent / "quarter"
        for path in files[:max(1, millions // 4)]:
            (quarter / path.parent.name).mkdir(parents=True)
            (quarter / path.parent.name / path.name).symlink_to(path)
        for name in models:
            bare, ours, quiet, small = (Measured() for _ in range(4))
            model = sorted((project / ".aiexec").rglob("model.skops"), key=lambda path: path.stat().st_mtime_ns)
            model = dict(zip(("logistic", "boosting"), model))[name]

            def run(measured: Measured, *words) -> float:
                cleared(project, name)
                return measured.seconds(scoring(project, name, *words))

            took = in_turn(rounds, {
                f"bare {name}": lambda: bare.seconds([sys.executable, "-c", BARE, model, *files]),
                f"aiexec score {name}, logged": lambda: run(ours, folder / "rows"),
                f"aiexec score {name}, not logged": lambda: run(quiet, folder / "rows", "--no-log"),
            })
            tell(took)
            run(small, quarter)
            print(f"memory of {name}: {small.peak:,.0f} MB for a quarter of the rows, {ours.peak:,.0f} MB for all; bare {bare.peak:,.0f} MB")
            print(f"killed in the middle: {killed_and_gone_on(project, name, folder / 'rows', millions)}", flush=True)
    finally:
        shutil.rmtree(project.parent)


if __name__ == "__main__":
    words = sys.argv[1:] + ["10", "1", "both", ""][len(sys.argv) - 1:]
    chosen = ["boosting", "logistic"] if words[2] == "both" else [words[2]]
    keep = Path(words[3]) if words[3] else Path(tempfile.mkdtemp(prefix="aiexec-batch-"))
    try:
        main(int(words[0]), int(words[1]), chosen, keep)
    finally:
        if not words[3]:
            shutil.rmtree(keep)
