"""The monitoring page as its people meet it: in a browser, through Voila and as a file, on ledgers whose figures are known."""

import datetime
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path

import pytest

from aiexec.define.usecase import load_usecase
from aiexec.monitor.actions import acknowledge
from aiexec.monitor.alerts import alerts, open_alert
from aiexec.monitor.costs import WeeklyCost
from aiexec.monitor.drift import psi
from aiexec.monitor.profiles import Column, Profile
from aiexec.monitor.stored import keep_profiles
from aiexec.monitor.watch import MEASUREMENTS
from aiexec.projects import template
from aiexec.settings import Settings
from aiexec.show.incidents import PLACE
from aiexec.show.monitoring import monitoring_page, write_monitoring
from aiexec.store import now, open_ledger
from tests.conftest import aiexec
from tests.test_dashboards import QUIET, CHROMIUM, alive, children

USECASE = """
name: late
title: Warn of late arrivals
department: operations
owner: ops@example.org
risk: limited
success: [{metric: roc_auc, at_least: 0.64}]
value: {currency: USD, true_positive: 38, false_positive: -9, false_negative: 0, true_negative: 0}
model: {name: late}
monitor: {people: [bo@example.org]}
pipeline: {}
"""
MONTHS = [f"2013-{month:02}" for month in range(1, 13)]
EDGES = tuple(float(edge) for edge in range(10, 100, 10))
HOSTILE = "<script>document.title='owned'</script>"
AIRPORTS = ("EWR", "JFK", "LGA")


def counts(window: int, column: int, moved: int) -> tuple[int, ...]:
    """What 1,000 rows look like, a little different in each window; `moved` of them have gone from the first cell to the last."""
    found = [100 + (window * 7 + column * 3 + cell * 5) % 9 - 4 for cell in range(10)]
    found[0], found[9] = found[0] - moved, found[9] + moved
    return tuple(found)


