"""Cells that compute, in a warm kernel beside a cold one: boosting on two threads, a matrix product, joblib.

    python benchmarks/computing.py [ROUNDS]      7 rounds by default; the median of the ratios, cell by cell
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from beside import AIEXEC, seconds, server, write_notebook

CELLS = {
    "": "import numpy as np\nfrom joblib import Parallel, delayed\nfrom sklearn.ensemble import HistGradientBoostingClassifier\n"
        "rng = np.random.default_rng(0)\nX = rng.normal(size=(200_000, 20))\ny = (X[:, 0] + rng.normal(size=200_000) > 0).astype(int)\n"
        "A = rng.normal(size=(2000, 2000))\n\n\ndef square(n):\n    return float((rng.normal(size=300_000) ** 2).sum())",
    "HistGradientBoosting, 200,000 rows": "HistGradientBoostingClassifier(max_iter=30).fit(X, y)",
    "2,000² product": "for _ in range(3):\n    B = A @ A",
    "joblib, threads": "Parallel(n_jobs=2, prefer='threads')(delayed(square)(n) for n in range(60))",
    "joblib, processes": "Parallel(n_jobs=2)(delayed(square)(n) for n in range(60))",
}


def cell_seconds(output: Path) -> dict[str, float]:
    """Seconds of each named cell, by the record in the executed notebook."""
    cells = [cell for cell in json.loads(output.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return {name: cell["metadata"]["papermill"]["duration"] for name, cell in zip(CELLS, cells) if name}


def main(rounds: int = 7) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_notebook(place / "compute.ipynb", list(CELLS.values()), parameters=False)
        server("start", place)
        seen = {"cold": [], "warm": []}
        for number in range(rounds):
            for kind in seen:
                seconds(AIEXEC, "run", "compute.ipynb", cwd=place, **({"AIEXEC_KERNELS": "cold"} if kind == "cold" else {}))
                seen[kind].append(cell_seconds(place / "compute-output.ipynb"))
            print(f"round {number + 1} of {rounds}", flush=True)
        for cell in filter(None, CELLS):
            cold, warm = ([one[cell] for one in seen[kind]] for kind in ("cold", "warm"))
            ratio = statistics.median(w / c for c, w in zip(cold, warm))
            print(f"{cell}: cold {statistics.median(cold):.3f} s, warm {statistics.median(warm):.3f} s: {100 * (ratio - 1):+.1f} %")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
