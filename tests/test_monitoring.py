"Monitoring across its rooms: what is told, what cannot be told, and when it was known."

import json
import math

import numpy as np
import pandas as pd
import pytest

from aiexec.define.usecase import UseCase
from aiexec.monitor.alerts import alerts, follow
from aiexec.monitor.drift import by_chance, drift, psi, worst
from aiexec.monitor.performance import auc_interval, jackknife_interval, realised
from aiexec.monitor.profiles import Profile, merge, profile, profile_on
from aiexec.monitor.retrain import proposals, propose, settle
from aiexec.monitor.watch import drift_rows, judge, measurements, performance_rows, record, shift
from aiexec.settings import Settings
from aiexec.store import open_ledger

CHANCE = np.random.default_rng(20130401)


@pytest.fixture(autouse=True)
def the_same_chance_for_each_test():
    global CHANCE
    CHANCE = np.random.default_rng(20130401)


@pytest.fixture
def ledger(tmp_path):
    return open_ledger(Settings(tmp_path, actor="ada"))


def usecase(cool_down=1, breach="2 of 3", **lines):
    lines = lines or {"roc_auc": 0.6}
    return UseCase(
        name="late_orders", title="Warn of late orders", department="logistics", owner="ada@example.org", risk="minimal",
        success=[{"metric": name, "at_least": line} for name, line in lines.items()],
        value={"currency": "EUR", "true_positive": 5.0, "false_positive": -1.0, "false_negative": 0.0, "true_negative": 0.0},
        monitor={"breach": breach, "cool_down": cool_down},
    )


def batch(rows, shift=0.0, routes="AAAB"):
    return pd.DataFrame({"weight": CHANCE.normal(shift, 1, rows), "route": CHANCE.choice(list(routes), rows)})


def measure(ledger, figures, name="roc_auc", begin="2024-01"):
    for number, figure in enumerate(figures):
        record(ledger, "late_orders", shift(begin, number), "performance", [{"name": name, "value": figure}])


# --- the population stability index


def test_psi_by_hand():
    # (.5 - .3) ln(.5/.3) + (.3 - .5) ln(.3/.5) + 0 = 2 × .2 × .510826
    assert psi((30, 50, 20), (50, 30, 20)) == pytest.approx(0.2043302, abs=1e-7)
    # (.2 - .1) ln 2 + (.3 - .4) ln .75 + 0 = .069315 + .028768
    assert psi((10, 40, 50), (20, 30, 50)) == pytest.approx(0.0980829, abs=1e-7)


def test_psi_of_a_frame_by_hand():
    before = pd.DataFrame({"route": ["A"] * 3000 + ["B"] * 5000 + ["C"] * 2000})
    after = pd.DataFrame({"route": ["C"] * 2000 + ["B"] * 3000 + ["A"] * 5000})
    reference = profile(before)
    row = drift(reference, profile_on(after, reference)).iloc[0]
    assert row.psi == pytest.approx(0.2043302, abs=1e-7)
    assert row.verdict == "watch"
    assert row.expected == pytest.approx(2 * (1 / 10_000 + 1 / 10_000))


def test_psi_does_not_depend_on_size_or_direction():
    assert psi((30, 50, 20), (500, 300, 200)) == pytest.approx(psi((5, 3, 2), (300, 500, 200)))


def test_an_empty_cell_is_finite():
    found = psi((1000, 1000), (2000, 0))
    assert math.isfinite(found) and found > 0.25


def test_chance_explains_what_small_unchanged_samples_show():
    pairs = [(CHANCE.multinomial(200, [0.1] * 10), CHANCE.multinomial(200, [0.1] * 10)) for _ in range(2000)]
    found = [psi(*pair) for pair in pairs]
    expected, ceiling = by_chance((20,) * 10, (20,) * 10)
    assert np.mean(found) == pytest.approx(expected, rel=0.1)
    assert np.mean(np.array(found) > 0.1) > 0.25, "the bands alone would ring for nothing"
    assert np.mean(np.array(found) > ceiling) < 0.005


def test_unchanged_windows_are_quiet_and_a_real_drift_is_found():
    reference = profile(pd.DataFrame({f"c{i}": CHANCE.normal(size=20_000) for i in range(20)}))
    quiet, found = 0, 0
    for _ in range(20):
        window = pd.DataFrame({f"c{i}": CHANCE.normal(size=5000) for i in range(20)})
        quiet += worst(drift(reference, profile_on(window, reference))) == "none"
        window["c3"] += 0.6  # PSI about .33
        table = drift(reference, profile_on(window, reference))
        found += table.column[0] == "c3" and table.verdict[0] == "act"
    assert (quiet, found) == (20, 20)


