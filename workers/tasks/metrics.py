"""Score answers: one function a metric, from a predicted text and the accepted answers to a score in [0, 1].

For tasks in which the model chooses among options: from an option and its log-likelihood to what it is worth.
"""

from __future__ import annotations

import hashlib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

from workers.registry import Registry

Metric = Callable[[str, Sequence[str]], float]

_VQA_PUNCTUATION = ";:/'[]\"()=+\\_><@`,?"
_VQA_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_VQA_ARTICLES = frozenset(("a", "an", "the"))
_VQA_CHANGED = (*_VQA_ARTICLES, *_VQA_NUMBERS)
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD_NOT_DECIMAL = re.compile(r"\.(?!\d)")

VQA_MINIMUM_ANSWERS = 4
"""Three matches among the answers of the *other* annotators need at least four answers."""


def normalise_vqa(text: str) -> str:
    """Normalise an answer by the rules of the VQA evaluation code (Antol et al. 2015, visualqa.org/evaluation).

    Lower case, number words to digits, no articles, no periods except decimal points, and a punctuation mark is
    removed where a space stands beside it (or the text holds a number such as 1,000) and becomes a space elsewhere.
    The published table of contractions is left out: it puts back apostrophes that the punctuation rule has removed
    before, so between two texts normalised here it cannot change whether they are equal.

    Unlike that code's, the rules empty no text: one of articles alone ("A", the letter of an option) keeps them, and
    one of punctuation alone keeps that.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    remove_all = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _VQA_PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or remove_all else " ")
    cleaned = _PERIOD_NOT_DECIMAL.sub("", cleaned)
    words = [_VQA_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join([word for word in words if word not in _VQA_ARTICLES] or words or text.lower().split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers after :func:`normalise_vqa`, else 0."""
    normalised = normalise_vqa(prediction)
    return float(any(normalised == normalise_vqa(answer) for answer in answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): mean over annotators of min(1, matches among the others / 3).

    Raises:
        ValueError: with fewer than four answers the rule cannot give 1.
    """
    if len(answers) < VQA_MINIMUM_ANSWERS:
        raise ValueError(f"vqa_accuracy needs at least {VQA_MINIMUM_ANSWERS} answers a question, not {len(answers)}")
    normalised = normalise_vqa(prediction)
    matches = [normalised == normalise_vqa(answer) for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def normalise_squad(text: str) -> str:
    """Normalise a text by the SQuAD v1.1 rules (Rajpurkar et al. 2016): case, punctuation, articles, white space.

    Unlike the published code's, they empty no text, as in :func:`normalise_vqa`.
    """
    lowered = "".join(character for character in text.lower() if character not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", lowered).split()
    return " ".join(words or lowered.split() or text.lower().split())


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Token-level F1 as in SQuAD v1.1 (Rajpurkar et al. 2016): the best over the accepted answers."""
    return max((_f1(normalise_squad(prediction).split(), normalise_squad(a).split()) for a in answers), default=0.0)


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


ANLS_THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648): the best over the accepted answers.

    1 - d with d the number of edits over the longer text's length, case and outer white space ignored; 0 where d is at
    least 0.5. Its mean over samples is the ANLS of DocVQA and ST-VQA.
    """
    return max((_similarity(prediction.strip().lower(), answer.strip().lower()) for answer in answers), default=0.0)


def _similarity(predicted: str, expected: str) -> float:
    longest = max(len(predicted), len(expected))
    if longest == 0:
        return 1.0
    distance = _edits(predicted, expected) / longest
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def _edits(first: str, second: str) -> int:
    """Levenshtein's distance: the least number of characters inserted, deleted or replaced."""
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, start=1):
        diagonal, row[0] = row[0], number
        for column, other in enumerate(second, start=1):
            kept = diagonal + (character != other)
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, kept)
    return row[-1]


_DECIDED_BY_VQA_RULES = ("exact_match", "vqa_accuracy")


