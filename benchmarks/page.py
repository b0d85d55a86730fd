"""How long the monitoring page of a year of days and fifty columns takes, in a real browser and through our own Voila.

    python benchmarks/page.py            # the median of 7 visits, beside a page with nothing on it

Both pages are notebooks that Voila runs in a new kernel, so what the empty one takes is the kernel, Voila and the browser, and what the
monitoring page takes more is the reading of the ledger, the drawing and the showing: the time after the kernel is there."""

import argparse
import datetime
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from aiexec.define.usecase import load_usecase
from aiexec.monitor.drift import psi
from aiexec.monitor.profiles import Column, Profile
from aiexec.monitor.stored import keep_profiles
from aiexec.monitor.watch import MEASUREMENTS
from aiexec.projects import template
from aiexec.settings import Settings
from aiexec.show.monitoring import write_monitoring
from aiexec.store import now, open_ledger

USECASE = """
name: late
title: Warn of late arrivals
department: operations
owner: ops@example.org
risk: limited
success: [{metric: roc_auc, at_least: 0.64}]
value: {currency: USD, true_positive: 38, false_positive: -9, false_negative: 0, true_negative: 0}
model: {name: late}
"""
EMPTY = "from IPython.display import HTML\n\nHTML('<main class=\"ax\">nothing</main>')"


def lived(root: Path, windows: list[str], columns: int) -> Settings:
    """A project whose windows were measured and profiled; every tenth column drifts for a tenth of the time."""
    (root / "usecases" / "late").mkdir(parents=True)
    (root / "settings.ini").write_text("[aiexec]\nactor = ops@example.org\n")
    (root / "usecases" / "late" / "usecase.yaml").write_text(USECASE)
    settings, draw = Settings(root, actor="ops@example.org"), np.random.default_rng(0)
    ledger, names = open_ledger(settings), [f"column_{number}" for number in range(columns)]
    before = {name: Column(name, "number", 0, 0, tuple(range(10, 100, 10)), (1000,) * 10, 0.0, 110.0) for name in names}
    reference, rows, empty = Profile(10_000, before), [], dict.fromkeys(MEASUREMENTS.c.keys()) | {"usecase": "late", "version": 1, "at": now(), "run": ""}
    for at, window in enumerate(windows):
        found = {}
        for place, name in enumerate(names):
            drifts = place % 10 == 0 and 0 <= at / len(windows) - place / columns < 0.1
            shares = np.array([.02] + [.1] * 8 + [.18]) if drifts else np.full(10, .1)
            counts = tuple(draw.multinomial(5000, shares).tolist())
            value, found[name] = psi((1000,) * 10, counts), Column(name, "number", 0, 0, before[name].cells, counts, 0.0, 110.0)
            verdict = "act" if value >= .25 else "watch" if value >= .1 else "none"
            rows.append(empty | {"window": window, "kind": "drift", "name": name, "value": value, "verdict": verdict,
                                 "detail": {"kind": "number", "expected": .003, "missing": 0.0, "missing_before": 0.0, "rows": 5000, "why": "It moved."}})
        keep_profiles(ledger, "late", window, reference, Profile(5000, found))
        auc = .665 + draw.normal() * .006
        rows.append(empty | {"window": window, "kind": "performance", "name": "roc_auc", "value": auc, "low": auc - .01, "high": auc + .01, "detail": {"coverage": .98}})
        rows.append(empty | {"window": window, "kind": "volume", "name": "rows", "value": 5000.0})
    with ledger.change("year.measured", "late", tables=(MEASUREMENTS,)) as change:
        change.insert(MEASUREMENTS, *rows)
    return settings


def visits(settings: Settings, times: int) -> dict[str, list[float]]:
    """Seconds from asking for a page until it is seen, in turns."""
    from playwright.sync_api import sync_playwright

    shutil.copytree(template("dashboards"), settings.root / "dashboards")
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": EMPTY}
    empty = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    (settings.root / "dashboards" / "empty.ipynb").write_text(json.dumps(empty))
    server = subprocess.Popen([Path(sys.executable).with_name("aiexec"), "dashboard", "--no-open", "--project", str(settings.root)], stdout=subprocess.PIPE, text=True)
    way, found = server.stdout.readline().split()[-1], {"empty": [], "monitoring": []}
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
            page = chromium.new_page(viewport={"width": 1280, "height": 900})
            page.goto(way)
            for turn in range(times + 1):  # the first fills caches
                for name, seconds in found.items():
                    page.goto("about:blank")
                    began = time.perf_counter()
                    page.goto(f"{way.split('/?')[0]}/voila/render/{name}.ipynb?usecase=late", wait_until="commit")
                    page.wait_for_selector("main.ax", timeout=120_000)
                    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # it is painted
                    if turn:
                        seconds.append(time.perf_counter() - began)
            chromium.close()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--visits", type=int, default=7)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        days = [str(datetime.date(2013, 1, 1) + datetime.timedelta(day)) for day in range(365)]
        found = visits(lived(Path(place, "year"), days, 50), given.visits)
        empty, page = [statistics.median(found[name]) for name in ("empty", "monitoring")]
        print(f"a year of days x 50 columns: {page:.2f} s; an empty page: {empty:.2f} s; after the kernel is there: {page - empty:.2f} s", flush=True)
        weeks = [f"2013-W{week:02}" for week in range(1, 53)]
        settings = lived(Path(place, "wide"), weeks, 200)
        began = time.perf_counter()
        size = write_monitoring(load_usecase("late", settings), settings, Path(place, "wide.html"))
        print(f"a file of 200 columns x 52 windows: {size / 1e6:.2f} MB, written in {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