# --- what cannot be told


REFERENCE = profile(batch(8000).assign(hub=1))
MONTH = batch(4000).assign(hub=1)
SHIFTED = batch(4000, shift=2.0).assign(hub=1)


@pytest.mark.parametrize("frame, column, reason", [
    (MONTH.iloc[:0], "weight", "has no rows"),
    (MONTH.iloc[:1], "weight", "Too few rows: 1 against 8,000"),
    (SHIFTED.iloc[:3], "weight", "Too few rows"),
    (MONTH.assign(weight=np.nan), "weight", "4,000 missing"),
    (MONTH.assign(weight=None), "weight", "4,000 missing"),
    (MONTH.assign(weight=np.inf), "weight", "4,000 infinite"),
    (MONTH, "hub", "never had another value"),
    (MONTH.drop(columns="weight"), "weight", "no such column"),
    (MONTH.rename(columns={"weight": "mass"}), "mass", "The reference has no such column"),
    (MONTH.assign(weight="heavy"), "weight", "kind number in the reference and is category now"),
])
def test_cannot_tell_with_a_reason(frame, column, reason):
    table = drift(REFERENCE, profile_on(frame, REFERENCE)).set_index("column")
    assert table.verdict[column] == "cannot tell"
    assert reason in table.why[column]


@pytest.mark.parametrize("frame", [MONTH.iloc[:0], MONTH.iloc[:1], MONTH.assign(weight=None), MONTH.drop(columns="weight")])
def test_a_window_that_cannot_be_told_is_not_well(frame):
    assert worst(drift(REFERENCE, profile_on(frame, REFERENCE))) == "cannot tell"


def test_no_reference():
    for reference in (None, profile(MONTH.iloc[:0])):
        table = drift(reference, profile(MONTH) if reference is None else profile_on(MONTH, reference))
        assert set(table.verdict) == {"cannot tell"} and worst(table) == "cannot tell"


def test_a_constant_that_moves_is_seen():
    table = drift(REFERENCE, profile_on(MONTH.assign(hub=2), REFERENCE)).set_index("column")
    assert table.verdict["hub"] == "act"


def test_a_number_that_freezes_is_seen():
    table = drift(REFERENCE, profile_on(MONTH.assign(weight=0.0), REFERENCE)).set_index("column")
    assert table.verdict["weight"] == "act"


def test_some_infinite_and_missing_values_are_left_out_and_said():
    frame = MONTH.copy()
    frame.loc[:39, "weight"] = np.inf
    table = drift(REFERENCE, profile_on(frame, REFERENCE)).set_index("column")
    assert table.verdict["weight"] == "none" and "40 infinite values left out" in table.why["weight"]
    frame.loc[:999, "weight"] = np.nan
    table = drift(REFERENCE, profile_on(frame, REFERENCE)).set_index("column")
    assert table.verdict["weight"] == "act" and "Without a usable value: 0.0% → 25.0%" in table.why["weight"]


def test_reordered_columns_and_rows_change_nothing():
    mixed = SHIFTED[["hub", "route", "weight"]].sample(frac=1, random_state=1)
    found, before = [drift(REFERENCE, profile_on(frame, REFERENCE)) for frame in (mixed, SHIFTED)]
    pd.testing.assert_frame_equal(found, before)


# --- profiles


def test_merging_pieces_gives_the_profile_of_the_whole():
    whole = batch(5000, routes="AABCD").assign(when=pd.date_range("2024-01-01", periods=5000, freq="h"))
    whole.loc[::7, "weight"] = np.nan
    whole.loc[::11, "route"] = None
    reference = profile(whole.sample(1000, random_state=1))
    pieces = [profile_on(whole.iloc[part::3], reference) for part in range(3)]
    assert merge(*pieces) == profile_on(whole, reference)
    assert merge(merge(pieces[2], pieces[0]), pieces[1]) == profile_on(whole, reference)


def test_a_piece_without_values_merges():
    frame = batch(100)
    reference = profile(frame)
    empty = profile_on(frame.assign(weight=None, route=None), reference)
    assert merge(profile_on(frame, reference), empty).columns["weight"].missing == 100


def test_a_profile_survives_json():
    stored = json.loads(json.dumps(REFERENCE.to_dict(), allow_nan=False))
    assert Profile.from_dict(stored) == REFERENCE


