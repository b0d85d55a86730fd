"""The gate is honest over many trials, says what it cannot tell, and judges the whole rule of a use case."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer_names

from aiexec.define.metrics import METRICS, NEITHER, metric
from aiexec.define.usecase import Calibration, Fairness, Gate, Value, load_usecase
from aiexec.govern.audit import verify_chain
from aiexec.model import draws
from aiexec.model.calibration import calibrated, judge_calibration
from aiexec.model.draws import rows_needed
from aiexec.model.fairness import judge_fairness, rates
from aiexec.model.findings import findings, record_findings
from aiexec.model.gates import compare, gates, record_gates, standing
from aiexec.model.registry import find_version, register
from aiexec.model.rule import judge_rest
from aiexec.serve.replay import asked_again, replay, shadowed
from aiexec.settings import load_settings
from aiexec.store import open_ledger

WORTH = Value(currency="USD", true_positive=38, false_positive=-9, false_negative=0, true_negative=0)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """A hundred and fifty draws instead of five hundred: quicker, and a little less sure of its ends."""
    monkeypatch.setattr(draws, "DRAWS", 150)


def trial(seed: int, rows: int = 600, better: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and the scores of two models; equally good, unless the challenger hears `better` more of the truth."""
    chance = np.random.default_rng(seed)
    truth = chance.normal(size=rows)
    labels = (truth + chance.normal(size=rows) > 0.5).astype(int)
    return labels, truth + chance.normal(size=rows), truth + (1 - better) * chance.normal(size=rows)


def at_most(count: int, trials: int, rate: float) -> bool:
    """Whether so many in so many trials fit a rate of at most this; wrongly denied once in a thousand times."""
    return count <= binom.ppf(0.999, trials, rate)


def test_equal_models_pass_no_more_often_than_the_confidence_allows():
    found = [compare(*trial(seed), confidence=0.9, seed=seed).outcome for seed in range(100)]
    assert at_most(found.count("pass"), 100, 0.05)  # a two-sided interval of 90 % lies above nought in one of twenty
    assert found.count("pass") >= 1  # a gate that never passes would pass this test as well


def test_money_of_equal_models_passes_no_more_often_than_the_confidence_allows():
    found = []
    for seed in range(60):
        labels, *scores = trial(seed, 1000)
        acted = [said > 0.5 for said in scores]
        found.append(compare(labels, *acted, "value_per_1000", value=WORTH, confidence=0.9, seed=seed).outcome)
    assert at_most(found.count("pass"), 60, 0.05)


def test_a_better_challenger_passes_and_a_worse_one_never():
    better = [compare(*trial(seed, 1500, 0.5), seed=seed).outcome for seed in range(12)]
    assert better.count("pass") >= 10
    worse = [compare(labels, present, proposed, seed=seed).outcome for seed in range(12)
             for labels, proposed, present in [trial(seed, 1500, 0.5)]]
    assert worse.count("fail") >= 10 and "pass" not in worse


def test_segments_fail_no_more_often_than_the_confidence_allows():
    """Twenty segments of equal models: one in twenty gates, not one in twenty segments, may call one worse."""
    found = []
    for seed in range(20):
        labels, present, proposed = trial(seed, 2400)
        part = pd.Series(np.arange(2400) % 20, name="part")
        checks = compare(labels, present, proposed, segments=part, minimum_rows=100, confidence=0.9, seed=seed).checks
        found.append((checks.outcome[1:] == "fail").any())
    assert at_most(sum(found), 20, 0.12)


