"""Where the sampler goes: near what is known to do, and by what an action did at other layers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from planted import Planted, search

from optimizer.search.surrogate.encoding import Encoding
from optimizer.search.surrogate.model import Design, Scales, Surrogate, Terms
from optimizer.search.surrogate.trust_region import TrustRegion

GENOMES = st.text("RFBSC", min_size=6, max_size=6)


def differing(first: str, second: str) -> int:
    return sum(a != b for a, b in zip(first.replace("C", "S"), second.replace("C", "S"), strict=True))


@given(st.lists(GENOMES, max_size=8), st.lists(GENOMES, min_size=1, max_size=4), st.integers(1, 6))
def test_only_genomes_near_a_good_one_are_kept(pool: list[str], good: list[str], radius: int) -> None:
    near = [each for each in pool if min(differing(each, other) for other in good) <= radius]
    assert TrustRegion(6, radius).within(pool, good) == near


def test_the_radius_follows_what_comes_of_batches() -> None:
    region, seen = TrustRegion(4), []
    for good in (
        [False] * 8,
        [False] * 7 + [True],
        [True, False],
        [False, True, False],
        [True] * 3,
        [True],
        [True],
        [True, *[False] * 2],
    ):
        region.learn(good)
        seen.append(region.radius)
    assert seen == [1, 1, 2, 2, 3, 4, 4, 4]


def test_the_sampler_stays_near_dense_where_every_step_does_harm() -> None:
    planted = Planted({(layer, letter): 0.9 for layer in range(12) for letter in "FS"}, layers=12)
    outcome = search(planted, "RFS", strategy="surrogate", seeds="none", trials=48, batch=8)
    changed = [12 - each.plan.count("R") for each in outcome.trials if "F" in each.plan or "S" in each.plan]
    assert max(changed[:8]) == 2  # nothing is known yet
    assert set(changed[8:20]) == {1}
    assert max(changed[20:]) == 2  # when no single step is left, no farther than must be


def test_what_an_action_does_to_some_layers_is_expected_of_it_at_others() -> None:
    encoding = Encoding(("RFS",) * 10)
    texts = ["R" * layer + letter + "R" * (9 - layer) for layer in (0, 1, 2, 3, 4, 7) for letter in "FS"]
    rows = encoding.encode(texts)
    known = Design(np.ones((len(rows), 1)), rows)
    harm = np.array([0.05, 1.0] * 6)
    model = Surrogate(Scales(), Terms(encoding, known, known), harm - harm.mean(), np.full(12, 1e-3))
    new = encoding.encode(["RRRRRSRRRR", "RRRRRFRRRR"])
    skip, freeze = model.mean(Terms(encoding, Design(np.ones((2, 1)), new), known))
    assert skip > 0.25 > -0.25 > freeze
