"""The promotion packet is whole, light and harmless, says its gaps, and shows what was answered on the champion's requests."""

import json
import shutil
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from aiexec.model.findings import record_findings
from aiexec.model.gates import compare, record_gates
from aiexec.model.registry import find_version, promote, register
from aiexec.model.rule import seen_on
from aiexec.serve.days import Answered
from aiexec.serve.predictions import open_log, prediction_ids
from aiexec.settings import load_settings
from aiexec.store import open_ledger

from .conftest import aiexec, answer

HOSTILE = "<script>alert('x')</script> \"quoted\" & 'more'"
SHOPS = [f"{name} {number}" for number in range(39) for name in ["Shop of the long name in the city"]] + [HOSTILE]


class Whole(HTMLParser):
    """Every element that opens is closed, in order; scripts, handlers and outside addresses are noted."""

    EMPTY = {"meta", "br", "hr", "img", "link", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.faults, self.seen = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        for name, value in attrs:
            if name.startswith("on") or name in ("src", "srcset", "href") and not (value or "").startswith(("#", "mailto:", "data:")):
                self.faults.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag):
        if tag not in self.EMPTY and (not self.open or self.open.pop() != tag):
            self.faults.append(f"</{tag}>")


def looked_at(path) -> str:
    """A packet's page, once it was found whole and harmless."""
    page = path.read_text(encoding="utf-8")
    reader = Whole()
    reader.feed(page)
    assert not reader.open and not reader.faults, (reader.open, reader.faults[:5])
    assert not {"script", "iframe", "form", "object", "link"} & set(reader.seen)
    assert "default-src 'none'" in page and len(page.encode()) < 300_000
    assert "nan" not in page.lower().replace("finance", "") and "None" not in page.replace("None are declared", "")
    return page


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A champion, a challenger that a gate has judged in forty segments, and a third that nobody has looked at."""
    place = tmp_path_factory.mktemp("shop")
    folder = place / "usecases" / "late_orders"
    folder.mkdir(parents=True)
    (place / "settings.ini").write_text("[aiexec]\nactor = ada\n")
    (folder / "usecase.yaml").write_text(f"""\
