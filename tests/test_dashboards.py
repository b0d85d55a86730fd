"""The dashboards as a stakeholder meets them: through Voila, in a browser, on a ledger whose figures are known."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest.mock import patch

import pytest

from aiexec.data.datasets import DATASETS
from aiexec.decide.decisions import DECISIONS
from aiexec.decide.outbox import OUTBOX
from aiexec.define.usecase import load_usecase
from aiexec.define.value import Amount
from aiexec.errors import ParameterError
from aiexec.govern.months import monthly
from aiexec.govern.portfolio import portfolio
from aiexec.govern.roi import record_value, roi
from aiexec.model.registry import ALIASES
from aiexec.monitor.alerts import close_alert, open_alert
from aiexec.monitor.retrain import PROPOSALS
from aiexec.monitor.watch import record
from aiexec.run.records import RUNS
from aiexec.settings import Settings
from aiexec.show import dashboards
from aiexec.show.charts import known, money, number, percent
from aiexec.store import open_ledger

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
TOKEN = "a-token-for-the-test"
HOSTILE = "</title><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
USECASE = """
name: {name}
title: {title}
department: {department}
owner: ops-analytics@example.org
risk: limited
stage: {stage}
success:
  - {{metric: roc_auc, at_least: 0.64}}
  - {{metric: value_per_1000, at_least: 400}}