def lived(root: Path, windows: list[str], names: list[str], moved: dict[tuple[str, str], int] = {}, auc: dict[str, float] = {}, labels: int = 2) -> Settings:
    """A project whose windows were measured: `moved` rows by column and window, `auc` where it is not 0.66; the last windows lack labels."""
    (root / "usecases" / "late").mkdir(parents=True)
    (root / "settings.ini").write_text("[aiexec]\nactor = ops@example.org\n")
    (root / "usecases" / "late" / "usecase.yaml").write_text(USECASE)
    settings = Settings(root, actor="ops@example.org")
    if not windows:
        return settings
    ledger = open_ledger(settings)
    before = {name: Column(name, "category", 0, 0, AIRPORTS, (400, 300, 300, 0)) if name == "origin" else
              Column(name, "number", 0, 0, EDGES, (100,) * 10, 0.0, 110.0) for name in names}
    reference, rows = Profile(1000, before), []
    empty = dict.fromkeys(MEASUREMENTS.c.keys()) | {"usecase": "late", "version": 1, "at": now(), "run": ""}
    for at, window in enumerate(windows):
        found = {}
        for place, name in enumerate(names):
            lost = moved.get((name, window), 0)
            seen = (400 - lost, 300 + lost, 300, 0) if name == "origin" else counts(at, place, lost)
            found[name] = Column(name, before[name].kind, 0, 0, before[name].cells, seen, before[name].low, before[name].high)
            value = psi(before[name].counts, seen)
            verdict = "act" if value >= .25 else "watch" if value >= .1 else "none"
            rows.append(empty | {"window": window, "kind": "drift", "name": name, "value": value, "verdict": verdict,
                                 "detail": {"why": f"{lost} rows moved." if lost else ""}})
        rows.append(empty | {"window": window, "kind": "volume", "name": "rows", "value": 1000.0})
        keep_profiles(ledger, "late", window, reference, Profile(1000, found))
        share = [0.0, .4, 1.0][min(len(windows) - 1 - at, labels) if labels else 2]
        value = auc.get(window, .66) if share else None
        rows.append(empty | {"window": window, "kind": "performance", "name": "roc_auc", "value": value, "low": value and value - .01,
                             "high": value and value + .01,
                             "detail": {"coverage": share, "estimated": .66, "estimated_low": .64, "estimated_high": .68}})
    with ledger.change("year.measured", "late", tables=(MEASUREMENTS,)) as change:  # `record` keeps a window at a time, which takes longer
        change.insert(MEASUREMENTS, *rows)
    return settings


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A year of months with two incidents, one of which somebody is on; one column has a hostile name."""
    root = tmp_path_factory.mktemp("watched")
    moved = {("wind", "2013-06"): 95, ("wind", "2013-07"): 95, ("origin", "2013-06"): 250, (HOSTILE, "2013-03"): 80}
    settings = lived(root, MONTHS, ["wind", "origin", "rain", HOSTILE], moved, {"2013-08": .62, "2013-09": .61})
    ledger = open_ledger(settings)
    cost = WeeklyCost(4210.0, 3100.0, 5300.0, "USD", "a thousand decisions brought 620 USD before and 190 now.")
    open_alert(ledger, "late", "performance.roc_auc", "2013-10", "roc_auc ≥ 0.64: missed in 2 of 3 windows.", "ops@example.org", cost=cost)
    open_alert(ledger, "late", "drift", "2013-06", f"wind drifted; {HOSTILE}", "ops@example.org", "watch")
    acknowledge(ledger, "late", "drift@2013-06", "looking")
    shutil.copytree(template("dashboards"), root / "dashboards")
    return root


@pytest.fixture(scope="module")
def served(project):
    """Voila in a process of its own: its address, and the addresses of its owner, of a responder and of a visitor who may only look."""
    program = ("import sys; from pathlib import Path; from aiexec.settings import load_settings; from aiexec.show.dashboards import serve\n"
               f"serve(load_settings(Path({str(project)!r})), tell=lambda text: print(text, flush=True), invited=['bo@example.org', 'visitor@example.org'])")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=project)
    ways = [process.stdout.readline().split()[-1] for _ in range(3)]
    yield ways[0].split("/?")[0], *ways
    begun = children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not [pid for pid in begun if alive(pid) and process.poll() is None]


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


def watched_page(browser, address: str, width: int = 1280, first: str = ""):
    """A page that asks nobody but this machine, and of which the browser complains about nothing."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page, page.asked, page.heard = context.new_page(), [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.heard.append(message.text))
    if first:
        page.goto(first)
    page.goto(address)
    page.wait_for_selector("main.ax", timeout=60_000)
    assert [url for url in page.asked if not url.startswith(("http://127.0.0.1:", "data:", "file:"))] == []
    assert page.heard == [] and page.title() != "owned" and page.locator("main script").count() == 0
    return page


def opened_by(page, row: str, window: str):
    """The link of a cell of the heat map, found as a screen reader finds it: by the heads of its row and column."""
    heads = page.locator(".heat").first.locator("thead th").all_text_contents()
    return page.locator(".heat tbody tr").filter(has=page.locator("th", has_text=row)).locator("td").nth(heads.index(window) - 1).locator("> a")


@pytest.mark.browser
def test_a_cell_opens_its_two_distributions_without_a_script(browser, served):
    page = watched_page(browser, f"{served[0]}/voila/render/monitoring.ipynb?usecase=late", first=served[1])
    link = opened_by(page, "wind", "2013-07")
    assert link.inner_text() == f"{psi((100,) * 10, counts(6, 0, 95)):.2f}".lstrip("0")
    assert page.locator(".heat .p:visible").count() == 0 and page.locator(".heat b:visible").count() == 0
    link.click()
    panel, window = page.locator(".heat .p:visible"), page.locator(".heat b:visible")
    assert panel.count() == window.count() == 1
    assert panel.locator("strong").inner_text() == "wind" and panel.locator("path.before").is_visible() and "filled is the reference" in panel.inner_text()
    assert "2013-07 · PSI" in window.inner_text() and "· act" in window.inner_text() and "95 rows moved." in window.inner_text()
    assert window.locator("svg path").bounding_box()["width"] > 500, "the window is drawn over the reference"
    box, below = window.locator("svg path").bounding_box(), panel.locator("path.before").bounding_box()
    assert abs(box["x"] - below["x"]) < 12 and abs(box["width"] - below["width"]) < 24 and abs(box["y"] + box["height"] - below["y"] - below["height"]) < 12
    panel.get_by_text("Close").click()
    assert page.locator(".heat b:visible").count() == 0
    opened_by(page, "origin", "2013-06").focus()
    page.keyboard.press("Enter")
    assert page.locator(".heat b:visible").inner_text().startswith("2013-06 · PSI") and "JFK" in page.locator(".heat .p:visible").inner_text()
    page.go_back()
    page.locator(".heat b:visible").wait_for(state="hidden")
    page.context.close()