name: late_orders
title: {json.dumps(HOSTILE)}
department: logistics
owner: ada@example.org
risk: limited
success: [{{metric: roc_auc, at_least: 0.6}}]
value: {{currency: EUR, true_positive: 30, false_positive: -8, false_negative: 0, true_negative: 0}}
model: {{name: late_orders, gate: {{segments: [shop], floor: -0.2}}}}
""")
    ledger, chance = open_ledger(load_settings(place)), np.random.default_rng(0)
    orders = pd.DataFrame({"weight": chance.normal(size=8000), "distance": chance.normal(size=8000)})
    where = pd.Series(chance.choice(SHOPS, 8000), name="shop")
    late = (chance.random(8000) < 1 / (1 + np.exp(1 - orders.distance - orders.weight / 2))).astype(int)
    models = {}
    for version, columns in enumerate((["weight"], ["weight", "distance"], ["distance"]), 1):
        models[version] = LogisticRegression().fit(orders[columns], late)
        register("late_orders", models[version], orders[columns], metrics={"roc_auc": 0.7}, trained_on={"window": "2024"}, ledger=ledger)
    promote("late_orders", 1, reason="the first", ledger=ledger)
    said = {1: models[1].predict_proba(orders[["weight"]])[:, 1], 2: models[2].predict_proba(orders)[:, 1]}
    verdict = compare(late, said[1], said[2], segments=where, floor=-0.2, minimum_rows=100)
    record_gates(ledger, "late_orders", 2, [verdict], against=1, window="2024-05")
    shown = seen_on(late, said[2], orders, lambda rows: models[2].predict_proba(rows)[:, 1], note=HOSTILE)
    record_findings(ledger, "late_orders", 2, shown, window="2024-05")
    return place, orders, said


def test_a_packet_of_forty_segments_is_whole_and_harmless(shop):
    place, _, _ = shop
    told = answer("packet", "late_orders", 2, "-o", "two.html", cwd=place)
    assert told["outcomes"] == {"roc_auc": "pass"} and told["replay"] is None
    page = looked_at(place / "two.html")
    for words in ("The gate passed.", "the difference, by shop", "aiexec approve late_orders 2", "Model card", "Ethical considerations",
                  "No request was replayed", "What it must not be used for is not said", "SHA-256", "&lt;script&gt;"):
        assert words in page, words
    assert page.count('class="miss"') == 0 and page.count("<circle") >= 40


def test_the_notebook_holds_the_same_page(shop):
    place, _, _ = shop
    assert aiexec("packet", "late_orders", 2, cwd=place).returncode == 0
    held = nbformat.read(place / "packets" / "late_orders-2.ipynb", 4)
    nbformat.validate(held)
    cell = held.cells[1]
    assert cell.execution_count == 1 and 'packet("late_orders", 2)' in cell.source
    assert "The gate passed." in cell.outputs[0].data["text/html"]


def test_what_was_not_judged_says_so(shop):
    place, _, _ = shop
    told = answer("packet", cwd=place)  # the newest
    assert told["version"] == 3 and told["outcomes"] == {}
    page = looked_at(place / "packets" / "late_orders-3.html")
    for words in ("No gate has judged this version.", "The calibration was not measured.", "The importance of features was not measured.",
                  "No gate judged this version, though limited risk asks for one."):
        assert words in page, words


def test_the_challenger_answers_what_the_champion_was_asked(shop, tmp_path):
    place = tmp_path / "served"
    shutil.copytree(shop[0], place)
    orders, said = shop[1].head(300), shop[2]
    columns = (("weight", "double"), ("distance", "double"))
    log = open_log("late_orders", load_settings(place))
    log.append([Answered("late_orders", "1", columns, "champion", prediction_ids(300), [None] * 300, orders, said[1][:300])])
    log.close()
    told = answer("packet", "late_orders", 2, "-o", "served.html", cwd=place)
    page = looked_at(place / "served.html")
    line = 8 / 38  # from which acting pays
    flipped = int(((said[1][:300] >= line) != (said[2][:300] >= line)).sum())
    assert told["replay"] is None and "asked again" in page and f">{flipped}</div>" in page


def test_a_log_without_the_columns_is_no_reason_to_write_nothing(shop, tmp_path):
    place = tmp_path / "masked"
    shutil.copytree(shop[0], place)
    orders, said = shop[1].head(50), shop[2]
    log = open_log("late_orders", load_settings(place))
    log.append([Answered("late_orders", "1", (("weight", "double"),), "champion", prediction_ids(50), [None] * 50, orders[["weight"]],
                         said[1][:50])])
    log.close()
    told = answer("packet", "late_orders", 2, cwd=place)
    assert "holds no column 'distance'" in told["replay"]
    assert "No request was replayed" in looked_at(place / "packets" / "late_orders-2.html")


def test_the_packet_of_the_first_month_is_filled_from_evidence(month, tmp_path):
    told = answer("packet", "flight_delays", 1, "-o", tmp_path / "first.html", cwd=month)
    assert told["outcomes"] == {"roc_auc": "pass"}
    page = looked_at(tmp_path / "first.html")
    for words in ("departure_minute", "taught by ingest.flights@2013-01", "roc_auc ≥ 0.64", "it is the champion",
                  "Of the same model before it was fitted on 2013-03 as well.", "code of the notebook", "The operations desk"):
        assert words in page, words


def test_nobody_is_asked_to_approve_files_that_changed(shop, tmp_path):
    place = tmp_path / "changed"
    shutil.copytree(shop[0], place)
    record = find_version("late_orders", 2, open_ledger(load_settings(place)))
    model = next((place / ".aiexec" / record["source"]).rglob("model.skops"))
    model.write_bytes(model.read_bytes() + b"?")
    told = aiexec("packet", "late_orders", 2, "-o", "changed.html", cwd=place)
    assert not (place / "changed.html").exists() and told.returncode == 1 and "version 2 are not those that were registered" in told.stderr