def can_still_score(name: str, beginning: str, answers: Sequence[str]) -> bool:
    """Tell whether an answer that begins with this text could score above 0; True where that is not known.

    Sound for the metrics that compare texts after :func:`normalise_vqa`. It changes letters and digits in no other
    way than this: whole words are dropped (articles) or become digits (number words), periods may go, and words may be
    joined or parted where punctuation stands between them, which depends on what is still to come. So, with spaces
    left out, one of the texts that the beginning may become must be the beginning of a normalised answer.
    """
    start = beginning.lstrip().lower()
    if name not in _DECIDED_BY_VQA_RULES or not start.isascii():
        return True
    wanted = {normalise_vqa(answer).replace(" ", "") for answer in answers}

    def fits(text: str) -> bool:
        return any(each.startswith(text) for each in wanted)

    ways = {("", "")}  # the words so far, and the one that is not over
    for character in start:
        over = {(done + _vqa_word(word), "") for done, word in ways}
        if character.isspace():
            ways = over
        elif character in _VQA_PUNCTUATION:
            ways |= over
        elif character == ".":
            ways |= {(done, f"{word}.") for done, word in ways}
        else:
            ways = {(done, word + character) for done, word in ways}
        ways = {(done, word) for done, word in ways if fits(done)}
    return any(
        fits(done + becomes)
        for done, word in ways
        for becomes in (word, *(_vqa_word(whole) for whole in _VQA_CHANGED if whole.startswith(word)))
    )


def _vqa_word(word: str) -> str:
    return "" if word in _VQA_ARTICLES else _VQA_NUMBERS.get(word, word)


def checked(name: str, metric: Metric) -> Metric:
    """Wrap a user's metric to raise ValueError when a score is no number in [0, 1]."""

    @wraps(metric)
    def score(prediction: str, answers: Sequence[str]) -> float:
        found = float(metric(prediction, answers))
        if not 0.0 <= found <= 1.0:
            raise ValueError(f"metric {name} gave {found}; a score lies in [0, 1]")
        return found

    return score


ChoiceMetric = Callable[[float, str], float]
"""What an option is worth, from the log-likelihood of its tokens and its text; linear in the former."""


def multiple_choice(log_likelihood: float, option: str) -> float:
    """Return the option's log-likelihood itself (``acc`` of the Language Model Evaluation Harness, Gao et al. 2021)."""
    return log_likelihood


def multiple_choice_per_byte(log_likelihood: float, option: str) -> float:
    """Log-likelihood by the length of the option in bytes of UTF-8, so that long options are not at a disadvantage.

    The ``acc_norm`` of the Language Model Evaluation Harness (Gao et al. 2021) as its authors define it.
    """
    return log_likelihood / len(option.encode())


CHOICE_METRICS: dict[str, ChoiceMetric] = {
    "multiple_choice": multiple_choice,
    "multiple_choice_per_byte": multiple_choice_per_byte,
}
"""Metrics of tasks in which the model chooses: 1 where the right option is worth most, else 0."""

VERSIONS = {
    "exact_match": 2,
    "vqa_accuracy": 2,
    "token_f1": 2,
    "anls": 1,
    "multiple_choice": 1,
    "multiple_choice_per_byte": 1,
}
"""Versions of the metrics with their normalisers. One is raised when its metric scores any answer otherwise.

2: normalisers no longer empty a text.
"""

METRICS: Registry[Metric] = Registry(
    "skipplan.metrics",
    {"exact_match": exact_match, "vqa_accuracy": vqa_accuracy, "token_f1": token_f1, "anls": anls},
    adapt=checked,
)
"""The metrics a task file may name: the project's, and users' own from the entry point group."""


def metric_version(name: str) -> str:
    """Name the version of a metric: of a user's own, a hash of the file that it is defined in.

    Raises UnknownNameError.
    """
    if name in VERSIONS:
        return str(VERSIONS[name])
    file = getattr(sys.modules.get(METRICS[name].__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
