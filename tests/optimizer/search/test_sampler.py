"""The surrogate against explicit Bayesian regression, and the sampler in a plain Optuna study."""

from itertools import combinations

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import problem_of, random_problem, search, small

from optimizer.job.sections import ConstraintSpec, SearchSpec
from optimizer.search.pareto import hypervolume
from optimizer.search.strategies.samplers import surrogate_sampler
from optimizer.search.strategies.study import distributions, genome_of
from optimizer.search.surrogate.encoding import Encoding
from optimizer.search.surrogate.loss_model import LossModel, Observations, Stairs
from optimizer.search.surrogate.model import Design, Scales, Surrogate, Terms
from optimizer.search.surrogate.moves import Moves

ENCODING = Encoding(("RS", "RFS", "RS", "RFS", "R", "RS"))


def random_texts(random, count, encoding=ENCODING):
    return ["".join(own[int(random.integers(len(own)))] for own in encoding.letters) for _ in range(count)]


def design_of(texts, encoding=ENCODING):
    rows = encoding.encode(texts)
    return Design(np.stack([np.ones(len(rows)), rows.sum(1)], axis=1), rows)


def test_encoding_has_one_column_per_layer_and_action():
    assert ENCODING.columns == ((0, "S"), (1, "F"), (1, "S"), (2, "S"), (3, "F"), (3, "S"), (5, "S"))
    assert ENCODING.encode(["SFRSRR"]).tolist() == [[1, 1, 0, 0, 0, 1, 0]]
    assert ENCODING.encode([]).shape == (0, 7)


def likeness(encoding):
    return np.array(
        [
            [(a == b) * (0.5 + 0.5 * np.exp(-abs(layer - other) / 3)) for other, b in encoding.columns]
            for layer, a in encoding.columns
        ]
    )