def test_quantile_cells_hold_every_row_once():
    values = pd.Series(CHANCE.poisson(1.2, 3000).astype(float))
    column = profile(pd.DataFrame({"n": values})).columns["n"]
    assert sum(column.counts) == 3000 and all(column.counts)
    assert column.counts[0] == (values <= column.cells[0]).sum()


# --- performance


def scored(rows=4000, skill=0.1):
    late = (CHANCE.random(rows) < 0.3).astype(float)
    score = np.clip(0.3 + skill * (late - 0.3) + 0.1 * CHANCE.normal(size=rows), 0, 1)
    ids = [f"p{n}" for n in range(rows)]
    return pd.DataFrame({"prediction_id": ids, "score": score}), pd.Series(late, ids)


def test_no_labels_one_class_one_row():
    frame, labels = scored()
    for case, reason in [(labels.iloc[:0], "None of 4,000"), (labels * np.nan, "None of 4,000"), (labels * 0, "Every label is 0"),
                         (labels.iloc[:1], "too few")]:
        found = realised(frame, case, ["roc_auc"])
        assert found.values["roc_auc"] == (None, None, None) and reason in found.why["roc_auc"]
        assert performance_rows(found, usecase().success)[0]["verdict"] == "cannot tell"


def test_the_auc_interval_agrees_with_a_bootstrap():
    from sklearn.metrics import roc_auc_score

    frame, labels = scored(800)
    truth, scores = labels.to_numpy(), frame.score.to_numpy()
    picks = CHANCE.integers(0, 800, (300, 800))
    spread = np.std([roc_auc_score(truth[pick], scores[pick]) for pick in picks])
    low, high = auc_interval(truth, scores)
    assert (low + high) / 2 == pytest.approx(roc_auc_score(truth, scores))
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.15)


def test_the_jackknife_covers_the_truth_as_often_as_it_says():
    covered = 0
    for _ in range(200):
        sample = CHANCE.exponential(1, 400)
        low, high = jackknife_interval(np.mean, (sample,))
        covered += low < 1 < high
    assert 180 <= covered <= 199


def test_days_that_share_their_luck_widen_the_interval_to_the_truth():
    covered = {None: 0, "day": 0}
    for _ in range(60):
        rate = np.repeat(CHANCE.uniform(0.1, 0.5, 30), 40)
        ids = pd.Index([f"p{n}" for n in range(1200)])
        frame = pd.DataFrame({"prediction_id": ids, "score": 0.3, "day": np.repeat(range(30), 40)})
        labels = pd.Series((CHANCE.random(1200) < rate).astype(float), ids)
        for together in covered:
            _, low, high = realised(frame, labels, ["brier"], together=together).values["brier"]
            covered[together] += low < 0.21 < high  # the mean of (label − .3)² at a mean rate of .3
    assert covered["day"] >= 52 > 48 >= covered[None]


def test_labels_join_by_id_and_not_by_place():
    frame, labels = scored()
    late_half = labels.sample(frac=0.5, random_state=3)
    found = realised(frame, late_half, ["brier"])
    known = frame.set_index("prediction_id").score[late_half.index]
    assert found.coverage == 0.5
    assert found.values["brier"][0] == pytest.approx(float(np.mean((known - late_half) ** 2)))


# --- judgements, alerts and proposals


def test_n_of_m_opens_one_alert_for_each_cause_and_closes_it(ledger):
    case = usecase(roc_auc=0.6, value_per_1000=400.0)
    measure(ledger, [0.66, 0.58, 0.57, 0.57, 0.65, 0.65, 0.65, 0.65])
    measure(ledger, [500, 500, 300, 300, 300, 300, 300, 300], "value_per_1000")
    for number in range(1, 9):
        follow(case, ledger, judge(case, ledger, shift("2024-01", number)))
    found = {alert["cause"]: (alert["opened"], alert["closed"], alert["status"]) for alert in alerts(ledger)}
    assert found == {"performance.roc_auc": ("2024-04", "2024-08", "closed"),
                     "performance.value_per_1000": ("2024-05", None, "open")}
    assert len(alerts(ledger)) == 2
    history = alerts(ledger, status="closed")[0]["history"]
    assert [line["what"] for line in history] == ["opened", "changed", "changed", "closed"]
    assert len({line["sentence"] for line in history}) == 4, "each says something new"


def test_a_single_missed_window_opens_nothing(ledger):
    case = usecase()
    measure(ledger, [0.66, 0.66, 0.5, 0.66, 0.66])
    verdicts = [judge(case, ledger, shift("2024-01", number)).verdict for number in range(1, 6)]
    assert verdicts == ["cannot tell", "none", "watch", "watch", "watch"]
    assert not alerts(ledger)


