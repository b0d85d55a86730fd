"""Scored files whose answer is known, judged by the command `aiexec performance`."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression, Ridge

from aiexec.cli.watching import performance

BAD = ("watch", "act")


def asked(*words: object, code: int = 0) -> dict:
    """What the command prints as plain data."""
    done = CliRunner().invoke(performance, [*map(str, words), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def written(folder: Path, name: str, table: pd.DataFrame) -> Path:
    """A file of the folder."""
    path = folder / name
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def loans(rows: int, seed: int, months: int = 12, rule: float = 1.0, share: float = -1.0) -> pd.DataFrame:
    """Loans over time, with the score of a model that knew the rule; `rule` other than 1 turns it (concept drift)."""
    rng = np.random.default_rng(seed)
    income, debt = rng.normal(size=rows), rng.normal(size=rows)
    chance = 1 / (1 + np.exp(-(share + rule * (1.2 * income - 1.5 * debt))))
    known = 1 / (1 + np.exp(-(-1.0 + 1.2 * income - 1.5 * debt)))
    at = pd.Timestamp("2023-01-01") + pd.to_timedelta(np.sort(rng.integers(0, months * 30 * 86400, rows)), unit="s")
    return pd.DataFrame({"id": [f"L{seed}-{i}" for i in range(rows)], "at": at, "income": income, "debt": debt,
                         "region": rng.choice(["north", "south"], rows), "score": known, "bad": (rng.random(rows) < chance).astype(int)})


GOOD = loans(8000, 1)
CASES = {
    "as good": (loans(5000, 2), ("none",)),
    "concept drift, inputs stable": (loans(5000, 2, rule=0.1), ("act",)),
    "turned round": (loans(5000, 2, rule=-1.0), ("act",)),
    "labels by chance": (loans(5000, 2).assign(bad=np.random.default_rng(1).integers(0, 2, 5000)), ("act",)),
    "label shift alone": (loans(5000, 2, share=1.0), BAD),
    "constant score": (loans(5000, 2).assign(score=0.3), ("act",)),
    "few rows, as good": (loans(60, 2), ("none", "cannot tell")),
    "few labels": (loans(5000, 2).assign(bad=lambda table: table.bad.where(table.index % 20 == 0)), ("none", "cannot tell", "watch")),
    "no labels, as good": (loans(5000, 2).assign(bad=np.nan), ("none",)),
    "one class": (loans(5000, 2).assign(bad=0), (*BAD, "cannot tell")),
    "one row": (loans(1, 2), ("cannot tell",)),
}


@pytest.mark.parametrize("name", CASES)
def test_classification_against_good_days(name, tmp_path):
    table, verdicts = CASES[name]
    told = asked(written(tmp_path, "s.csv", table), "--reference", written(tmp_path, "r.csv", GOOD), "--target", "bad", "--score", "score")
    [window] = told["windows"]
    assert told["verdict"] in verdicts and window["verdict"] == told["verdict"], (told["verdict"], window["why"], window["metrics"])
    assert window["why"] and window["coverage"] == pytest.approx(table.bad.notna().mean())
    if table.bad.isna().any():
        assert "label" in window["why"]


@pytest.mark.parametrize("form", ["words", "truths", "percent", "decisions", "negated"])
@pytest.mark.parametrize("broken", [False, True])
def test_labels_and_scores_in_other_forms(form, broken, tmp_path):
    tables, words = [GOOD, loans(5000, 2, rule=-0.3 if broken else 1.0)], []
    for number, table in enumerate(tables):
        forms = {"words": lambda t: t.assign(bad=np.where(t.bad == 1, "default", "paid")), "truths": lambda t: t.assign(bad=t.bad == 1),
                 "percent": lambda t: t.assign(score=100 * t.score), "decisions": lambda t: t.assign(score=(t.score > 0.5).astype(int)),
                 "negated": lambda t: t.assign(bad=np.where(t.bad == 1, "yes", "no"))}
        tables[number] = forms[form](table)
    words = ["--positive", "default"] if form == "words" else []
    told = asked(written(tmp_path, "s.csv", tables[1]), "--reference", written(tmp_path, "r.csv", tables[0]), "--target", "bad", "--score", "score", *words)
    assert told["verdict"] in (("act",) if broken else ("none",)), (told["windows"][0]["why"], told["windows"][0]["metrics"])
    brier = told["windows"][0]["metrics"].get("brier")
    assert brier is None or 0 <= brier["value"] <= 1


def test_a_month_when_the_world_turned(tmp_path):
    table = loans(24_000, 3)
    turned = table["at"] >= "2023-09-28"
    other = loans(24_000, 3, rule=-0.5)
    table["bad"] = table.bad.where(~turned, other.bad)
    told = asked(written(tmp_path, "s.parquet", table), "--target", "bad", "--score", "score", "--time", "at", "--every", "month")
    verdicts = {window["window"]: window["verdict"] for window in told["windows"]}
    assert told["verdict"] == "act" and verdicts["2023-10"] == "act" and verdicts["2023-11"] == "act"
    assert {verdict for window, verdict in verdicts.items() if window < "2023-09"} == {"none"}, verdicts


def test_late_labels_by_id_are_said_to_be_late(tmp_path):
    table = loans(12_000, 5)
    labels = table[["id", "bad"]][table["at"] < "2023-11-01"]
    strange = pd.DataFrame({"id": ["X1", "X2", "X3"], "bad": [0, 1, 0]})
    told = asked(written(tmp_path, "s.csv", table.drop(columns="bad")), "--labels", written(tmp_path, "l.csv", pd.concat([labels, strange])), "--on", "id",
                 "--target", "bad", "--score", "score", "--time", "at")
    windows = {window["window"]: window for window in told["windows"]}
    assert told["strangers"] == 3 and told["verdict"] == "none"
    assert windows["2023-11"]["coverage"] == 0 and "No label has come" in windows["2023-11"]["why"]
    estimate = windows["2023-11"]["metrics"]["roc_auc"]
    assert estimate["value"] is None and estimate["by"] == "estimated" and estimate["estimated_low"] < estimate["reference"] < estimate["estimated_high"]
    assert told["record"]["roc_auc"]["windows"] >= 5 and told["record"]["roc_auc"]["within"] >= 0.8


def test_early_labels_are_not_taken_for_all(tmp_path):
    table = loans(12_000, 5)
    early = (table["at"] >= "2023-10-01") & (table.bad == 0)
    told = asked(written(tmp_path, "s.csv", table.assign(bad=table.bad.where(~early | (table.index % 9 == 0)))), "--target", "bad", "--score", "score", "--time", "at")
    late = [window for window in told["windows"] if window["window"] >= "2023-10"]
    assert all("may be special" in window["why"] and window["verdict"] != "act" for window in late)


@pytest.mark.parametrize("broken, verdicts", [(0.0, ("none",)), (3.0, ("act",))])
def test_regression(broken, verdicts, tmp_path):
    rng = np.random.default_rng(2)

    def houses(rows: int, more: float) -> pd.DataFrame:
        size, age = rng.gamma(9, 12, rows), rng.integers(0, 90, rows)
        price = 3 * size - 0.8 * age + rng.normal(0, 20, rows)
        return pd.DataFrame({"size": size, "age": age, "price": price + more * rng.normal(0, 60, rows), "predicted": 3 * size - 0.8 * age})

    good, now = houses(5000, 0), houses(3000, broken)
    now.loc[::17, "price"] = np.nan
    told = asked(written(tmp_path, "s.csv", now), "--reference", written(tmp_path, "r.csv", good), "--target", "price", "--score", "predicted")
    assert told["verdict"] in verdicts, told["windows"][0]["why"]
    assert told["windows"][0]["metrics"]["mean_absolute_error"]["value"] > 0


def test_an_imbalanced_target(tmp_path):
    good, same, worse = loans(40_000, 1, share=-5.5), loans(20_000, 2, share=-5.5), loans(20_000, 3, share=-5.5, rule=0.0)
    for table in (good, same, worse):
        table["score"] = 1 / (1 + np.exp(-(-5.5 + 1.2 * table.income - 1.5 * table.debt)))
    reference = written(tmp_path, "r.csv", good)
    for table, verdicts in ((same, ("none",)), (worse, ("act",))):
        told = asked(written(tmp_path, "s.csv", table), "--reference", reference, "--target", "bad", "--score", "score")
        assert told["verdict"] in verdicts, (told["windows"][0]["why"], told["windows"][0]["metrics"])


def test_real_models_on_real_halves(tmp_path):
    data = load_breast_cancer(as_frame=True).frame.sample(frac=1, random_state=0)
    thirds = [data.iloc[part::3] for part in range(3)]
    names = [name for name in data if name != "target"][:4]
    model = LogisticRegression(max_iter=2000).fit(thirds[0][names], thirds[0].target)
    one, other = [third.assign(score=model.predict_proba(third[names])[:, 1]) for third in thirds[1:]]
    reference = written(tmp_path, "r.csv", one)
    told = asked(written(tmp_path, "s.csv", other), "--reference", reference, "--target", "target", "--score", "score")
    assert told["verdict"] in ("none", "cannot tell"), told["windows"][0]["why"]
    told = asked(written(tmp_path, "s.csv", other.assign(score=1 - other.score)), "--reference", reference, "--target", "target", "--score", "score")
    assert told["verdict"] == "act"
    ridge = Ridge().fit(thirds[0][names[1:]], thirds[0][names[0]])
    one, other = [third.assign(said=ridge.predict(third[names[1:]])) for third in thirds[1:]]
    told = asked(written(tmp_path, "s.csv", other), "--reference", written(tmp_path, "r.csv", one), "--target", names[0], "--score", "said")
    assert told["verdict"] in ("none", "cannot tell"), told["windows"][0]["why"]


@pytest.mark.parametrize("change, words, sentence", [
    (lambda table: table.head(0), [], "has no rows"), (lambda table: table.drop(columns="score"), [], "no column 'score'"),
    (lambda table: table.assign(score="high"), [], "holds no numbers"), (lambda table: table.assign(score=np.nan), [], "holds no numbers"),
    (lambda table: table.assign(bad="maybe"), [], "The labels are"), (lambda table: table, ["--metric", "rocauc"], "rocauc"),
    (lambda table: table, ["--time", "when"], "no column 'when'"), (lambda table: table, ["--on", "id"], "belong together"),
    (lambda table: table, ["--threshold", "nan"], "threshold"), (lambda table: table, ["--metric", "value_per_1000"], "value"),
])
def test_a_question_without_sense_is_refused(change, words, sentence, tmp_path):
    told = asked(written(tmp_path, "s.csv", change(loans(500, 2))), "--reference", written(tmp_path, "r.csv", GOOD), "--target", "bad", "--score", "score",
                 *words, code=1)
    assert sentence in json.dumps(told) and "Unexpected" not in json.dumps(told), told


@pytest.mark.parametrize("labels, sentence", [
    (pd.DataFrame({"id": ["L2-1", "L2-1"], "bad": [0, 1]}), "there twice"), (pd.DataFrame({"key": ["L2-1"], "bad": [0]}), "no column 'id'"),
])
def test_labels_that_contradict_are_refused(labels, sentence, tmp_path):
    told = asked(written(tmp_path, "s.csv", loans(500, 2).drop(columns="bad")), "--reference", written(tmp_path, "r.csv", GOOD), "--target", "bad",
                 "--score", "score", "--labels", written(tmp_path, "l.csv", labels), "--on", "id", code=1)
    assert sentence in json.dumps(told)


def test_a_reference_without_labels_tells_nothing(tmp_path):
    told = asked(written(tmp_path, "s.csv", loans(500, 2)), "--reference", written(tmp_path, "r.csv", GOOD.assign(bad=np.nan)), "--target", "bad",
                 "--score", "score", code=1)
    assert "0 labels" in json.dumps(told)


def test_where_a_drop_lies_and_what_it_costs(tmp_path):
    table, turned = loans(20_000, 3), loans(20_000, 3, rule=-1.0)
    hit = (table["at"] >= "2023-09-01") & (table.region == "north")
    table["bad"] = table.bad.where(~hit, turned.bad)
    told = asked(written(tmp_path, "s.csv", table), "--target", "bad", "--score", "score", "--time", "at", "--worth=-10,-10,-100,0", "--currency", "USD")
    windows = {window["window"]: window for window in told["windows"]}
    reason = windows["2023-10"]["reasons"][0]
    assert (reason["column"], reason["segment"]) == ("region", "north") and reason["share"] > 0.7 and reason["now"] > reason["before"]
    assert windows["2023-05"]["reasons"] == []
    worth = windows["2023-10"]["worth"]
    assert worth["lost_per_week"] > 0 and worth["low"] > 0 and worth["currency"] == "USD" and worth["by"] == "realised"
    assert worth["lost_per_week"] == pytest.approx(worth["lost_per_1000"] * windows["2023-10"]["rows"] / 1000 / (365.25 / 12) * 7)


def test_a_window_of_one_class_in_words_is_read_as_the_whole(tmp_path):
    table = loans(6000, 3)
    words = pd.Series(np.where(table.bad == 1, "default", "paid")).where(table["at"] < "2023-11-01", "paid")
    told = asked(written(tmp_path, "s.csv", table.assign(bad=words)), "--target", "bad", "--score", "score", "--time", "at", "--positive", "default")
    assert told["windows"][-1]["metrics"]["roc_auc"]["value"] is None and told["windows"][-1]["metrics"]["brier"]["value"] is not None


def test_truths_with_gaps_minus_one_and_margins(tmp_path):
    for number, (bad, score) in enumerate(((lambda t: (t.bad == 1).astype(object).where(t.index % 7 > 0), lambda t: t.score),
                                           (lambda t: 2 * t.bad - 1, lambda t: t.score), (lambda t: 2 * t.bad - 1, lambda t: np.log(t.score / (1 - t.score))))):
        tables = [table.assign(bad=bad, score=score) for table in (GOOD, loans(4000, 2))]
        told = asked(written(tmp_path, "s.csv", tables[1]), "--reference", written(tmp_path, "r.csv", tables[0]), "--target", "bad", "--score", "score")
        assert told["verdict"] == "none" and told["windows"][0]["metrics"]["roc_auc"]["value"] > 0.8, (number, told["windows"][0]["why"])
        assert ("brier" in told["windows"][0]["metrics"]) == (number < 2)
