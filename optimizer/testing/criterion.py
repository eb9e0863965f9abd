"""Contract of criteria."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optimizer.criteria import Criterion
from optimizer.testing.require import made_up_table, require
from workers.errors import MeasurementError
from workers.redundancy.kinds import INTERVENTIONS, OPERATORS
from workers.redundancy.table import LayerTable

LAYERS = 5


def check_criterion(kind: Callable[..., Criterion]) -> None:
    """Check a criterion's class.

    - Without arguments it takes its own thresholds; those it reports can be given as keywords, and no others.
    - It says what it is called, whose it is, and which actions it was published for.
    - Its risk has a value of at least 0 for every action at every layer (leaving out a part of it may have none), and
      follows from the table alone.
    - Where a measurement that it needs is missing, it raises MeasurementError.
    """
    criterion = kind()
    letters, parts = ({action.letter for action in each} for each in (INTERVENTIONS, OPERATORS))
    require(bool(criterion.name and criterion.source), "a criterion names itself and its source")
    require(set(criterion.published_for) <= letters, f"published_for holds letters of actions, of {sorted(letters)}")
    given: dict[str, Any] = dict(criterion.thresholds)
    require(dict(kind(**given).thresholds) == given, "the thresholds that are reported can be given as keywords")
    try:
        kind(no_such_threshold=1.0)
    except TypeError:
        pass
    else:
        raise AssertionError("a threshold that does not exist is refused with TypeError")
    table = made_up_table(LAYERS)
    risk = criterion.risk(table)
    require(risk.criterion == criterion.name, "a risk names its criterion")
    require(letters <= set(risk.risk), f"there is a risk of every action: {', '.join(sorted(letters))}")
    require(set(risk.risk) <= letters | parts, f"a risk is of an action: {', '.join(sorted(letters | parts))}")
    require(all(len(values) == LAYERS for values in risk.risk.values()), "there is a risk for every layer")
    require(criterion.risk(table) == risk, "equal tables give equal risks")
    if criterion.needs:
        try:
            criterion.risk(LayerTable(LAYERS, ()))
        except MeasurementError:
            pass
        else:
            raise AssertionError("a table without the measurements that are needed is refused with MeasurementError")