def test_too_few_rows_cannot_tell_and_the_rows_that_it_asks_for_do():
    few = compare(*trial(1, 700, 0.25))
    assert few.outcome == "cannot tell" and few.needed > 700 and f"{few.needed:,.0f} rows like these" in few.why
    # with twice the difference a quarter of the rows would do
    assert rows_needed(1000, 0.02, 0.01, 0.95) == pytest.approx(4 * rows_needed(1000, 0.02, 0.02, 0.95), rel=0.05)
    truly = metric("roc_auc")
    labels, present, proposed = trial(0, 200_000, 0.25)
    effect = truly.function(labels, proposed) - truly.function(labels, present)
    error = (few.high - few.low) / 2 / 1.96
    needed = int(rows_needed(700, error, effect, 0.95))
    told = [compare(*trial(seed, needed, 0.25), seed=seed).outcome == "pass" for seed in range(20)]
    assert 10 <= sum(told) <= 20  # four in five, by the draw


def test_the_smallest_difference_that_matters_ends_the_doubt():
    labels, present, proposed = trial(3, 4000)
    assert compare(labels, present, present + 1e-6 * proposed, least=0.01).outcome == "fail"


@pytest.mark.parametrize("name", [name for name in get_scorer_names() if name not in METRICS and not NEITHER.fullmatch(name)])
def test_every_scorer_finds_the_better_model(name, monkeypatch):
    monkeypatch.setattr(draws, "DRAWS", 40)
    chance = np.random.default_rng(0)
    truth = chance.normal(5, 1, size=600)
    if metric(name).needs == "number":
        labels, rivals = np.abs(truth) + 0.1, [np.abs(truth + spread * chance.normal(size=600)) + 0.1 for spread in (2.0, 0.2)]
    else:
        labels = (truth + 0.3 * chance.normal(size=600) > 5).astype(int)
        rivals = [1 / (1 + np.exp(-3 * (truth - 5 + spread * chance.normal(size=600)))) for spread in (2.0, 0.2)]
    found = compare(labels, *rivals, name)
    assert found.outcome == "pass", found.why


def test_a_floor_asks_for_proof():
    chance = np.random.default_rng(0)
    labels, present, proposed = trial(5, 4000, 0.4)
    shop = pd.Series(np.where(np.arange(4000) % 4 == 0, "small", "large"), name="shop")
    harmed = np.where(shop == "small", present + 0.4 * chance.normal(size=4000), proposed)
    assert compare(labels, present, proposed, segments=shop, floor=-0.05).outcome == "pass"
    found = compare(labels, present, harmed, segments=shop, floor={"shop small": -0.005})
    assert found.outcome in ("cannot tell", "fail") and "shop small" in found.why
    assert compare(labels, present, harmed, segments=shop, floor={"shop small": -0.5}).outcome == "pass"