@pytest.mark.browser
def test_ten_seconds_are_enough(browser, served):
    page = watched_page(browser, f"{served[0]}/voila/render/monitoring.ipynb?usecase=late", width=390, first=served[1])
    assert "Not all right since 2013-10." in page.locator("#state").inner_text()
    cards = page.locator(".card").all_inner_texts()
    assert cards[0].splitlines()[:2] == ["What it costs", "USD 4,210 a week"] and "1 of 2 open alerts not taken" in cards[1]
    assert "0.660" in cards[2] and "2013-10" in cards[2] and "early" not in cards[2], "the newest figure that is firm"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing overflows a phone"
    chart = page.locator("figure.chart").filter(has_text="ROC AUC").first
    rows = {row[0]: row[1:] for row in (row.locator("td").all_text_contents() for row in chart.locator("details tbody tr").all())}
    assert rows["2013-09"] == ["0.610", "0.600 to 0.620", "0.660", "100.0 %", "misses the threshold"]
    assert rows["2013-11"][-1] == "early: only 40.0 % of its labels have come" and rows["2013-12"][0] == "–"
    assert chart.locator("svg[role=img] rect.miss").count() == 2 and "estimated before labels" in chart.inner_text()
    page.context.close()


@pytest.mark.browser
def test_whoever_may_takes_and_mutes_an_incident_by_its_buttons(browser, served, project):
    ledger, name = open_ledger(Settings(project, actor="x")), "performance.roc_auc@2013-10"

    def alert() -> dict:
        return next(row for row in alerts(ledger, "late") if row["alert"] == name)

    page = watched_page(browser, f"{served[0]}/voila/render/monitoring.ipynb?usecase=late", first=served[2])
    incident = page.locator(f"[id='alert-{name}']")
    incident.locator("form").filter(has_text="I am on it").locator("input[name=note]").fill("on my way <b>")
    incident.get_by_role("button", name="I am on it").click()
    page.wait_for_url("**/monitoring.ipynb?usecase=late#incidents")
    page.wait_for_selector("main.ax", timeout=60_000)
    assert (alert()["status"], alert()["taken_by"]) == ("acknowledged", "bo@example.org")
    assert "bo@example.org is on it" in page.locator(f"[id='alert-{name}']").inner_text()
    incident.locator("select[name=until]").select_option("7d")
    incident.get_by_role("button", name="Mute").click()
    page.wait_for_url("**/monitoring.ipynb?usecase=late#incidents")
    page.get_by_role("button", name="Unmute").wait_for(timeout=60_000)
    assert alert()["muted_until"] > datetime.datetime.now(datetime.timezone.utc).isoformat()
    assert [line["actor"] for line in alert()["history"][-2:]] == ["bo@example.org"] * 2 and alert()["history"][-2]["sentence"] == "on my way <b>"
    page.context.close()

    page = watched_page(browser, f"{served[0]}/voila/render/monitoring.ipynb?usecase=late", first=served[3])
    page.get_by_role("button", name="Unmute").click()
    page.get_by_text("That was not done.").wait_for()
    assert "visitor@example.org may not unmute the alert performance.roc_auc@2013-10. Ask bo@example.org" in page.locator("main").inner_text()
    assert alert()["muted_until"] and alert()["history"][-1]["actor"] == "bo@example.org"
    assert [event.actor for event in ledger.events(kind="alert.refused")] == ["visitor@example.org"]
    page.context.close()


