"""Files whose answer is known, made by others than the library's own pages, judged by the command `aiexec drift`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from tests.conftest import aiexec
from sklearn.datasets import load_breast_cancer, load_wine, make_classification

from aiexec.cli.watching import drift

DRIFTED = ("watch", "act")


def asked(folder: Path, *words: object, code: int = 0) -> dict:
    """What the command prints as plain data."""
    done = CliRunner().invoke(drift, [*map(str, words), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def written(folder: Path, name: str, table: pd.DataFrame) -> Path:
    """A file of the folder: CSV or Parquet by its name."""
    path = folder / name
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def orders(rows: int, seed: int) -> pd.DataFrame:
    """A table as shops have it: numbers of many shapes, categories, truths, keys, moments, long texts, constants."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "order_id": np.arange(rows) + 1_000_000 * seed,
        "reference": [f"{number:032x}" for number in rng.integers(0, 2**62, rows)],
        "ordered_at": (pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(rng.integers(0, 90 * 86400, rows)), unit="s")
                       + pd.Timedelta(days=90 * seed)).strftime("%Y-%m-%d %H:%M:%S"),
        "age": rng.integers(18, 80, rows), "amount": rng.lognormal(3, 1.2, rows).round(2), "balance": rng.standard_t(2, rows),
        "items": rng.poisson(2, rows), "weight": np.where(rng.random(rows) < 0.1, np.nan, rng.gamma(2, 3, rows)),
        "country": rng.choice(["DE", "FR", "US", "GB", "IT"], rows, p=[0.4, 0.2, 0.2, 0.1, 0.1]),
        "city": [f"city {number}" for number in rng.zipf(1.6, rows) % 500], "member": rng.random(rows) < 0.3,
        "rating": rng.integers(1, 6, rows), "currency": "EUR", "version": 3,
        "remark": [None if blank else f"remark {number}" for blank, number in zip(rng.random(rows) < 0.5, rng.integers(0, 10**9, rows))]})


@dataclass(frozen=True)
class Known:
    """A pair of tables and what is true of them."""

    change: Callable[[pd.DataFrame, np.random.Generator], pd.DataFrame]
    drifted: set = field(default_factory=set)  # columns; all others have not
    verdicts: tuple = DRIFTED  # of the whole
    says: str = ""  # a word of the reason
    others: set = field(default_factory=set)  # columns of which either may be said


def replaced(table: pd.DataFrame, chosen: np.ndarray, **values: object) -> pd.DataFrame:
    """The table with other values in the chosen rows."""
    return table.assign(**{name: table[name].where(~chosen, value) for name, value in values.items()})


KNOWN = {
    "unchanged": Known(lambda table, rng: table, verdicts=("none",)),
    "reordered": Known(lambda table, rng: table[table.columns[::-1]].sample(frac=1, random_state=0), verdicts=("none",)),
    "shifted": Known(lambda table, rng: table.assign(age=table.age + 12), {"age"}, ("act",)),
    "scaled": Known(lambda table, rng: table.assign(amount=table.amount * 3), {"amount"}, ("act",)),
    "unit": Known(lambda table, rng: table.assign(weight=table.weight * 1000), {"weight"}, ("act",)),
    "wider": Known(lambda table, rng: table.assign(balance=table.balance * 3), {"balance"}, ("act",)),
    "swapped": Known(lambda table, rng: table.assign(country=table.country.replace({"DE": "IT", "IT": "DE"})), {"country"}, ("act",)),
    "new category": Known(lambda table, rng: replaced(table, rng.random(len(table)) < 0.1, country="ES"), {"country"}, DRIFTED, "ES"),
    "vanished category": Known(lambda table, rng: table.assign(country=table.country.replace({"US": "GB"})), {"country"}, ("act",)),
    "missing": Known(lambda table, rng: replaced(table, rng.random(len(table)) < 0.4, amount=np.nan), {"amount"}, ("act",), "usable"),
    "filled": Known(lambda table, rng: table.assign(weight=table.weight.fillna(table.weight.median())), {"weight"}, DRIFTED),
    "zeros for missing": Known(lambda table, rng: table.assign(weight=table.weight.fillna(0)), {"weight"}, DRIFTED),
    "all missing": Known(lambda table, rng: table.assign(age=np.nan), {"age"}, ("act",)),
    "constant now": Known(lambda table, rng: table.assign(rating=3), {"rating"}, ("act",)),
    "constant moved": Known(lambda table, rng: table.assign(version=4), {"version"}, ("act",)),
    "text constant moved": Known(lambda table, rng: table.assign(currency="USD"), {"currency"}, ("act",)),
    "truth": Known(lambda table, rng: table.assign(member=rng.random(len(table)) < 0.6), {"member"}, ("act",)),
    "counts": Known(lambda table, rng: table.assign(items=rng.poisson(4, len(table))), {"items"}, ("act",)),
    "ratings": Known(lambda table, rng: table.assign(rating=rng.choice([1, 2, 3, 4, 5], len(table), p=[.5, .2, .1, .1, .1])), {"rating"}, ("act",)),
    "two": Known(lambda table, rng: table.assign(age=table.age + 12, country="DE"), {"age", "country"}, ("act",)),
    "gone": Known(lambda table, rng: table.drop(columns="age"), {"age"}, ("act",), "gone"),
    "renamed": Known(lambda table, rng: table.rename(columns={"age": "Age"}), {"age"}, ("act",), "gone", {"Age"}),
    "extra": Known(lambda table, rng: table.assign(colour="red"), others={"colour"}, verdicts=("none",)),
    "texts for numbers": Known(lambda table, rng: table.assign(age=[f"{age} years" for age in table.age]), {"age"}, ("act",)),
    "infinite": Known(lambda table, rng: replaced(table, rng.random(len(table)) < 0.4, balance=np.inf), {"balance"}, ("act",), "usable"),
    "clipped": Known(lambda table, rng: table.assign(amount=table.amount.clip(upper=30)), {"amount"}, ("act",)),
    "texts": Known(lambda table, rng: table.assign(city=[f"town {number}" for number in rng.integers(0, 500, len(table))]), {"city"}, ("act",)),
    "new keys": Known(lambda table, rng: table.assign(order_id=rng.permutation(len(table)) + 77_000_000), verdicts=("none",)),
    "upper case": Known(lambda table, rng: table.assign(country=table.country.str.lower()), {"country"}, ("act",), "de"),
    "spread out, no shift": Known(lambda table, rng: table.sample(frac=0.4, random_state=1), verdicts=("none",)),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("name", KNOWN)
def test_one_changed_column_among_stable_ones(name, ending, tmp_path):
    case = KNOWN[name]
    reference = written(tmp_path, f"reference.{ending}", orders(6000, 1))
    current = written(tmp_path, f"current.{ending}", case.change(orders(5000, 2), np.random.default_rng(9)))
    told = asked(tmp_path, reference, current)
    [window] = told["windows"]
    found = {column for column, of in window["columns"].items() if of["verdict"] in DRIFTED}
    shown = {column: (of["verdict"], of["why"]) for column, of in window["columns"].items()} | {"*": window["multivariate"]["why"]}
    assert found - case.others == case.drifted, shown
    assert told["verdict"] in case.verdicts and told["verdict"] == window["verdict"], (told["verdict"], shown)
    assert all(case.says in window["columns"][column]["why"] for column in case.drifted), shown
    for of in window["columns"].values():
        assert {"kind", "psi", "statistic", "p", "missing", "verdict", "why"} <= set(of)
        assert of["verdict"] in ("none", "watch", "act", "cannot tell") and of["why"].endswith((".", "?"))