value: {{currency: USD, true_positive: 38, false_positive: -9, false_negative: 0, true_negative: 0, cost_per_month: 2500}}
model: {{name: {name}}}
"""
# month, rows, rate, AUC, value per 1000, planned, realised, baseline, actions, champion, temperature and origin PSI
YEAR = [("04", 28330, .279, .662, 651, 17965, 18432, 12499, 1255, 1, 6.12, .03), ("05", 28796, .220, .679, 611, 18137, 17605, 10821, 1276, 1, 9.89, .04),
        ("06", 28243, .308, .681, 619, 17041, 17492, 10407, 1255, 1, 9.90, .10), ("07", 29425, .315, .664, 655, 18033, 19270, 10409, 1299, 1, 9.94, .15),
        ("08", 29327, .238, .631, 382, 18177, 11198, 5500, 1320, 1, 9.94, .13), ("09", 27574, .132, .621, 43, 17329, 1189, -1647, 1231, 1, 9.85, .12),
        ("10", 28889, .168, .651, 347, 18929, 10036, 5993, 1307, 1, 9.26, .09), ("11", 27268, .174, .644, 254, 18353, 6930, 2327, 1214, 2, 1.34, .02),
        ("12", 28135, None, None, None, 19769, None, None, 1256, 2, .21, None)]


def define(root: Path, name: str, title: str, department: str = "operations", stage: str = "production") -> None:
    folder = root / "usecases" / name
    folder.mkdir(parents=True)
    (folder / "usecase.yaml").write_text(USECASE.format(name=name, title=json.dumps(title), department=json.dumps(department), stage=stage))


def live_through(ledger, name: str, year: list[tuple]) -> None:
    """What a year in production leaves in the ledger."""
    decisions, messages, runs = [], [], []
    for month, rows, rate, auc, gain, planned, realised, baseline, actions, version, hot, origin in year:
        window = month if "-" in month else f"2013-{month}"
        volume = [{"name": "rows", "value": rows}] + ([{"name": "rate", "value": rate}] if rate else [])
        record(ledger, name, window, "volume", volume, version=version)
        record(ledger, name, window, "drift", [{"name": column, "value": value, "verdict": ""} for column, value in
                                               [("evening_temp", hot), ("origin", origin), ("carrier", .01), ("planned_minutes", .08)]], version=version)
        if auc:
            record(ledger, name, window, "performance", [{"name": "roc_auc", "value": auc, "low": auc - .012, "high": auc + .012},
                                                         {"name": "value_per_1000", "value": gain}], version=version)
        for kind, amount in (("planned", planned), ("realised", realised), ("baseline", baseline)):
            if amount is not None:
                record_value(ledger, name, window, kind, Amount(amount, "USD", "assumed", "outcomes measured, unit values assumed"), actions)
        common = {"usecase": name, "window": window, "day": window, "policy": "p", "model_version": version, "score": .5, "expected": 1.0,
                  "outcome": None, "value": None, "at": "2026-11-23T05:00:00.000000Z", "run": "", "payload": {}}
        decisions += [common | {"prediction_id": f"{window}-{n}", "action": "warn", "arm": "treated"} for n in range(actions // 20)]
        messages += [dict.fromkeys(OUTBOX.c.keys()) | {"message": f"{name}:{window}-{n}", "usecase": name, "window": window, "status": "delivered"}
                     for n in range(actions // 20)]
        runs.append(dict.fromkeys(RUNS.c.keys()) | {
            "run": f"r20261123-0500{len(runs):02}-{name[:4]}", "usecase": name, "partition": window, "status": "done", "actor": "scheduler",
            "started": f"2026-11-23T05:{len(runs):02}:00.000000Z", "ended": f"2026-11-23T05:{len(runs):02}:21.500000Z"})
    last = {"usecase": name, "name": "ingest.flights", "partition": window}
    with ledger.change("year.lived", name, tables=(DATASETS, DECISIONS, OUTBOX, RUNS)) as change:
        change.insert(DATASETS, dict.fromkeys(DATASETS.c.keys()) | last)
        change.insert(DECISIONS, *decisions)
        change.insert(OUTBOX, *messages)
        change.insert(RUNS, *runs)


def seeded(root: Path) -> Path:
    """A project with a year of flights, a use case in trouble with a hostile name, and one without data."""
    (root / "settings.ini").write_text("[aiexec]\nactor = ada\n")
    define(root, "flight_delays", "Warn passengers and crews of late arrivals")
    define(root, "hostile", HOSTILE, department=HOSTILE, stage="pilot")
    define(root, "late_orders", "Warn of late orders", "logistics", "idea")
    ledger = open_ledger(Settings(root, actor="ada"))
    live_through(ledger, "flight_delays", YEAR)
    live_through(ledger, "hostile", YEAR[:2])
    open_alert(ledger, "flight_delays", "performance.value_per_1000", "2013-10", "value_per_1000 ≥ 400: missed in 2 of 3 windows: 2013-08, 2013-09.",
               "ops-analytics@example.org")
    open_alert(ledger, "flight_delays", "drift", "2013-04", "evening_temp drifted; the model does not use it.", "ops-analytics@example.org", "watch")
    open_alert(ledger, "hostile", "drift.x", "2013-05", HOSTILE, "ops-analytics@example.org")
    auc = open_alert(ledger, "flight_delays", "performance.roc_auc", "2013-10", "roc_auc ≥ 0.64: missed in 2 of 3 windows: 2013-08, 2013-09.", "ops-analytics@example.org")
    close_alert(ledger, "flight_delays", auc["alert"], "2013-12", "roc_auc ≥ 0.64: held in 2013-10, 2013-11.")
    proposals = [("2013-10", 2, "promoted", "ROC AUC on 2013-09 is .049 higher (.024 to .075)."),
                 ("2013-12", 3, "refused", "ROC AUC on 2013-11 is .009 lower (−.030 to .014), though it would have earned more.")]
    with ledger.change("seed.models", "flight_delays", tables=(PROPOSALS, ALIASES)) as change:
        change.insert(PROPOSALS, *[{"usecase": "flight_delays", "window": window, "cause": "performance.roc_auc", "status": status, "version": version,
                                    "why": why, "evidence": {}, "at": "2026-11-23T05:10:00.000000Z"} for window, version, status, why in proposals])
        change.insert(ALIASES, *[dict.fromkeys(ALIASES.c.keys()) | {
            "model": model, "alias": "champion", "seq": seq, "version": seq, "at": f"2026-11-23T05:0{seq}:00.000000Z", "actor": "ada", "reason": "gate passed",
            "evidence": {}} for model, seq in [("flight_delays", 1), ("flight_delays", 2), ("hostile", 1)]])
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = seeded(tmp_path_factory.mktemp("project"))
    shutil.copytree(dashboards.template("dashboards"), root / "dashboards")
    (root / "dashboards" / "secret.png").write_bytes(b"\x89PNG secret")
    broken = json.loads((root / "dashboards" / "portfolio.ipynb").read_text())
    broken["cells"][-1]["source"] = ["raise RuntimeError('the secret reason')"]
    (root / "dashboards" / "broken.ipynb").write_text(json.dumps(broken))
    return root


@pytest.fixture(scope="module")
def server(project):
    """Voila in a process of its own, and its address; at the end it must go, and leave no kernel."""
    program = ("import sys; from pathlib import Path; from aiexec.settings import load_settings; from aiexec.show.dashboards import serve\n"
               f"serve(load_settings(Path({str(project)!r})), token={TOKEN!r}, tell=lambda text: print(text, flush=True))")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=project)
    address = process.stdout.readline().split()[-1]
    assert address.startswith("http://127.0.0.1:") and address.endswith(f"/?token={TOKEN}")
    yield address.split("/?")[0]
    begun = children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    deadline = time.monotonic() + 10
    while any(map(alive, begun)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, begun)), "a kernel outlived its server"


def children(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listing.split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def context(browser, server):
    """A visitor who opened the printed address once."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(f"{server}/?token={TOKEN}")
    assert TOKEN not in page.url, "the token leaves the address bar"
    page.close()
    yield context
    context.close()


