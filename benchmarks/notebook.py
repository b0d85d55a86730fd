"""What it takes to run one notebook by a typed command, beside papermill's command: warm, cold, many times; and what waiting costs.

    python benchmarks/notebook.py [ROUNDS] [RUNS]      11 rounds and 100 parameterized runs by default; medians and ratios
"""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from beside import AIEXEC, PAPERMILL, environment, in_turn, seconds, server, tell, write_notebook


def cells_alone(output: Path) -> float:
    """What the cells themselves took, by the record in the executed notebook."""
    cells = json.loads(output.read_text(encoding="utf-8"))["cells"]
    return sum(cell["metadata"].get("papermill", {}).get("duration") or 0 for cell in cells if cell["cell_type"] == "code")


def one(place: Path, rounds: int) -> None:
    """The whole command, warm: the main figure."""
    seconds(AIEXEC, "run", "nb.ipynb", cwd=place)  # bytecode, and the first copies of the server's pages
    took = in_turn(rounds, {
        "papermill": lambda: seconds(PAPERMILL, "nb.ipynb", "out.ipynb", "-p", "depth", "3", cwd=place),
        "aiexec run, warm": lambda: (time.sleep(0.5), seconds(AIEXEC, "run", "nb.ipynb", "-p", "depth", "3", cwd=place))[1],
        "its cells alone": lambda: cells_alone(place / "nb-output.ipynb"),
    })
    tell(took)
    above = sorted(whole - cells for whole, cells in zip(took["aiexec run, warm"], took["its cells alone"]))
    print(f"above the cells' own cost: median {above[len(above) // 2]:.3f} s")


def many(place: Path, runs: int) -> None:
    """Parameterized runs, two at a time, beside papermill one by one (of which a few are enough)."""
    def run(number: int) -> float:
        return seconds(AIEXEC, "run", "nb.ipynb", "-p", "depth", str(1 + number % 9), "-o", f"out{number}.ipynb", cwd=place)

    begun = time.monotonic()
    with ThreadPoolExecutor(2) as two:
        list(two.map(run, range(runs)))
    ours = time.monotonic() - begun
    few = min(runs, 5)
    theirs = sum(seconds(PAPERMILL, "nb.ipynb", "out.ipynb", "-p", "depth", str(n + 1), cwd=place) for n in range(few)) / few * runs
    print(f"{runs} runs: papermill one by one {theirs:.0f} s ({few} measured), aiexec two at a time {ours:.1f} s: "
          f"{theirs / ours:.0f} times as fast")


def waiting(place: Path) -> None:
    """What a waiting kernel holds for itself, with the server's own memory beside it."""
    time.sleep(3)
    seen = server("status", place)
    spares = sorted(spare["memory"] for spare in seen["spares"])
    print(f"waiting kernels: {spares} MB private each; the server itself {seen['memory']} MB")


def first(place: Path, rounds: int) -> None:
    """The first command, when there is no server: not slower than papermill."""
    def ours() -> float:
        spent = seconds(AIEXEC, "run", "nb.ipynb", "-p", "depth", "3", cwd=place)
        subprocess.run([AIEXEC, "warm", "start"], cwd=place, env=environment(), check=True, capture_output=True)  # until it is quiet
        server("stop", place)
        return spent

    server("stop", place)
    tell(in_turn(rounds, {"papermill": lambda: seconds(PAPERMILL, "nb.ipynb", "out.ipynb", "-p", "depth", "3", cwd=place),
                          "aiexec run, no server": ours}))


def main(rounds: int, runs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_notebook(place / "nb.ipynb")
        server("start", place)
        one(place, rounds)
        waiting(place)
        many(place, runs)
        first(place, max(1, rounds // 3))


if __name__ == "__main__":
    main(*[int(word) for word in sys.argv[1:]] or [11], *([100] if len(sys.argv) < 3 else []))
