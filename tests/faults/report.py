"""REPORT.md: what was tried how often, and what came of it."""

import os
import platform
from collections.abc import Iterable
from pathlib import Path

from tests.faults.trial import Family, Record, library

REPORT = Path(__file__).with_name("REPORT.md")


def line(family: Family, rows: list[dict]) -> str:
    """One family as a row of the table."""
    struck = [row for row in rows if row["struck"]]
    left = set(family.full()) - {row["number"] for row in rows}
    bad = [row["number"] for row in rows if not row["ok"]]
    figures = [f"{sum(row['facts'].get(word, 0) for row in rows):,} {word}" for word in ("kills", "starts", "kernels", "edits", "requests")
               if any(word in row["facts"] for row in rows)]
    seeds = ", ".join(sorted({str(row["seed"]) for row in rows}))
    libraries = ", ".join(sorted({row["library"] for row in rows}))
    many = "; ".join([f"{len(struck):,}", *figures, *([f"{len(left):,} not tried"] if left else [])])
    return (f"| {family.name} | {family.tries} | {many} | "
            f"{len(bad)}{' (' + ', '.join(map(str, bad[:9])) + ')' if bad else ''} | {seeds} | {libraries} |")


def write(record: Record, families: Iterable[Family]) -> None:
    """Write the report of what is on record."""
    tried = [(family, rows) for family in families if (rows := record.rows(family.name))]
    lines = ["# Faults tried on runs", "",
             f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores. "
             "Each case stands in a project of its own: three notebooks wired by name. "
             "Make it again: `make faults` (hours; goes on where it stopped), or one family: "
             "`python -m tests.faults --only syscalls --from 1 --to 50`.", "",
             "| family | what is tried | cases struck | bad | seed | library |", "|---|---|---|---|---|---|",
             *[line(family, rows) for family, rows in tried], "",
             f"Library: a digest of the modules that are tried; today it is {library('run')} for runs and {library('serve')} for the service."]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
