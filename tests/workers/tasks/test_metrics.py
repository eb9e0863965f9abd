from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.tasks.metrics import (
    METRICS,
    anls,
    can_still_score,
    exact_match,
    normalise_squad,
    normalise_vqa,
    token_f1,
    vqa_accuracy,
)

WORDS = st.sampled_from(
    [
        "A",
        "A.",
        "an",
        "?",
        "...",
        "The a",
        "red",
        "Red",
        "a circle",
        "two",
        "2",
        "yes.",
        "don't",
        "the",
        "1,000",
        "left of",
    ]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Worked by hand from the rules of the VQA evaluation code.
        ("A Red Circle", "red circle"),
        ("two", "2"),
        ("none", "0"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("it's", "it s"),
        ("dogs, cats", "dogs cats"),
        ("on the\ttable\n", "on table"),
        ("A", "a"),
        ("A.", "a"),
        ("(a)", "a"),
        ("the", "the"),
        ("The A", "the a"),
        ("a b", "b"),
        ("?", "?"),
        ("...", "..."),
        (" ", ""),
        ("what?", "what"),  # no space beside the mark: it becomes one, and splitting drops it
    ],
)
def test_vqa_normalisation(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


@given(st.text(max_size=30))
def test_normalised_text_has_single_spaces_and_no_articles_beside_other_words(text: str) -> None:
    words = normalise_vqa(text).split(" ")
    assert not {"a", "an", "the"} & set(words) or {"a", "an", "the"} >= set(words)
    assert normalise_vqa(text) == " ".join(words).strip()


@given(st.one_of(WORDS, st.text(max_size=20), st.text(alphabet="aAnthe .,?'", max_size=8)))
def test_a_normaliser_empties_no_text_and_an_empty_answer_is_never_right(text: str) -> None:
    if text.strip():
        assert normalise_vqa(text) and normalise_squad(text)
        for name, metric in METRICS.items():
            assert metric("", [text] * 4) == 0.0, name
            assert metric(text, [text] * 4) == 1.0, name


@pytest.mark.parametrize("name", sorted(METRICS))
def test_letters_are_told_apart(name: str) -> None:
    for right in "ABCDE":
        for given_letter in "ABCDE":
            assert METRICS[name](given_letter, [right] * 4) == float(given_letter == right)
            assert METRICS[name](given_letter.lower(), [right] * 4) == float(given_letter == right)
    if name != "anls":  # which compares characters
        assert METRICS[name]("A.", ["A"] * 4) == METRICS[name]("(A)", ["A"] * 4) == 1.0


TEXTS = st.text(alphabet="aAnthe b.,?'1", max_size=8)


@settings(max_examples=500)
@given(
    st.text(alphabet="aAnthe b.,?'1", max_size=8), st.lists(st.text(alphabet="aAnthe b.,?'1", min_size=1), min_size=4)
)
def test_scores_without_such_answers_are_those_of_the_published_rules(prediction: str, answers: list[str]) -> None:
    """The published rules: articles go in any case, so that a text of them alone is empty."""

    def vqa(text: str) -> str:
        kept = [word for word in normalise_vqa(text).split() if word not in ("a", "an", "the")]
        return "" if not any(map(str.isalnum, "".join(kept))) else " ".join(kept)

    if all(map(vqa, answers)):
        assert exact_match(prediction, answers) == float(vqa(prediction) in map(vqa, answers))


@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_exact_match_is_symmetric_in_the_answers(prediction: str, answers: list[str]) -> None:
    assert exact_match(prediction, answers) == exact_match(prediction, answers[::-1])
    assert exact_match(prediction, [*answers, prediction]) == 1.0


def test_exact_match_tells_words_apart() -> None:
    assert exact_match("The red circle.", ["red circle"]) == 1.0
    assert exact_match("red", ["green", "blue"]) == 0.0


@given(WORDS, st.lists(WORDS, min_size=10, max_size=10))
def test_vqa_accuracy_is_the_mean_over_all_nine_annotator_subsets(prediction: str, answers: list[str]) -> None:
    # The published definition: average of min(matches / 3, 1) over the ten subsets of nine annotators.
    given_answer = normalise_vqa(prediction)
    subsets = list(itertools.combinations([normalise_vqa(answer) for answer in answers], 9))
    expected = sum(min(subset.count(given_answer) / 3, 1) for subset in subsets) / len(subsets)
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)


