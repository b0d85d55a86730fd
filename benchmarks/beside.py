"""What the benchmarks share: commands without a surrounding project, times taken in turn, and how they are told."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
AIEXEC, PAPERMILL = BIN / "aiexec", BIN / "papermill"
CELLS = [  # with a parameter, the imports of the trade, and a small model
    "depth = 2",
    "import mlflow\nimport pandas as pd\nfrom sklearn.datasets import load_iris\nfrom sklearn.tree import DecisionTreeClassifier",
    "data = load_iris(as_frame=True)\nframe = data.frame.sample(100, random_state=0)\nprint(frame.shape)",
    "model = DecisionTreeClassifier(max_depth=depth, random_state=0).fit(frame[data.feature_names], frame.target)",
    "accuracy = float(model.score(data.data, data.target))\nprint(depth, round(accuracy, 3))",
]


def environment(**more: str) -> dict[str, str]:
    """This environment without the choices of a project and with bytecode, as a user has it."""
    left_out = {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    kept = {k: v for k, v in os.environ.items() if k not in left_out and (k == "AIEXEC_RUNTIME" or not k.startswith("AIEXEC_"))}
    return kept | more


def seconds(*words: object, cwd: Path, **more: str) -> float:
    """Whole-command time."""
    begun = time.monotonic()
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment(**more), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    spent = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    return spent


def in_turn(rounds: int, measured: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Each measure once a round, so that what else the machine does falls on all of them."""
    took = {name: [] for name in measured}
    for number in range(rounds):
        for name, measure in measured.items():
            took[name].append(measure())
        print(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {spent[-1]:.3f} s" for name, spent in took.items()), flush=True)
    return took


def tell(took: dict[str, list[float]]) -> None:
    """Medians, and ratios to the first, which is the peer."""
    peer = next(iter(took.values()))
    for name, spent in took.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(peer, spent))
        print(f"{name}: median {statistics.median(spent):.3f} s, {ratio:.1f} times as fast as the peer", flush=True)


def write_notebook(path: Path, sources: list[str] = CELLS, parameters: bool = True) -> Path:
    """A notebook of these cells; the first is the parameters cell, if there is to be one."""
    cells = [{"cell_type": "code", "id": f"cell{number}", "metadata": {"tags": ["parameters"]} if parameters and not number else {},
              "source": source, "outputs": [], "execution_count": None} for number, source in enumerate(sources)]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": spec, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


def server(verb: str, cwd: Path) -> dict:
    """The warm server: status, start or stop."""
    words = [AIEXEC, "warm", verb, "--json", *(["--force"] if verb == "stop" else [])]
    return json.loads(subprocess.run(words, cwd=cwd, env=environment(), check=True, capture_output=True, text=True).stdout)
