"""Notebooks that do not end by themselves, or end with their kernel: ended in time, told by their class, leaving nothing."""

import random
import time
from pathlib import Path

from aiexec.run.records import STEPS
from tests.faults.project import CELLS, RUN, Outcome, command, lay_out, ledger_of, left_processes, write_notebook
from tests.faults.crash import goes_on
from tests.faults.trial import Family, unhurt, warmed

TIMEOUT = 4  # seconds that a step may take
BLOCKED = {
    "sleeps": "import time\ntime.sleep(10**6)",
    "spins": "while True:\n    pass",
    "holds the GIL": "import ctypes\nctypes.PyDLL(None).sleep(10**6)",
    "is deaf to signals": "import signal, time\nfor one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
                          "    signal.signal(one, signal.SIG_IGN)\nwhile True:\n    time.sleep(1)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "swallows the interrupt": "import time\nwhile True:\n    try:\n        time.sleep(10**6)\n"
                              "    except BaseException:\n        pass",
    "waits for a child": "import subprocess\nsubprocess.run(['sleep', '1000000'])",
    "leaves a child behind": "import subprocess, time\nsubprocess.Popen(['sleep', '1000000'])\ntime.sleep(10**6)",
    "waits for another thread": "import threading\nthreading.Event().wait()",
    "awaits for ever": "import asyncio\nawait asyncio.sleep(10**6)",
}
GREEDY = ("held = [bytearray(50_000_000) for _ in range(100)]", "import numpy as np\nheld = np.ones(600_000_000)",
          "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'held = bytearray(3_000_000_000)'], check=True)")
DEATHS = {
    "kernel died (signal 9)": "import os\nos.kill(os.getpid(), 9)",
    "kernel died (signal 11)": "import os\nos.kill(os.getpid(), 11)",
    "kernel died (signal 6)": "import os\nos.abort()", "kernel died (exit 3)": "import os\nos._exit(3)",
}


def changed(place: Path, code: str, kernels: str, **step: object) -> Path:
    """A project whose second notebook runs some code before its own."""
    cells = {**CELLS, "count": [*CELLS["count"][:2], ("", code), *CELLS["count"][2:]]}
    return lay_out(place / "p", kernels=kernels, cells=cells, **step)


def failure(root: Path) -> str:
    """The class of the last failed step."""
    rows = ledger_of(root).rows(STEPS, order="-started", status="failed")
    return rows[0]["failure"] if rows else "nothing failed"


def mended(root: Path) -> list[str]:
    """Put the notebook right and go on: what is wrong then."""
    write_notebook(root / "usecases" / "late" / "count.ipynb", CELLS["count"])
    return goes_on(root, unhurt())


def blocked(number: int, chance: random.Random, place: Path) -> Outcome:
    kind, kernels = [*BLOCKED][number % len(BLOCKED)], ("warm", "cold")[number // len(BLOCKED) % 2]
    if kernels == "warm":
        warmed()
    root = changed(place, BLOCKED[kind], kernels, timeout=TIMEOUT)
    command(root, *RUN, "--only", "make")  # so that the time is the blocked step's
    begun = time.monotonic()
    done = command(root, *RUN, timeout=120)
    took = time.monotonic() - begun
    found = [] if took < TIMEOUT + 15 else [f"it took {took:.1f} s"]
    found += [] if done.returncode == 1 and failure(root) == "timeout" else [f"{failure(root)}: {done.stderr[-400:]}"]
    found += left_processes(root, 2)
    found += mended(root) if number % 10 == 1 else []
    return Outcome(not found, "; ".join([f"a {kernels} kernel {kind}", *found]), facts={"kernels": 1, "took": round(took, 1)})


def dies(number: int, chance: random.Random, place: Path) -> Outcome:
    kind, kernels = [*DEATHS][number % len(DEATHS)], ("warm", "cold")[number // len(DEATHS) % 2]
    if kernels == "warm":
        warmed()
    root = changed(place, DEATHS[kind], kernels)
    done = command(root, *RUN)
    found = [] if done.returncode == 1 and failure(root) == kind else [f"{failure(root)}: {done.stderr[-400:]}"]
    found += mended(root)
    return Outcome(not found, "; ".join([f"{kernels}: {kind}", *found]), facts={"kernels": 1})


def too_big(number: int, chance: random.Random, place: Path) -> Outcome:
    kernels = ("warm", "cold")[number % 2]
    if kernels == "warm":
        warmed()
    code = GREEDY[number // 2 % len(GREEDY)]
    root = changed(place, code, kernels, memory="600 MB")
    done = command(root, *RUN)
    found = [] if done.returncode == 1 and failure(root) == "out of memory" else [f"{failure(root)}: {done.stderr[-400:]}"]
    found += mended(root)
    return Outcome(not found, "; ".join([f"{kernels}: {code[:60]!r}", *found]), facts={"kernels": 1})


FAMILIES = [
    Family("blocked", f"a kernel blocks ({', '.join(BLOCKED)}): ended within its {TIMEOUT} s and 15 more, called a timeout, "
           "no process left", blocked, lambda: range(1, 201), (12,)),
    Family("dies", f"a kernel dies in a cell: told by its class ({', '.join(DEATHS)}); mended and resumed, the same result",
           dies, lambda: range(1, 17)),
    Family("memory", "a notebook takes more memory than its step may: called out of memory, the runner unhurt, resumed when "
           "mended", too_big, lambda: range(1, 13), (2,)),
]