def test_fairness_knows_its_answers():
    group = np.repeat(["a", "b", "c"], [4000, 4000, 20])
    chosen = np.concatenate([np.arange(4000) % 2 == 0, np.arange(4000) % 4 == 0, np.ones(20, bool)])
    found = rates(np.ones(8020), chosen, pd.DataFrame({"group": group}))
    ratios = found.rates[found.rates.kind == "selection_rate"].set_index("group").ratio
    assert ratios["a"] == 1 and ratios["b"] == pytest.approx(0.5) and np.isnan(ratios["c"])
    verdict = judge_fairness(found, Fairness(groups=["group"]))
    assert verdict.outcome == "fail" and "group b: selection rate ratio" in verdict.why
    equal = judge_fairness(rates(np.ones(8000), chosen[:8000], pd.DataFrame({"group": np.arange(8000) // 4 % 2})), Fairness(groups=["group"]))
    assert equal.outcome == "pass"


def test_right_probabilities_are_seldom_called_wrong():
    refused = 0
    for seed in range(40):
        chance = np.random.default_rng(seed)
        said = 1 / (1 + np.exp(-chance.normal(-1, 1, 4000)))
        found = calibrated((chance.random(4000) < said).astype(int), said)
        refused += judge_calibration(found, Calibration(error=0.03, slope=(0.8, 1.25)), 4000).outcome == "fail"
    assert at_most(refused, 40, 0.05)


@pytest.fixture
def loans(tmp_path):
    folder = tmp_path / "usecases" / "loans"
    folder.mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[aiexec]\nactor = ada\n")
    (folder / "contract.yaml").write_text("columns:\n  income: {type: float, minimum: 0}\n")
    (folder / "usecase.yaml").write_text("""\
name: loans
title: Whom to lend to
department: credit
owner: ada@example.org
risk: limited
success: [{metric: roc_auc, at_least: 0.6}]
value: {currency: EUR, true_positive: 90, false_positive: -300, false_negative: 0, true_negative: 0}
model:
  name: loans
  gate: {segments: [age], floor: -0.05, calibration: 0.1, fairness: {groups: [age]}, size_mb: 5, contract: contract.yaml}
""")
    return load_usecase("loans", load_settings(tmp_path)), open_ledger(load_settings(tmp_path))


def test_the_whole_rule_is_judged_and_kept_as_one_gate(loans):
    usecase, ledger = loans
    chance = np.random.default_rng(0)
    people = pd.DataFrame({"income": chance.gamma(4, 500, 3000), "age": np.where(chance.random(3000) < 0.4, "old", "young")})
    pays = (chance.random(3000) < 1 / (1 + np.exp(-(people.income - 1800) / 600))).astype(int)
    model = LogisticRegression().fit(people[["income"]], pays)
    version = register("loans", model, people[["income"]], metrics={}, trained_on={"columns": ["income"]}, ledger=ledger)
    said = model.predict_proba(people[["income"]])[:, 1]
    better = compare(pays, chance.random(3000), said, segments=people.age, floor=usecase.model.gate.floor)
    record = find_version("loans", version, ledger)
    rest, found = judge_rest(usecase, record, labels=pays, scores=said, features=people[["income"]], rows=people,
                             score=lambda rows: model.predict_proba(rows), chosen=said > 0.5, settings=ledger.settings)
    for _ in range(2):  # a page that is run twice
        record_gates(ledger, "loans", version, [better, *rest[:2]], against=None, usecase="loans", window="2024-05")
        record_findings(ledger, "loans", version, {"fairness": found["fairness"]}, usecase="loans", window="2024-05")
    kept = standing(gates("loans", version, ledger))
    assert {one["metric"]: one["outcome"] for one in kept} == {"roc_auc": "pass", "calibration": "pass", "fairness": "pass"}
    assert rest[2].outcome == "pass" and found["limits"]["size_mb"] < 5
    assert [event.kind for event in ledger.events() if event.kind.startswith(("gate.", "version.m"))] == ["gate.passed", "version.measured"]
    assert findings("loans", version, ledger)["fairness"]["body"]["rates"]
    assert not verify_chain(ledger).findings


def test_a_replay_counts_by_hand():
    size = 500
    said, hour = np.linspace(0, 1, size), np.arange(size) % 24
    log = pd.DataFrame({"prediction_id": [str(n) for n in range(size)], "at": "2026-11-23T10:15:00Z", "model": "m", "version": "1",
                        "role": "champion", "score": said, "hour": hour})
    beside = log.assign(version="2", role="shadow", score=1 - said)
    both = pd.concat([log, beside, beside.head(3)])  # a shadow's answer that stands twice counts once
    rows = shadowed(both, 2)
    found = replay(rows, WORTH, act=lambda _, scores: scores >= 0.75, segments=["hour", "nothing"], source="shadow")
    top = int((said >= 0.75).sum())
    assert found.flips == {"both": 0, "champion": top, "challenger": top, "neither": size - 2 * top}
    assert found.rows == found.segments.rows.sum() == found.steps.rows.sum() == size
    assert found.money["challenger"] == pytest.approx(-found.money["champion"])
    again = asked_again(both, lambda rows: rows.hour.to_numpy() / 24, ["hour"], most=100)
    assert len(again) == 100 and (again.challenger == again.hour / 24).all()


def test_a_rule_of_before_still_holds():
    assert Gate(beats="champion", segments=["carrier"]).floor == {}
    assert Gate(floor={"carrier": -0.02}).floor == {"carrier": -0.02}