def visit(context, address: str, shot: Path):
    """Open a page and wait for it; nobody but this machine is asked, and nothing is complained of."""
    page, asked, heard, weight = context.new_page(), [], [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: heard.append(message.text))
    page.on("response", lambda response: weight.append(len(response.body())))
    page.goto(address)
    page.wait_for_selector("main.ax")
    page.screenshot(path=shot, full_page=True)
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))] == []
    assert heard == []
    assert sum(weight) < 150_000, "a page stays light"
    assert not page.locator("#wait").is_visible()
    assert "Traceback" not in page.content()
    return page


def figures(page, title: str) -> dict[str, list[str]]:
    """The table of figures that a chart carries, by month or column."""
    chart = page.locator("figure.chart").filter(has=page.locator("figcaption strong", has_text=title).first)
    chart = chart.filter(has=page.locator("svg[role=img]"))
    rows = [row.locator("td").all_text_contents() for row in chart.first.locator("details tbody tr").all()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.browser
def test_the_portfolio_shows_what_the_ledger_says(context, server, project, tmp_path):
    page = visit(context, f"{server}/voila/render/portfolio.ipynb", tmp_path / "portfolio.png")
    settings = Settings(project, actor="ada")
    rows = {row["name"]: row for row in portfolio(settings, open_ledger(settings))}
    assert page.locator("#state").inner_text().splitlines()[1] == "2 of 3 use cases need attention."
    shown = [row.locator("td").all_inner_texts() for row in page.locator("tbody tr").all()]
    flights = next(row for row in shown if row[0].startswith("Warn passengers"))
    expected = rows["flight_delays"]
    assert flights[0].splitlines() == [expected["title"], expected["department"]]
    assert flights[1:5] == ["production", "▲ Needs attention", "v2", "2"]
    assert flights[5].splitlines() == [money(expected["realised"], "USD"), "assumed"]
    assert flights[6:] == ["2013-12", expected["owner"], expected["blocker"]]
    assert page.locator(".card .figure").all_inner_texts() == ["3", "3", money(sum(row["realised"] or 0 for row in rows.values()), "USD")]
    assert page.title() != "owned" and page.locator("img").count() == 0
    page.get_by_text(expected["title"]).last.click()
    page.wait_for_selector("figure.chart")
    assert page.locator("h1").inner_text() == expected["title"]
    page.close()


@pytest.mark.browser
def test_the_use_case_shows_what_the_ledger_says(context, server, project, tmp_path):
    page = visit(context, f"{server}/voila/render/usecase.ipynb?usecase=flight_delays", tmp_path / "usecase.png")
    settings = Settings(project, actor="ada")
    usecase, ledger = load_usecase("flight_delays", settings), open_ledger(settings)
    table, worth = monthly(usecase, ledger).to_dict("records"), roi(usecase, ledger)
    assert page.locator("figure.chart svg[role=img]").count() == 7
    assert {month: row[0] for month, row in figures(page, "Outcome rate").items()} == {row["window"]: percent(row["rate"]) for row in table}
    assert {month: row[0] for month, row in figures(page, "ROC AUC").items()} == {row["window"]: number(row["roc_auc"], 3) for row in table}
    kinds = ("realised", "planned", "baseline")
    value = page.locator("figure.chart").filter(has_text="USD a month before running costs").locator("details tbody tr").all()
    assert [row.locator("td").all_text_contents() for row in value] == [[row["window"], *(number(row[kind]) for kind in kinds)] for row in table]
    assert figures(page, "Decisions") == {row["window"]: [number(row["decided"]), number(row["delivered"])] for row in table}
    drift = figures(page, "Drift")
    assert list(drift)[0] == "evening_temp" and drift["origin"][-1] == "–" and drift["evening_temp"][0] == "6.120"
    assert page.locator(".card .figure").all_inner_texts()[:3] == [money(worth[kind], "USD") for kind in ("net_benefit", "realised", "over_baseline")]
    missed = sum(known(row["roc_auc"]) and row["roc_auc"] < 0.64 for row in table) + sum(known(row["value_per_1000"]) and row["value_per_1000"] < 400 for row in table)
    assert page.locator("svg rect.miss").count() == missed == 6
    assert "Needs attention since 2013-10." in page.locator("#state").inner_text()
    assert "Data as of 20" in page.locator("header").inner_text() and "ops-analytics@example.org" in page.locator("header").inner_text()
    text = page.locator("main").inner_text()
    assert "v3" in text and "refused" in text and "r20261123-050008-flig" in text
    page.close()


@pytest.mark.browser
def test_a_hostile_name_is_shown_and_runs_nothing(context, server, tmp_path):
    page = visit(context, f"{server}/voila/render/usecase.ipynb?usecase=hostile", tmp_path / "hostile.png")
    assert page.locator("h1").inner_text() == HOSTILE and page.title() != "owned"
    assert page.locator("main script, main img").count() == 0
    page.close()
    page = visit(context, f"{server}/voila/render/usecase.ipynb?usecase=%3Cimg%20src=x%3E", tmp_path / "unknown.png")
    assert "There is no use case '<img src=x>' here." in page.locator("h1").inner_text()
    page.close()


@pytest.mark.browser
def test_a_notebook_that_fails_shows_a_calm_panel(context, server, tmp_path):
    page = visit(context, f"{server}/voila/render/broken.ipynb", tmp_path / "broken.png")
    assert "cannot be shown right now" in page.locator("main").inner_text()
    assert "secret reason" not in page.content() and "RuntimeError" not in page.content()
    page.close()


def answer(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def test_without_the_token_nothing_is_served(server):
    for path in ("/", "/?token=wrong", "/voila/render/portfolio.ipynb", "/voila/render/portfolio.ipynb?token=wrong"):
        code, text = answer(server + path)
        assert code == 403 and "asks for its token" in text and "flight" not in text, path


@pytest.mark.parametrize("path", ["/voila/files/secret.png", "/voila/render/secret.png", "/voila/files/portfolio.ipynb", "/api/kernels",
                                  "/voila/api/contents/", "/voila/tree/", "/voila/render/../settings.ini", "/voila/static/voila.js"])
def test_nothing_but_pages_is_served(server, path):
    for query in ("", f"?token={TOKEN}"):
        code, text = answer(server + path + query)
        assert code == 404 and "secret" not in text.replace("secret.png", ""), path


def test_an_empty_project_says_which_command_makes_data(tmp_path, monkeypatch):
    monkeypatch.setenv("AIEXEC_ROOT", str(tmp_path))
    (tmp_path / "settings.ini").write_text("[aiexec]\n")
    assert "aiexec demo" in dashboards.portfolio() and "aiexec new NAME" in dashboards.portfolio()
    define(tmp_path, "late_orders", "Warn of late orders")
    assert "Nothing was recorded yet." in dashboards.portfolio() and "aiexec run late_orders" in dashboards.usecase("late_orders")
    assert not (tmp_path / ".aiexec").exists(), "reading makes no ledger"


def test_a_damaged_ledger_is_a_calm_panel_and_a_line_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("AIEXEC_ROOT", str(tmp_path))
    (tmp_path / "settings.ini").write_text("[aiexec]\n")
    define(tmp_path, "late_orders", "Warn of late orders")
    (tmp_path / ".aiexec").mkdir()
    (tmp_path / ".aiexec" / "ledger.db").write_bytes(b"this is no database" * 100)
    for page in (dashboards.portfolio(), dashboards.usecase("late_orders")):
        assert "cannot be shown right now" in page and "LedgerError" not in page and str(tmp_path) not in page
        number = page.split("the number ")[1][:6]
        assert f" {number}\n" in (tmp_path / ".aiexec" / "dashboards.log").read_text()


def test_thirty_months_and_many_columns_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("AIEXEC_ROOT", str(tmp_path))
    (tmp_path / "settings.ini").write_text("[aiexec]\n")
    define(tmp_path, "flight_delays", "Flights")
    months = [f"{2011 + n // 12}-{n % 12 + 1:02}" for n in range(30)]
    ledger = open_ledger(Settings(tmp_path))
    live_through(ledger, "flight_delays", [(month, *YEAR[n % 8][1:]) for n, month in enumerate(months)])
    page = dashboards.usecase("flight_delays")
    assert all(f"<td>{month}</td>" in page for month in months)
    assert page.count(f">{months[-1]}</text>") == 7 and len(page) < 150_000


def test_a_port_in_use_is_refused_in_one_sentence(server, project, monkeypatch):
    monkeypatch.setenv("AIEXEC_ROOT", str(project))
    port, before = int(server.rsplit(":", 1)[1]), signal.getsignal(signal.SIGTERM)
    try:
        with patch.dict(os.environ), pytest.raises(ParameterError, match=f"Port {port} cannot be used"):
            dashboards.serve(Settings(project), port, token=TOKEN)
    finally:
        signal.signal(signal.SIGTERM, before)