def visitor(way: str):
    """Somebody who opened an address once, and the mark that the pages bear."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    with opener.open(way, timeout=120) as response:
        assert response.status == 200
    page = opener.open(f"{way.split('/?')[0]}/voila/render/monitoring.ipynb?usecase=late", timeout=120).read().decode()
    return opener, re.search(r'name="mark" value="(\w+)"', page)[1]


def pressed(opener, base: str, headers: dict = {}, **form: str) -> tuple[int, str]:
    """What the server answers to a form."""
    given = {"usecase": "late", "alert": "drift@2013-06", "action": "mute", "until": "7d"} | form
    request = urllib.request.Request(f"{base}/act", urllib.parse.urlencode(given).encode(), headers)
    try:
        with opener.open(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def test_no_button_is_pressed_in_anothers_name(served, project):
    base, _, responder, looker = served
    opener, mark = visitor(responder)
    other, others = visitor(looker)
    ledger = open_ledger(Settings(project, actor="x"))
    before = len(ledger.events())
    assert mark != others and PLACE not in mark
    for form in ({}, {"mark": ""}, {"mark": others}, {"mark": PLACE}):
        code, text = pressed(opener, base, **form)
        assert code == 403 and "was not pressed on a page of yours" in text, form
    assert pressed(opener, base, {"Sec-Fetch-Site": "cross-site"}, mark=mark)[0] == 403
    assert pressed(urllib.request.build_opener(), base, mark=mark)[0] == 403, "a mark alone is nobody"
    assert len(ledger.events()) == before, "nothing was even looked at"
    code, text = pressed(other, base, mark=others)
    assert code == 403 and "visitor@example.org may not mute the alert drift@2013-06. Ask bo@example.org, ops@example.org." in text
    for form, says in [({"alert": "drift@2013-07"}, "has no alert"), ({"action": "burn"}, "no button"), ({"until": "soon"}, "no time"),
                       ({"usecase": HOSTILE}, "has no alert"), ({"note": "x" * 501}, "one line"), ({"action": "close"}, "with a reason")]:
        code, text = pressed(opener, base, mark=mark, **form)
        assert code == 400 and says in text and "<script>" not in text, form
    assert [event.kind for event in ledger.events()[before:]] == ["alert.refused"]
    assert pressed(opener, base, mark=mark, note="x" * 60_000)[0] == 400 and pressed(opener, base, mark=mark)[0] == 200
    assert next(row for row in alerts(ledger, "late") if row["cause"] == "drift")["muted_until"]


@pytest.mark.browser
def test_two_hundred_columns_and_fifty_two_windows_are_one_light_file(browser, tmp_path):
    weeks, names = [f"2013-W{week:02}" for week in range(1, 53)], [f"column_{number}" for number in range(200)]
    moved = {(name, week): 95 for at, name in enumerate(names) for week in weeks[at % 30:at % 30 + 12] if at % 4 == 0}
    settings = lived(tmp_path, weeks, names, moved)
    size = write_monitoring(load_usecase("late", settings), settings, tmp_path / "page.html")
    assert size == (tmp_path / "page.html").stat().st_size < 2_000_000
    page = watched_page(browser, f"file://{tmp_path / 'page.html'}")
    assert len(page.asked) == 1 and page.locator("form").count() == 0
    assert page.locator(".heat tbody td > a").count() == 200 * 52 == page.locator(".heat tbody td b svg path").count()
    assert page.locator("details", has_text="columns in which nothing was seen").locator("summary").inner_text().startswith("150 columns")
    opened_by(page, "column_196", weeks[196 % 30 + 1]).click()
    assert page.locator(".heat .p:visible strong").inner_text() == "column_196" and "· act" in page.locator(".heat b:visible").inner_text()
    page.context.close()


@pytest.mark.browser
def test_a_year_of_days_stays_readable_and_opens_the_worst_of_a_week(browser, tmp_path):
    days = [str(datetime.date(2013, 1, 1) + datetime.timedelta(day)) for day in range(100)]
    settings = lived(tmp_path, days, ["wind", "rain"], {("wind", days[40]): 95, ("wind", days[38]): 80}, labels=0)
    write_monitoring(load_usecase("late", settings), settings, tmp_path / "page.html")
    page = watched_page(browser, f"file://{tmp_path / 'page.html'}")
    assert page.locator(".heat").first.locator("tbody tr").first.locator("td > a").count() == 15, "weeks, not days"
    opened_by(page, "wind", days[35]).click()
    told = page.locator(".heat b:visible").inner_text()
    assert told.startswith(f"{days[35]} to {days[41]}, worst: {days[40]} · PSI") and f"also {days[38]}" in told
    assert f"{days[30]}" in monitoring_page("late", settings, first=days[30], last=days[50]) and days[60] not in monitoring_page("late", settings, last=days[50])
    page.context.close()


def test_hostile_words_stay_words(project):
    page = monitoring_page("late", Settings(project, actor="x"), able=True)
    assert "<script" not in page and HOSTILE not in page and page.count("&lt;script&gt;") >= 2


@pytest.mark.parametrize("windows, says, costs", [([], "Nothing was measured yet.", None), (MONTHS[:1], "Too early to tell.", "Cannot tell"),
                                                  (MONTHS[:8], "All right.", "Nothing")])
def test_every_state_says_what_is_known(tmp_path, windows, says, costs):
    settings = lived(tmp_path, windows, ["wind", "rain"])
    page = monitoring_page("late", settings)
    assert says in page and (costs is None or f'<div class="figure">{costs}</div>' in page)
    assert (tmp_path / ".aiexec").exists() == bool(windows), "reading makes no ledger"


def test_one_notebook_is_assertion_schedule_and_page(project, tmp_path):
    """What Voila shows is executed headless, with the same verdict as the verb; strict fails when something must be done."""
    done = aiexec("run", "dashboards/monitoring.ipynb", "-o", tmp_path / "told.ipynb", "--json", cwd=project, AIEXEC_KERNELS="cold")
    assert done.returncode == 0, done.stdout + done.stderr
    verb = aiexec("monitor", "late", "--json", "--html", tmp_path / "page.html", cwd=project)
    told = json.loads(verb.stdout)
    assert verb.returncode == 1 and json.loads(done.stdout)["outputs"]["verdict"] == told["verdict"] == "act"
    done = aiexec("run", "dashboards/monitoring.ipynb", "-p", "strict", "true", "-o", tmp_path / "strict.ipynb", cwd=project, AIEXEC_KERNELS="cold")
    assert done.returncode == 1 and "roc_auc ≥ 0.64: missed in 2 of 3 windows." in done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Not all right since 2013-10." in page and "<form" not in page and PLACE not in page and "aiexec alerts late --acknowledge" in page
    refused = aiexec("monitor", "late", "--from", "2013-04", cwd=project)
    assert refused.returncode == 1 and "--from is about the page. It goes with --html FILE." in refused.stderr


@pytest.mark.browser
def test_two_files_are_a_picture_with_no_project(browser, tmp_path):
    rows = [f"{value % 100},{('EWR', 'JFK')[value % 2]},{value * 7 % 50}" for value in range(4000)]
    (tmp_path / "before.csv").write_text("\n".join(["wind,origin,<script>", *rows]))
    (tmp_path / "after.csv").write_text("\n".join(["wind,origin,<script>", *[f"{60 + int(row.split(',')[0]) % 40},{row.split(',', 1)[1]}" for row in rows]]))
    done = aiexec("drift", "before.csv", "after.csv", "--html", "page.html", cwd=tmp_path)
    assert done.returncode == 0 and "page.html: 0.0 MB" in done.stdout, done.stdout + done.stderr
    page = watched_page(browser, f"file://{tmp_path / 'page.html'}")
    assert "The data changed." in page.locator("#state").inner_text()
    page.locator(".heat tbody tr").filter(has=page.locator("th", has_text="wind")).locator("td > a").click()
    assert page.locator(".heat .p:visible strong").inner_text() == "wind" and page.locator(".heat b:visible svg path").count() == 1
    page.context.close()
