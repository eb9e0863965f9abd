"""Keep what engines took to serve published plans, beside dense in the same engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from sqlalchemy import ScalarSelect, delete, insert, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage.errors import InvalidValue
from storage.records.described import check_ranges, described
from storage.schema import EngineLatencyRow, PlanRow


@dataclass(frozen=True, kw_only=True)
class EngineLatency:
    """Latency of a plan in an engine at one concurrency, medians over requests in seconds."""

    engine: str = described("The engine's name: vllm, llama.cpp, ...")
    version: str
    dtype: str = described("Of weights and activations")
    concurrency: int = described("Requests in flight at once", ge=1)
    rounds: int = described("Pairs of rounds, dense and plan in turns", ge=1)
    speedup: float = described("Dense seconds / plan seconds of the same requests, the median over pairs", gt=0)
    speedup_low: float
    speedup_high: float
    first_token_seconds: float = described("Time to first token", ge=0)
    dense_first_token_seconds: float = described(ge=0)
    seconds_per_token: float | None = described(
        "Of each token after the first; null where there is none", default=None, ge=0
    )
    dense_seconds_per_token: float | None = described(default=None, ge=0)
    latency_seconds: float = described("Of a whole request", gt=0)
    dense_latency_seconds: float = described(gt=0)
    requests_per_second: float = described("Throughput", gt=0)
    dense_requests_per_second: float = described(gt=0)
    kv_cache_bytes: int | None = described(
        "Memory for keys and values that dense and plan were served with; null where the engine does not say",
        default=None,
        ge=0,
    )
    kv_cache_tokens: int | None = described("Tokens that fit into it", default=None, ge=0)
    dense_kv_cache_tokens: int | None = described(default=None, ge=0)

    def check(self, subject: str) -> None:
        """Refuse figures that cannot be true. Raises ``InvalidValue`` naming ``subject`` and the field."""
        check_ranges(self, f"{subject} in {self.engine}")
        if self.speedup_low > self.speedup_high:
            raise InvalidValue(f"{subject} in {self.engine}: speedup_low is above speedup_high")


_NAMES = tuple(each.name for each in fields(EngineLatency))


def write(session: Session, latencies: Mapping[int, Sequence[EngineLatency]]) -> None:
    """Write latencies by the plan's id, in the place of all that the plans had before."""
    session.execute(delete(EngineLatencyRow).where(EngineLatencyRow.plan_id.in_(list(latencies))))
    rows = [{"plan_id": plan} | asdict(each) for plan, measured in latencies.items() for each in measured]
    if rows:
        session.execute(insert(EngineLatencyRow), rows)


def of_plans(session: Session, plan_ids: Sequence[int]) -> dict[int, tuple[EngineLatency, ...]]:
    """Read the latencies of plans by their ids, ordered by engine, version and concurrency."""
    query = (
        select(EngineLatencyRow)
        .where(EngineLatencyRow.plan_id.in_(plan_ids))
        .order_by(EngineLatencyRow.engine, EngineLatencyRow.version, EngineLatencyRow.concurrency)
    )
    found: dict[int, tuple[EngineLatency, ...]] = {}
    for row in session.scalars(query.execution_options(populate_existing=True)):
        latency = EngineLatency(**{name: getattr(row, name) for name in _NAMES})
        found[row.plan_id] = (*found.get(row.plan_id, ()), latency)
    return found


def known(session: Session) -> list[tuple[str, int]]:
    """List the engines that served published plans, each with the concurrencies that were measured."""
    query = select(EngineLatencyRow.engine, EngineLatencyRow.concurrency).distinct()
    return sorted((engine, concurrency) for engine, concurrency in session.execute(query))


def figure(column: InstrumentedAttribute[float], engine: str, concurrency: int) -> ScalarSelect[float]:
    """Return a figure of the plan at hand in an engine, of its last version, as part of a query of ``PlanRow``."""
    return (
        select(column)
        .where(
            EngineLatencyRow.plan_id == PlanRow.id,
            EngineLatencyRow.engine == engine,
            EngineLatencyRow.concurrency == concurrency,
        )
        .order_by(EngineLatencyRow.id.desc())
        .limit(1)
        .correlate(PlanRow)
        .scalar_subquery()
    )
