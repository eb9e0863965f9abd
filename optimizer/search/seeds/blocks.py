"""Blocks of layers to skip in compensated plans so that the least of the state stays unexplained.

``unexplained[k, j]`` is the share of the state behind layer ``j`` that the best linear map of layer ``k``'s MLP output
leaves unexplained: the predicted harm of skipping the layers ``k + 1 .. j`` with compensation (linear redundancy).
Harms of separate blocks are added up; under that the best plan of every size is found exactly, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from optimizer.search.space import COMPENSATED, RUN, Candidate, PlanSpace
from workers.redundancy.table import LayerTable

Unexplained = Mapping[tuple[int, int], float]
NAME = "linear_redundancy@"


def best_blocks(space: PlanSpace, unexplained: Unexplained) -> tuple[Candidate, ...]:
    """For 1, 2, 3, ... skipped layers the compensated plan of least summed unexplained share, where there is one."""
    layers = space.num_layers
    # best[skipped] at layer l: the least cost of the layers 0..l with l kept, and the genome that has it.
    kept: list[dict[int, tuple[float, str]]] = [{} for _ in range(layers)]
    final: dict[int, tuple[float, str]] = {}
    kept[0] = {0: (0.0, RUN)}
    for layer in range(layers):
        for skipped, (cost, genome) in kept[layer].items():
            _improve(final, skipped, cost, genome, layers)
            if layer + 1 < layers:
                _improve(kept[layer + 1], skipped, cost, genome + RUN, layer + 2)
            for last in range(layer + 1, layers):
                if COMPENSATED not in space.genome_letters[last]:
                    break
                share = unexplained.get((layer, last), math.inf)
                block = genome + COMPENSATED * (last - layer)
                if last + 1 == layers:
                    _improve(final, skipped + last - layer, cost + share, block, layers)
                else:
                    _improve(kept[last + 1], skipped + last - layer, cost + share, block + RUN, last + 2)
    found = [final[size][1] for size in sorted(final) if size > 0 and math.isfinite(final[size][0])]
    return tuple(space.candidate(genome) for genome in found if space.allows(genome))


def _improve(table: dict[int, tuple[float, str]], skipped: int, cost: float, genome: str, length: int) -> None:
    if len(genome) == length and (skipped not in table or cost < table[skipped][0]):
        table[skipped] = (cost, genome)


def unexplained_shares(table: LayerTable) -> dict[tuple[int, int], float]:
    """Return the linear redundancy of a table, by (kept layer, last skipped layer); empty when not measured.

    The rows are named ``linear_redundancy@n`` with n the length of the block, and stand at the kept layer before it.
    """
    return {
        (row.layer, row.layer + int(row.name.removeprefix(NAME))): row.value
        for row in table.rows
        if row.name.startswith(NAME)
    }
