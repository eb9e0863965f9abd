"""Choosing how many tokens to draft: from the observed acceptance, and the observed seconds of every kind of pass."""

from __future__ import annotations

import math
import threading
from bisect import bisect
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

LONGEST_DRAFT = 12
FIRST_STEPS = 2
"""Plain steps timed before the first draft."""
ROUNDS_A_STEP = 12
"""Rounds after which a plain step is timed again."""
FIRST_DRAFT = 4
"""Length of a draft when nothing is known of drafting yet."""
PROBE_LENGTH = 3
PROBE_SHARE = 0.01
"""Share of the time of plain decoding that may go into looking whether drafting pays again."""
HALF_LIFE = 24.0
"""Positions after which an observed acceptance counts half."""
CONFIDENCES = (0.4, 0.6, 0.75, 0.9, 0.97)
"""Bounds of the classes of confidence."""
CONFIDENT = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
"""Chance that a draft of each class is kept, before anything was observed."""
CONFIDENCE_MEMORY = 0.98
SPEED_WEIGHT = 0.1
LEAST_GAIN = 0.05
"""Share of a token's time that drafting must promise to save."""
JUDGED_ROUNDS = 12
"""Rounds after which it is judged whether they have saved anything."""
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024
"""Plain steps after rounds that did not; twice as many each time in a row."""
REMEMBERED = 15
"""Observed seconds of each kind; their median counts."""


def _seconds() -> deque[float]:
    return deque(maxlen=REMEMBERED)


def expected_tokens(acceptance: float, length: int) -> float:
    """Return the tokens that a round of ``length`` drafted ones gives on average (2211.17192, equation 1)."""
    if acceptance >= 1.0:
        return length + 1.0
    return float((1.0 - acceptance ** (length + 1)) / (1.0 - acceptance))


@dataclass(frozen=True)
class Round:
    """A draft of one batch and its verification."""

    drafted: int
    """Positions drafted."""
    tested: int
    """Positions that were decided with a draft, up to the first one refused in any row, or the answers' end."""
    accepted: int
    """Positions at which all rows kept the draft."""
    draft_seconds: float
    verify_seconds: float
    confidences: tuple[float, ...] = ()
    """Per drafted position the drafter's confidence, where it is known."""


