"""How long the year of flights takes: with warm kernels, with a new kernel for each notebook as stock papermill does, and run again unchanged.

    python benchmarks/year.py [RUNS]      three runs of each by default, in turn; medians and ratios
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AIEXEC = Path(sys.executable).with_name("aiexec")


def seconds(folder: Path, **more: str) -> float:
    """Whole-command time of one demo."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AIEXEC_") and k != "PYTHONDONTWRITEBYTECODE"} | more
    begun = time.monotonic()
    subprocess.run([AIEXEC, "demo", folder], env=environment, check=True, capture_output=True)
    return time.monotonic() - begun


def main(runs: int) -> None:
    took = {"warm kernels": [], "a new kernel for each notebook": [], "again, unchanged": []}
    for number in range(runs):
        with tempfile.TemporaryDirectory() as place:
            warm, cold = Path(place, "warm"), Path(place, "cold")
            took["a new kernel for each notebook"].append(seconds(cold, AIEXEC_KERNELS="cold"))
            took["warm kernels"].append(seconds(warm))
            took["again, unchanged"].append(seconds(warm))
        print(f"round {number + 1} of {runs}: " + ", ".join(f"{name} {spent[-1]:.0f} s" for name, spent in took.items()), flush=True)
    peer = took["a new kernel for each notebook"]
    for name, spent in took.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(peer, spent))
        print(f"{name}: median {statistics.median(spent):.1f} s, {ratio:.1f} times as fast as a new kernel each")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
