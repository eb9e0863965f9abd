"""Every registered strategy, criterion, export format and engine keeps its contract, and a breach of it is named."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from export_builders import document

from optimizer.criteria import Risk
from optimizer.exports.interface import ExportFormat, Guide, Subject, takes_everything
from optimizer.job.sections import SearchSpec
from optimizer.registries import CRITERIA, EXPORT_FORMATS, STRATEGIES
from optimizer.search.problem import Ask, PlanList, Problem
from optimizer.search.space import Candidate
from optimizer.testing import check_criterion, check_engine, check_export_format, check_strategy
from workers.engines.interface import ENGINES
from workers.messages import ModelSource
from workers.redundancy.table import LayerTable
from workers.runtime import SkipPlan


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy(name: str) -> None:
    check_strategy(STRATEGIES[name])


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion(name: str) -> None:
    check_criterion(CRITERIA[name])
    assert CRITERIA[name]().name == name


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_export_format(name: str) -> None:
    chosen = EXPORT_FORMATS[name]
    # The formats that need a model's files or weights are written in tests/optimizer/exports.
    subject = Subject(document("RSRR"), ModelSource("m"), None, None, None) if not chosen.needs_model else None
    check_export_format(chosen, subject)
    assert chosen.name == name


@pytest.mark.parametrize("name", ENGINES)
def test_engine(name: str) -> None:
    """What it is; tests/workers/engines serves a model with each that is installed."""
    check_engine(ENGINES[name])
    assert ENGINES[name].name == name


class Random(PlanList):
    """Not deterministic: where it begins depends on what was made before."""

    made = 0

    def __init__(self, problem: Problem) -> None:
        Random.made += 1
        texts = ["RRRRS", "RRRSR", "RRSRR"]
        super().__init__([Candidate(SkipPlan.parse(texts[Random.made % 3]))], problem, "random")


class Elsewhere(PlanList):
    def ask(self, count: int) -> list[Ask]:
        return [Ask(Candidate(SkipPlan.parse("S" * 3)))]


def test_a_strategys_breach_is_named() -> None:
    with pytest.raises(AssertionError, match="equal problems"):
        check_strategy(Random)
    with pytest.raises(AssertionError, match="of the problem's space"):
        check_strategy(lambda problem: Elsewhere((), problem, "elsewhere"))
    with pytest.raises(AssertionError, match="something is evaluated"):
        check_strategy(lambda problem: PlanList((), problem, "nothing"))


class Careless:
    name, source, needs, published_for = "careless", "a test", ("distance",), "S"

    @property
    def thresholds(self) -> dict[str, float]:
        return {}

    def risk(self, table: LayerTable) -> Risk:
        return Risk(self.name, {"S": (0.0,) * table.num_layers})


def test_a_criterions_breach_is_named() -> None:
    with pytest.raises(AssertionError, match="a risk of every action: B, F, S"):
        check_criterion(Careless)


def test_a_formats_breach_is_named() -> None:
    def guide(subject: Subject, directory: Path) -> Guide:
        return Guide("", ())

    mute = ExportFormat("mute", "nothing", "nothing", takes_everything, lambda subject, path: None, guide)
    subject = Subject(document("RSRR"), ModelSource("m"), None, None, None)
    with pytest.raises(AssertionError, match="says how to use"):
        check_export_format(mute, subject)


def test_a_job_can_name_a_strategy_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'surrogate'.*'exhaustive'"):
        SearchSpec(strategy="mine")
    point = EntryPoint("mine", "my_methods:mine", STRATEGIES.group)
    monkeypatch.setattr("workers.registry.entry_points", lambda group, name=None: [point])
    assert SearchSpec(strategy="mine").strategy == "mine"