class DraftLength:
    """What was observed with one batch size, and the draft length that it speaks for. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agreed, self._tested = 6.4, 8.0  # to begin with, drafting is worth some tries
        self._kept_at = [[2 * each, 2.0] for each in CONFIDENT]
        """Per class of confidence the drafts kept and tested, forgotten like acceptance."""
        self._watched = False
        """Whether drafts are looked at while they are made, and end where going on is not worth it."""
        self._token_seconds = 0.0
        """Seconds a token, of the last rounds and plain steps."""
        self._plain = _seconds()
        self._draft = _seconds()
        self._verify: dict[int, deque[float]] = defaultdict(_seconds)
        self._rounds = 0
        """Rounds since the last plain step."""
        self._allowance = 0.0
        """Seconds that may go into looking whether drafting pays."""
        self._judged: list[tuple[float, int]] = []
        """Seconds and tokens of the rounds since the last judgement."""
        self._pause, self._paused = FIRST_PAUSE, 0
        """The next pause, and what is left of the present one, in plain steps."""
        self._promising = False
        """Whether the last draft was accepted as a whole."""

    def choose(self, left: int) -> int:
        """Return how many tokens to draft now, 0 for a plain step; ``left`` is the most tokens that may still come."""
        limit = min(left - 1, LONGEST_DRAFT)
        with self._lock:
            if limit < 1 or len(self._plain) < FIRST_STEPS or self._rounds >= ROUNDS_A_STEP:
                return 0
            if not self._draft:
                return min(limit, FIRST_DRAFT)
            if self._paused:
                self._paused -= 1
                return 0
            best = self._best(limit)
            return limit if best and self._watched else best or self._probe(limit)

    def worth_going_on(self, confidences: Sequence[float]) -> bool:
        """Whether another token is worth its draft step, after tokens drafted with these confidences.

        It is of use only if all before it are kept, and then saves what a token costs otherwise.
        """
        with self._lock:
            if not self._draft or not self._plain:
                return True
            so_far = math.prod(self._chance(each) for each in confidences)
            kept = so_far ** (1 + 1 / len(confidences))  # the next one as likely as those
            return kept * self._token_seconds > median(self._draft) + self._seconds_a_width()

    def _chance(self, confidence: float) -> float:
        """Return how often drafts of about this confidence were kept."""
        kept, tested = self._kept_at[bisect(CONFIDENCES, confidence)]
        return kept / tested

    def _best(self, limit: int) -> int:
        """Return the draft length with the most tokens a second, 0 where plain decoding is about as fast."""
        plain, acceptance = median_low(self._plain), self._agreed / self._tested
        best, least = 0, (1 - LEAST_GAIN) * plain
        for length in range(1, limit + 1):
            seconds = self._round_seconds(length) / expected_tokens(acceptance, length)
            if seconds < least:
                best, least = length, seconds
        return best

    def _round_seconds(self, length: int) -> float:
        return length * median(self._draft) + self._verify_seconds(length + 1)

    def _verify_seconds(self, width: int) -> float:
        """Seconds of a dense pass over ``width`` tokens, between and beyond observed widths on a straight line."""
        known = {1: median_low(self._plain)} | {each: median(seen) for each, seen in self._verify.items()}
        if width in known:
            return known[width]
        below = max(each for each in known if each < width)
        above = [each for each in known if each > width]
        if above:
            share = (width - below) / (min(above) - below)
            return known[below] + share * (known[min(above)] - known[below])
        slope = (known[below] - known[1]) / (below - 1) if below > 1 else 0.1 * known[1]
        return known[below] + max(slope, 0.0) * (width - below)

    def _seconds_a_width(self) -> float:
        """Seconds that one more token adds to a verification."""
        known = {width: median(seen) for width, seen in self._verify.items()}
        least, most = min(known), max(known)
        if least == most:
            return 0.0
        return max(known[most] - known[least], 0.0) / (most - least)

    def _probe(self, limit: int) -> int:
        """Return a short draft's length where the time for looking is there, or the last one was accepted."""
        length = min(limit, PROBE_LENGTH)
        cost = self._round_seconds(length) - median_low(self._plain)
        if cost >= median_low(self._plain) * length:
            return 0  # not even if every draft were accepted
        self._allowance = min(self._allowance, 2 * cost)
        if not self._promising:
            if self._allowance < cost:
                return 0
            self._allowance -= cost
        return length

    def observe_plain(self, seconds: float) -> None:
        """Take note of a plain step."""
        with self._lock:
            self._plain.append(seconds)
            self._rounds = 0
            self._allowance += PROBE_SHARE * seconds
            self._note_speed(seconds)

    def observe_round(self, seen: Round) -> None:
        """Take note of a draft and its verification."""
        with self._lock:
            self._rounds += 1
            forget = 0.5 ** (seen.tested / HALF_LIFE)
            self._agreed = self._agreed * forget + seen.accepted
            self._tested = self._tested * forget + seen.tested
            self._draft.append(seen.draft_seconds / seen.drafted)
            self._verify[seen.drafted + 1].append(seen.verify_seconds)
            self._promising = seen.accepted == seen.drafted
            self._note_speed((seen.draft_seconds + seen.verify_seconds) / (seen.accepted + 1))
            self._judge(seen)
            self._watched = bool(seen.confidences)
            for place, confidence in enumerate(seen.confidences[: seen.tested]):
                row = self._kept_at[bisect(CONFIDENCES, confidence)]
                row[0] = row[0] * CONFIDENCE_MEMORY + (place < seen.accepted)
                row[1] = row[1] * CONFIDENCE_MEMORY + 1

    def _judge(self, seen: Round) -> None:
        """Pause drafting where the last rounds took longer than plain steps for as many tokens.

        A round counts three times what it should have taken at most: something else may have had the processor.
        """
        seconds = min(seen.draft_seconds + seen.verify_seconds, 3 * self._round_seconds(seen.drafted))
        self._judged.append((seconds, seen.accepted + 1))
        if len(self._judged) < JUDGED_ROUNDS:
            return
        took, tokens = (sum(column) for column in zip(*self._judged, strict=True))
        self._judged = []
        if took > tokens * median(self._plain):
            self._paused, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        else:
            self._pause = FIRST_PAUSE

    def _note_speed(self, seconds: float) -> None:
        weight = SPEED_WEIGHT if self._token_seconds else 1.0
        self._token_seconds += weight * (seconds - self._token_seconds)
