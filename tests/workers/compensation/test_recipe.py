import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.compensation.recipe import SOURCES, WEIGHTINGS, CompensationError, Recipe
from workers.runtime.gaps import SCOPES

recipes = st.builds(
    Recipe,
    kind=st.just("linear"),
    ridge=st.floats(min_value=1e-300, max_value=1e300),
    weighting=st.sampled_from(WEIGHTINGS),
    tokens=st.integers(1, 10**9),
    seed=st.integers(0, 2**32 - 1),
    source=st.just("pruned"),
    drift=st.booleans(),
    scope=st.sampled_from(SCOPES),
) | st.builds(Recipe, kind=st.just("linear"), source=st.sampled_from(SOURCES))


@given(recipes)
def test_the_text_is_read_back_as_the_same_recipe(recipe: Recipe) -> None:
    assert Recipe.parse(recipe.text) == recipe
    assert Recipe.parse(recipe.text).text == recipe.text
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@given(recipes, st.randoms())
def test_settings_may_stand_in_any_order(recipe: Recipe, random) -> None:
    kind, *settings = recipe.text.split()
    random.shuffle(settings)
    assert Recipe.parse(" ".join([kind, *settings])).text == recipe.text


def test_the_canonical_texts() -> None:
    assert Recipe().text == "none"
    assert Recipe(kind="linear").text == "linear ridge=0.001 weighting=answers tokens=16384"
    assert Recipe.parse("linear").text == Recipe(kind="linear").text
    assert Recipe.parse(" linear  drift=yes seed=0 ").text.endswith("tokens=16384 drift=yes")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "starts with one of none, linear"),
        ("affine", "not 'affine'"),
        ("none ridge=1.0", "none takes no settings"),
        ("linear ridge", "'ridge' is no setting"),
        ("linear rigde=1", "'rigde=1' is no setting"),
        ("linear ridge=1 ridge=2", "ridge is given twice"),
        ("linear ridge=much", "ridge is a number, not 'much'"),
        ("linear ridge=nan", "ridge must be a number above 0"),
        ("linear ridge=0", "ridge must be a number above 0"),
        ("linear tokens=1.5", "tokens is a whole number"),
        ("linear tokens=0", "tokens must be a whole number above 0"),
        ("linear bias=yes", "'bias=yes' is no setting"),
        ("linear weighting=heavy", "weighting is one of uniform, answers"),
        ("linear source=sparse", "source is one of pruned, dense"),
        ("linear seed=-1", "seed must be a whole number"),
        ("linear scope=all", "scope is one of output, projection, not 'all'"),
        ("linear drift=often", "drift is yes or no"),
        ("linear source=dense drift=yes", "drift needs source pruned"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(CompensationError) as caught:
        Recipe.parse(text)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_reading_a_recipe_needs_no_torch() -> None:
    script = "import sys; from workers.compensation.recipe import Recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