def explicit(design, scales, encoding=ENCODING):
    """Every basis, single and pair term as a column, scaled so that its weight's prior variance is 1."""
    columns = [scales.basis * column for column in design.basis.T]
    columns += [scales.single * column for column in design.rows.T]
    # A weight common to all layers of an action, and one that fades from layer to layer, by eigenvectors.
    values, vectors = np.linalg.eigh(likeness(encoding))
    columns += [
        scales.kin * np.sqrt(value) * design.rows @ vector for value, vector in zip(values, vectors.T, strict=True)
    ]
    for a, b in combinations(range(design.rows.shape[1]), 2):
        windows = sum(a in window and b in window for window in encoding.windows)
        scale = np.sqrt(scales.pair**2 + windows * scales.local**2)
        columns.append(scale * design.rows[:, a] * design.rows[:, b])
    return np.stack(columns, axis=1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_posterior_is_that_of_explicit_bayesian_regression(seed):
    random = np.random.default_rng(seed)
    scales = Scales(1.0, 0.5, 0.4, 0.2, 0.3, 0.1)
    seen, new = design_of(random_texts(random, 12)), design_of(random_texts(random, 9))
    values, noise = random.normal(size=12), random.uniform(0.01, 0.1, 12)
    model = Surrogate(scales, Terms(ENCODING, seen, seen), values, noise)
    between = Terms(ENCODING, new, seen)
    x, z = explicit(seen, scales), explicit(new, scales)
    weights = 1.0 / (noise + scales.misfit**2)
    precision = np.eye(x.shape[1]) + (x * weights[:, None]).T @ x
    mean = z @ np.linalg.solve(precision, (x * weights[:, None]).T @ values)
    np.testing.assert_allclose(model.mean(between), mean, atol=1e-5)

    draws = model.draws(np.ones(4000), ENCODING, seen, np.random.default_rng(1))(new, between)
    np.testing.assert_allclose(draws[0], mean, atol=1e-5)
    spread = np.sqrt(np.diag(z @ np.linalg.solve(precision, z.T)))
    np.testing.assert_allclose(draws[1:].std(axis=0), spread, rtol=0.1)
    np.testing.assert_allclose(draws[1:].mean(axis=0), mean, atol=5 * spread.max() / np.sqrt(4000))


def test_evidence_prefers_the_scales_that_made_the_values():
    random = np.random.default_rng(3)
    design = design_of(random_texts(random, 60))
    rows = explicit(design, Scales(0.0, 1.0, 0.0, 0.0, 0.0, 0.1))
    values = rows @ random.normal(size=rows.shape[1]) + 0.1 * random.normal(size=60)
    noise = np.zeros(60)
    terms = Terms(ENCODING, design, design)
    right = Surrogate(Scales(0.01, 1.0, 0.01, 0.01, 0.01, 0.1), terms, values, noise).evidence()
    wrong = Surrogate(Scales(0.01, 0.01, 0.01, 0.01, 0.01, 0.1), terms, values, noise).evidence()
    assert right > wrong + 10


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_gain_is_the_difference_of_hypervolumes(seed):
    random = np.random.default_rng(seed)
    front = [tuple(point) for point in random.uniform(0, 1.2, (int(random.integers(0, 8)), 2))]
    reference = (1.0, 1.0)
    new = random.uniform(-0.2, 1.3, (20, 2))
    gain = Stairs(front, reference).gain(new[:, 0], new[:, 1])
    before = hypervolume(front, reference)
    expected = [hypervolume([*front, tuple(point)], reference) - before for point in new]
    np.testing.assert_allclose(gain, expected, atol=1e-12)


def test_excess_is_negative_exactly_for_points_that_extend_the_front():
    stairs = Stairs([(0.5, 0.2), (0.7, 0.1)], (1.0, 0.4))
    above = stairs.excess(np.array([0.4, 0.5, 0.6, 0.8]), np.array([0.3, 0.25, 0.1, 0.15]))
    np.testing.assert_allclose(above, [-0.1, 0.05, -0.1, 0.05])


def test_kl_tells_plans_of_equal_accuracy_apart():
    """All losses seen are zero except of large KL; the model must still expect harm where KL grows."""
    random = np.random.default_rng(0)
    texts = random_texts(random, 40)
    design = design_of(texts)
    kl = (0.1 * design.rows.sum(1)) ** 2
    loss = np.where(kl > 0.15, 0.3, 0.0)
    error = np.full(40, 0.02)
    model = LossModel(ENCODING, Observations(design, loss, error, kl, 0.05 * kl + 1e-4), rounds=2)
    predicted = model.draws(np.ones(1), random)(design_of(["SSSSRS", "SRRRRR"]))[0]
    assert predicted[0] > 0.15 and abs(predicted[1]) < 0.05


def test_moves_stay_in_the_space_and_keep_what_they_promise():
    problem = problem_of(small(), "RFBS", compensations=("none", "linear x"), max_touched=6)
    space = problem.space
    moves = Moves(space.genome_letters, space.allows, np.random.default_rng(0))
    start = "RSFRSRRR"
    for near in moves.neighbours(start):
        assert space.allows(near)
        plain = near.replace("C", "S")
        assert sum(a != b for a, b in zip(plain, start, strict=True)) == 1 or near == start.replace("S", "C")
    for _ in range(200):
        swapped = moves.exchange(start)
        assert swapped is None or (space.allows(swapped) and sorted(swapped) == sorted(start))
        crossed = moves.cross(start, "RCCRRRBR")
        assert crossed is None or space.allows(crossed)
    assert moves.other_skip(start) == "RCFRCRRR" and moves.other_skip("RRFRRRRR") is None


def sampler_of(planted, seed=0, **fields):
    problem = problem_of(
        planted, spec=SearchSpec(seed=seed, **fields), constraint=ConstraintSpec(max_accuracy_drop=0.2)
    )
    return problem, surrogate_sampler(problem)


def optimise(seed, trials=30):
    planted = small()
    problem, sampler = sampler_of(planted, seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)

    def objective(trial):
        params = {name: trial.suggest_categorical(name, d.choices) for name, d in distributions(problem.space).items()}
        genome = genome_of(problem.space, params)
        return problem.ratio(problem.space.candidate(genome).plan), planted.harm(genome)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study.optimize(objective, n_trials=trials)
    return [genome_of(problem.space, trial.params) for trial in study.trials], study


def test_works_in_a_plain_optuna_study_without_our_attributes():
    genomes, study = optimise(seed=0)
    assert isinstance(study.sampler, optuna.samplers.BaseSampler)
    assert len(set(genomes)) == 30  # no plan twice
    assert "RRSRSRSR" in genomes
    assert optimise(seed=0)[0] == genomes != optimise(seed=1)[0]


def test_expected_gain_falls_as_the_front_fills():
    planted = small()
    problem, sampler = sampler_of(planted)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    gains = []
    for _ in range(12):
        trials = [study.ask(distributions(problem.space)) for _ in range(8)]
        gains.append(sampler.expected_gain)
        for trial in trials:
            genome = genome_of(problem.space, trial.params)
            study.tell(trial, (problem.ratio(problem.space.candidate(genome).plan), planted.harm(genome)))
    assert gains[1] is not None and max(gains[-2:]) < 0.2 * gains[1]


def test_a_parameter_of_another_kind_is_refused():
    _, sampler = sampler_of(small())
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    with pytest.raises(ValueError, match="width: this sampler proposes categorical parameters only"):
        study.ask({"width": optuna.distributions.FloatDistribution(0.0, 1.0)})


@pytest.mark.parametrize("cubed", [False, True])
def test_finds_more_than_random_search_on_fresh_instances(cubed):
    """Also where harms grow faster than any quadratic surrogate can say."""
    ahead = []
    for instance in range(2):
        volumes = []
        for strategy in ("surrogate", "random"):
            planted = random_problem(20, "RFS", 900 + instance, cubed=cubed)
            outcome = search(
                planted,
                "RFS",
                strategy=strategy,
                seeds="none",
                trials=48,
                rungs=(100,),
                constraint=ConstraintSpec(max_accuracy_drop=0.2),
            )
            volumes.append(hypervolume([trial.costs for trial in outcome.trials if trial.complete], (1.0, 0.2)))
        ahead.append(volumes[0] - volumes[1])
    assert min(ahead) > 0