@pytest.mark.parametrize("cool_down, expected", [
    (0, ["2024-04", "2024-06", "2024-08", "2024-10", "2024-12"]),
    (1, ["2024-04", "2024-06", "2024-08", "2024-10", "2024-12"]),
    (2, ["2024-04", "2024-08", "2024-12"]),
    (6, ["2024-04", "2024-12"]),
])
def test_a_flapping_breach_gives_one_proposal_per_cool_down(ledger, cool_down, expected):
    case = usecase(cool_down=cool_down)
    for number in range(11):
        measure(ledger, [0.66 if number % 2 else 0.55], begin=shift("2024-01", number))
        window = shift("2024-02", number)
        made, why = propose(case, ledger, judge(case, ledger, window))
        assert why
        if made:
            settle(ledger, "late_orders", window, "refused", number)
    assert [made.window for made in proposals(ledger, "late_orders")] == expected


def test_a_lasting_breach_rests_between_proposals(ledger):
    case = usecase(cool_down=2)
    for number in range(9):
        measure(ledger, [0.55], begin=shift("2024-01", number))
        window = shift("2024-02", number)
        if propose(case, ledger, judge(case, ledger, window))[0]:
            settle(ledger, "late_orders", window, "refused", number)
    assert [made.window for made in proposals(ledger, "late_orders")] == ["2024-03", "2024-06", "2024-09"]


def test_the_same_breach_never_trains_twice(ledger):
    case = usecase(cool_down=0, breach="1 of 3")
    measure(ledger, [0.55, 0.66, 0.66])
    made = [propose(case, ledger, judge(case, ledger, window))[0] for window in ("2024-02",)]
    settle(ledger, "late_orders", "2024-02", "refused", 2)
    later = [propose(case, ledger, judge(case, ledger, window)) for window in ("2024-03", "2024-04")]
    assert made[0] and [proposal for proposal, _ in later] == [None, None]
    assert "same breach" in later[0][1]


def test_an_unsettled_proposal_holds_the_next(ledger):
    case = usecase(cool_down=0)
    measure(ledger, [0.55] * 6)
    assert propose(case, ledger, judge(case, ledger, "2024-03"))[0].status == "proposed"
    made, why = propose(case, ledger, judge(case, ledger, "2024-05"))
    assert made is None and "not settled yet: proposed" in why


def test_nothing_is_known_before_its_time(ledger):
    case = usecase()
    judged = {}
    for number, auc in enumerate([0.66, 0.58, 0.57, 0.66, 0.55]):
        measure(ledger, [auc], begin=shift("2024-01", number))
        window = shift("2024-02", number)
        judged[window] = judge(case, ledger, window)
        follow(case, ledger, judged[window])
        propose(case, ledger, judged[window])
    stood, asked = alerts(ledger), proposals(ledger, "late_orders")
    for window, before in judged.items():
        assert judge(case, ledger, window) == before
        follow(case, ledger, before)
        propose(case, ledger, before)
        known = measurements(ledger, "late_orders", "performance", until=shift(window, -case.monitor.delay_months))
        assert known.window.max() < window
    assert alerts(ledger) == stood and proposals(ledger, "late_orders") == asked


def test_performance_of_a_window_is_not_known_in_it(ledger):
    case = usecase(breach="1 of 1")
    measure(ledger, [0.5])
    assert judge(case, ledger, "2024-01").verdict == "cannot tell"
    assert judge(case, ledger, "2024-02").breach


def test_a_gap_is_neither_good_nor_bad(ledger):
    case = usecase()
    measure(ledger, [0.66])
    measure(ledger, [0.66], begin="2024-04")
    assert judge(case, ledger, "2024-05").verdict == "cannot tell"
    record(ledger, "late_orders", "2024-03", "performance", [{"name": "roc_auc", "value": float("nan")}])
    assert judge(case, ledger, "2024-05").verdict == "cannot tell"


def test_measured_again_counts_once(ledger):
    table = drift(REFERENCE, profile_on(SHIFTED, REFERENCE))
    for _ in range(2):
        record(ledger, "late_orders", "2024-01", "drift", drift_rows(table), version=3, run="r1")
    found = measurements(ledger, "late_orders", "drift")
    assert len(found) == len(table) and set(found.version) == {3}
    assert dict(zip(found.name, found.verdict)) == dict(zip(table.column, table.verdict))
    assert found.value[found.name == "weight"].iloc[0] == pytest.approx(table.psi[0])
