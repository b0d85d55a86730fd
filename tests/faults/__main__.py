"""`python -m tests.faults`: try the families in full or in part, and write what was found to REPORT.md."""

import argparse
import signal
import sys
import time
from pathlib import Path

from tests.faults import report
from tests.faults.families import FAMILIES
from tests.faults.trial import ROOT, SEED, Record, own_server, try_family


def main() -> int:
    words = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    words.add_argument("--only", action="append", choices=sorted(FAMILIES), help="this family (repeat for more)")
    words.add_argument("--from", dest="first", type=int, default=1, metavar="N", help="begin at this case")
    words.add_argument("--to", dest="last", type=int, default=10**9, metavar="N", help="end at this case")
    words.add_argument("--minutes", type=float, default=float("inf"), help="begin no new case after so many minutes")
    words.add_argument("--jobs", type=int, default=2, help="cases side by side")
    words.add_argument("--seed", type=int, default=SEED)
    words.add_argument("--fresh", action="store_true", help="forget what was found before")
    words.add_argument("--report", action="store_true", help="only write the report of what was found")
    words.add_argument("--results", type=Path, default=ROOT / "build" / "faults", help="folder of what was found so far")
    asked = words.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to it, and so would be its runs
    record, until = Record(asked.results), time.monotonic() + 60 * asked.minutes
    chosen = [FAMILIES[name] for name in asked.only or FAMILIES]
    with own_server():
        for family in [] if asked.report else chosen:
            if asked.fresh:
                record.forget(family.name)
            if time.monotonic() < until:
                try_family(family, record, seed=asked.seed, first=asked.first, last=asked.last, until=until, jobs=asked.jobs,
                           tell=lambda line: print(line, flush=True))
    report.write(record, FAMILIES.values())
    bad = [f"{family.name} {row['number']}" for family in chosen for row in record.rows(family.name) if not row["ok"]]
    print(f"{len(bad)} bad: {', '.join(bad)}" if bad else "All that was tried went well.")
    return bool(bad)


sys.exit(main())
