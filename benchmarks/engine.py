"""The same notebook through other people's tools: papermill's own command with our engine, nbclient with our kernelspec, beside stock.

    python benchmarks/engine.py [ROUNDS]      7 rounds by default, in turn; medians and ratios
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from beside import PAPERMILL, environment, in_turn, seconds, server, tell, write_notebook

PROGRAM = """
import sys, time
import nbformat
from nbclient import NotebookClient
nb = nbformat.read("nb.ipynb", 4)
began = time.monotonic()
NotebookClient(nb, kernel_name=sys.argv[1]).execute()
print(time.monotonic() - began)
"""


def nbclient(kernel: str, place: Path) -> float:
    """One execution in a process that has imported nbclient: starting the kernel, the cells, its end."""
    time.sleep(1)  # a spare kernel takes the place of the last
    done = subprocess.run([sys.executable, "-c", PROGRAM, kernel], cwd=place, env=environment(), check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(rounds: int = 7) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_notebook(place / "nb.ipynb")
        server("start", place)
        time.sleep(3)
        words = ("nb.ipynb", "out.ipynb", "-p", "depth", "3")
        tell(in_turn(rounds, {"papermill": lambda: seconds(PAPERMILL, *words, cwd=place),
                              "papermill --engine aiexec": lambda: seconds(PAPERMILL, "--engine", "aiexec", *words, cwd=place)}))
        tell(in_turn(rounds, {"nbclient": lambda: nbclient("python3", place), "nbclient, kernelspec aiexec": lambda: nbclient("aiexec", place)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