def test_vqa_accuracy_refuses_too_few_annotators() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        vqa_accuracy("yes", ["yes"] * 3)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("a red circle left of a blue square", ["a red circle left of a blue square"], 1.0),
        ("a red circle", ["a blue circle"], 0.5),  # tokens red circle / blue circle: one of two each
        ("red red", ["red"], 2 * 0.5 * 1 / 1.5),
        ("green", ["red", "green square"], 2 * 1 * 0.5 / 1.5),  # the better answer counts
        ("", ["red"], 0.0),
        ("the", ["a"], 0.0),
        ("the", ["the"], 1.0),
        ("", ["the"], 0.0),
        ("a b", ["b"], 1.0),
        ("dog", ["cat"], 0.0),
    ],
)
def test_token_f1_by_hand(prediction: str, answers: list[str], expected: float) -> None:
    assert token_f1(prediction, answers) == pytest.approx(expected)


@given(st.sampled_from(sorted(METRICS)), st.text(max_size=20), st.lists(st.text(max_size=20), min_size=4, max_size=6))
def test_every_metric_stays_between_zero_and_one(name: str, prediction: str, answers: list[str]) -> None:
    assert 0.0 <= METRICS[name](prediction, answers) <= 1.0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Coca Cola ", ["coca cola"], 1.0),
        ("cola", ["colas"], 0.8),  # one edit in five
        ("kitten", ["sitting"], 1 - 3 / 7),  # the textbook pair: three edits
        ("abcd", ["abxy"], 0.0),  # two of four: not below the threshold
        ("abcd", ["abxy", "abce"], 0.75),
        ("", ["word"], 0.0),
    ],
)
def test_anls_by_hand(prediction: str, answers: list[str], expected: float) -> None:
    assert anls(prediction, answers) == pytest.approx(expected)


PIECES = st.sampled_from(
    ["A", "t", "th", "the", "two", "re", "red", "a", "an", "yes", "ten", "circ", "no", "1", "2", "x", *" \n.,:'-\"?"]
)
BEGINNINGS = st.lists(PIECES, min_size=1, max_size=6).map("".join)
ENDINGS = st.one_of(
    st.text(alphabet="redothwyes circle'.,:12 ", max_size=12), st.lists(PIECES, max_size=4).map("".join)
)
SCORING = st.lists(st.one_of(WORDS, BEGINNINGS), min_size=4, max_size=6)


@settings(max_examples=1_000)
@given(BEGINNINGS, ENDINGS, SCORING, st.booleans())
def test_what_cannot_score_any_more_never_does(beginning: str, ending: str, answers: list[str], rewarded: bool) -> None:
    if rewarded:  # the whole itself is an accepted answer, so it scores
        answers = [*answers, (beginning + ending).strip()]
    for name in ("exact_match", "vqa_accuracy"):
        if not can_still_score(name, beginning, answers):
            assert METRICS[name]((beginning + ending).strip(), answers) == 0.0


def test_hopeless_beginnings_are_seen_as_such() -> None:
    assert not can_still_score("exact_match", "gre", ["red"])
    assert can_still_score("exact_match", "r", ["red"])
    assert can_still_score("exact_match", "th", ["red"])  # "the red"
    assert can_still_score("exact_match", "tw", ["2"])  # "two"
    assert can_still_score("exact_match", "?", ["red"])
    assert can_still_score("exact_match", " no.", ["no"])
    assert can_still_score("exact_match", "no\nThe", ["no"])
    assert not can_still_score("exact_match", " no I", ["no"])
    assert not can_still_score("exact_match", "\nThe shape", ["rectangle"])
    assert can_still_score("exact_match", "The rect,ang", ["rectangle"])  # a later ", " removes every comma
    assert can_still_score("token_f1", "gre", ["red"])
