"""Measurements of layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


TOKEN_GROUPS = ("vision", "text", "all")


@dataclass(frozen=True)
class MeasureRedundancy:
    """Measure ``kinds`` over ``samples[:n_samples][shard::shards]`` of the calibration split (None: all).

    ``kinds`` are names of ``workers.redundancy.kinds.KINDS``.
    """

    kinds: tuple[str, ...]
    shard: int
    shards: int
    n_samples: int | None = None


@dataclass(frozen=True)
class KindSums:
    """Sums of one kind of measurement over one shard.

    ``added`` arrays are summed when shards are merged, ``gathered`` ones laid end to end along their first axis (a row
    per sample; only states of single tokens are small enough for that). ``refused`` says why a layer has none.
    """

    added: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    gathered: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RedundancySums:
    """Sums of every kind over one shard of the calibration split, and the layer executions they cost."""

    num_layers: int
    samples: int
    kinds: dict[str, KindSums]
    layer_executions: dict[str, float]
    """Decoder layers run, times samples, by the pass that ran them: answers, states, attention, propagation, ...

    A run over a prompt is 1, one over more or fewer tokens counts by their number."""
    notes: tuple[str, ...] = ()
    failed_samples: dict[str, str] = field(default_factory=dict)
    """Samples that were left out, and why."""

    @property
    def forward_passes(self) -> dict[str, float]:
        """Forward passes per sample, by pass: layer executions over those of one dense pass of all samples."""
        whole = max(1, self.samples * self.num_layers)
        return {name: executions / whole for name, executions in self.layer_executions.items()}
