"""What a graph costs beside its cells: six steps of which nothing has changed, with few and with 5,000 runs on record; 1,000 tiny steps.

    python benchmarks/graph.py [ROUNDS] [RECORDED] [STEPS]      5 rounds, 5,000 recorded runs and 1,000 steps by default
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from beside import AIEXEC, in_turn, seconds, server, tell, write_notebook

FACTS = {"title": "Sums", "department": "finance", "owner": "ada@example.org", "risk": "minimal",
         "success": [{"metric": "roc_auc", "at_least": 0.6}],
         "value": {"currency": "EUR", "true_positive": 1, "false_positive": 0, "false_negative": 0, "true_negative": 0}}


def write_step(path: Path, body: str) -> None:
    """A notebook that takes a number and hands one over."""
    write_notebook(path, ["n: int = 0", body])
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["cells"].append({"cell_type": "code", "id": "given", "metadata": {"tags": ["outputs"]}, "source": "m: int", "outputs": [],
                        "execution_count": None})
    path.write_text(json.dumps(nb), encoding="utf-8")


def write_project(root: Path, name: str, steps: int, body: str, recorder: str = "mlflow", width: int = 1) -> Path:
    """A use case whose step number k takes what step k - width made."""
    folder = root / "usecases" / name
    folder.mkdir(parents=True)
    (root / "settings.ini").write_text(f"[aiexec]\nrecorder = {recorder}\n", encoding="utf-8")
    write_step(folder / "step.ipynb", body)
    pipeline = {f"s{k}": {"notebook": "step.ipynb"} | ({"with": {"n": f"s{k - width}.m"}} if k >= width else {}) for k in range(steps)}
    (folder / "usecase.yaml").write_text(json.dumps({"name": name, **FACTS, "pipeline": pipeline}), encoding="utf-8")
    return root


def record(root: Path, runs: int) -> None:
    """Runs that went well before, each of six steps with their events, as the ledger records them."""
    os.chdir(root)
    from aiexec.run.records import RUNS, STEPS
    from aiexec.store import open_ledger

    ledger = open_ledger()
    run, steps = ledger.rows(RUNS)[-1], ledger.rows(STEPS)
    mine = [step for step in steps if step["run"] == run["run"]]
    for number in range(runs):
        name = f"20200101-000000-{number:06}"
        with ledger.change("run.done", name, {"error": ""}) as change:
            change.insert(RUNS, run | {"run": name, "started": f"2020-01-01T00:00:00.{number:06}Z"})
            change.insert(STEPS, *[step | {"run": name, "fingerprint": f"{step['fingerprint'][:-6]}{number:06}"} for step in mine])


def unchanged(root: Path, rounds: int, recorded: int) -> None:
    """Six steps, nothing changed: the whole command, beside the full run."""
    body = "import pandas as pd\nfrom sklearn.linear_model import LogisticRegression\nm = n + 1"
    write_project(root, "sums", 6, body)
    full = seconds(AIEXEC, "run", "sums", cwd=root)
    few = in_turn(rounds, {"six unchanged steps": lambda: seconds(AIEXEC, "run", "sums", cwd=root)})
    record(root, recorded)
    many = in_turn(rounds, {f"the same, {recorded} runs on record": lambda: seconds(AIEXEC, "run", "sums", cwd=root)})
    tell({"the full run": [full] * rounds, **few, **many})


def tiny(root: Path, steps: int) -> None:
    """Many steps that do nothing: what each costs, and whether more steps cost more each."""
    each = {}
    for number in (steps // 4, steps):
        place = write_project(root / str(number), "tiny", number, "m = n + 1", recorder="none", width=max(1, number // 10))
        begun = time.monotonic()
        seconds(AIEXEC, "run", "tiny", "--json", cwd=place)
        each[number] = (time.monotonic() - begun) / number
        print(f"{number} tiny steps: {each[number] * 1000:.0f} ms a step", flush=True)
    print(f"a step of {steps} costs {each[steps] / each[steps // 4]:.2f} times a step of {steps // 4}")


def main(rounds: int = 5, recorded: int = 5000, steps: int = 1000) -> None:
    with tempfile.TemporaryDirectory() as name:
        server("start", Path(name))
        unchanged(Path(name, "six"), rounds, recorded)
        os.chdir("/")
        tiny(Path(name), steps)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
