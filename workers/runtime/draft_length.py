"""Choosing how many tokens to draft: from the observed acceptance, and the observed seconds of every kind of pass."""

from __future__ import annotations

import math
import threading
from bisect import bisect
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, median_low

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
FIRST_PROBE_SHARE = 0.01
"""The same of a usual answer's time, at a request's beginning."""
OTHERS_WEIGHT = 3.0
"""Positions of a request that count as much as all earlier requests."""
HALF_LIFE, LONG_HALF_LIFE = 24.0, 200.0
"""Positions after which an observed acceptance counts half, within a request and over requests."""
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
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024
"""Plain steps after rounds that did not; twice as many each time in a row."""
OUTLIER = 1.5
"""Seconds beyond so many times what is usual count as that: something else may have had the processor."""
REMEMBERED = 15
"""Observed seconds of each kind; their median counts."""


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
    tokens: int
    """Tokens of the round: a refused draft's place is taken by another token, but behind an answer's end is none."""
    draft_seconds: float
    verify_seconds: float
    confidences: tuple[float, ...] = ()
    """Per drafted position the drafter's confidence, where it is known."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole round."""
        return self.draft_seconds + self.verify_seconds


class Share:
    """How many of the last cases were so, each case counting less with every later one."""

    def __init__(self, share: float, cases: float, half_life: float) -> None:
        self._so, self._cases, self._half_life = share * cases, cases, half_life

    def add(self, so: int, cases: int) -> None:
        """Take note of cases."""
        forget = 0.5 ** (cases / self._half_life)
        self._so, self._cases = self._so * forget + so, self._cases * forget + cases

    def with_prior(self, share: float, weight: float) -> float:
        """Return the share, ``weight`` cases of another one counted in."""
        return (self._so + share * weight) / (self._cases + weight)

    @property
    def value(self) -> float:
        """The share of the cases that were so."""
        return self._so / self._cases


class PassTimes:
    """Observed seconds of a plain step, a draft step, and a verification of each width.

    Each is the median of the last observations, found when one comes in: lengths are chosen before every step.
    """

    def __init__(self) -> None:
        self._seen: dict[str | int, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        """By kind of step, verifications by width."""
        self._verify: dict[int, float] = {}
        self.plain = self.mean_plain = self.draft = 0.0
        """Seconds of a plain step, usual and mean, and of a draft step; 0.0 as long as none was timed."""
        self.token = 0.0
        """Seconds a token, of the last rounds and plain steps."""
        self.rounds = 0
        """Rounds since the last plain step."""
        self.one_more = 0.0
        """Seconds that one more drafted token costs, in draft and verification."""

    @property
    def plain_known(self) -> bool:
        """Whether a plain step was timed lately."""
        return len(self._seen["plain"]) >= FIRST_STEPS and self.rounds < ROUNDS_A_STEP

    def add_plain(self, seconds: float) -> None:
        """Take note of a plain step."""
        seen = self._seen["plain"]
        seen.append(seconds)
        self.plain = median_low(seen)
        self.mean_plain = fmean(min(each, OUTLIER * self.plain) for each in seen)
        self.rounds = 0
        self._note_speed(seconds)

    def add_round(self, seen: Round) -> None:
        """Take note of a round."""
        self._seen["draft"].append(seen.draft_seconds / seen.drafted)
        self.draft = median(self._seen["draft"])
        width = seen.drafted + 1
        self._seen[width].append(seen.verify_seconds)
        self._verify[width] = median(self._seen[width])
        least, most = min(self._verify), max(self._verify)
        wider = max(self._verify[most] - self._verify[least], 0.0) / (most - least) if most > least else 0.0
        self.one_more = self.draft + wider
        self.rounds += 1
        self._note_speed(seen.seconds / seen.tokens)

    def _note_speed(self, seconds: float) -> None:
        weight = SPEED_WEIGHT if self.token else 1.0
        self.token += weight * (seconds - self.token)

    def round(self, length: int) -> float:
        """Return the seconds of a round of ``length`` drafted tokens."""
        return length * self.draft + self._verification(length + 1)

    def _verification(self, width: int) -> float:
        """Return a verification's seconds; between and beyond observed widths they lie on a straight line."""
        if width in self._verify:
            return self._verify[width]
        known = {1: self.plain, **self._verify}
        below = max(each for each in known if each < width)
        above = [each for each in known if each > width]
        if above:
            share = (width - below) / (min(above) - below)
            return known[below] + share * (known[min(above)] - known[below])
        slope = (known[below] - known[1]) / (below - 1) if below > 1 else 0.1 * known[1]
        return known[below] + max(slope, 0.0) * (width - below)


class Judgement:
    """Compares what rounds took with plain steps for as many tokens, and pauses drafting where nothing was saved."""

    def __init__(self) -> None:
        self._rounds: list[tuple[float, int]] = []
        """Seconds and tokens of the rounds since the last judgement."""
        self._next, self._left = FIRST_PAUSE, 0
        """The next pause, and what is left of the present one, in plain steps."""

    def pauses(self) -> bool:
        """Whether the next step is part of a pause."""
        self._left = max(self._left - 1, -1)
        return self._left >= 0

    def add(self, seen: Round, times: PassTimes) -> None:
        """Take note of a round."""
        self._rounds.append((min(seen.seconds, OUTLIER * times.round(seen.drafted)), seen.tokens))
        if len(self._rounds) < JUDGED_ROUNDS:
            return
        took, tokens = (sum(column) for column in zip(*self._rounds, strict=True))
        self._rounds = []
        if took > tokens * times.mean_plain:
            self._left, self._next = self._next, min(2 * self._next, LONGEST_PAUSE)
        else:
            self._next = FIRST_PAUSE


class DraftLengths:
    """Learn what drafts cost and gain from the requests of one batch size; several threads may have some at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.times = PassTimes()
        self.judgement = Judgement()
        self.acceptance = Share(0.8, 8.0, LONG_HALF_LIFE)  # to begin with, drafting is worth some tries
        self.kept_at = [Share(each, 2.0, -math.log(2) / math.log(CONFIDENCE_MEMORY)) for each in CONFIDENT]
        """By class of confidence, the share of drafts that was kept."""
        self.watched = False
        """Whether drafts are looked at while they are made, and end where going on is not worth it."""
        self.answers: deque[int] = deque(maxlen=REMEMBERED)
        """Lengths of the last answers."""
        self.allowance = 0.0
        """Seconds that may go into looking whether drafting pays."""

    def request(self) -> RequestLengths:
        """Return the draft lengths of one request."""
        return RequestLengths(self)


class RequestLengths:
    """Draft lengths of one request: what it shows itself soon counts more than what others have shown."""

    def __init__(self, shared: DraftLengths) -> None:
        self._shared = shared
        self._own = Share(0.0, 0.0, HALF_LIFE)
        self._generated = 1
        """Tokens so far; the first one comes with the prompt."""
        self._fresh = True
        """Whether nothing was decided yet."""
        self._promising = False
        """Whether the last draft was accepted as a whole."""

    def choose(self, left: int) -> int:
        """Return how many tokens to draft now, 0 for a plain step; ``left`` is the most tokens that may still come."""
        limit = min(left - 1, LONGEST_DRAFT)
        shared = self._shared
        with shared.lock:
            if limit < 1 or not shared.times.plain_known:
                return 0
            if not shared.times.draft:
                return min(limit, FIRST_DRAFT)
            if shared.judgement.pauses():
                return 0
            best = self._best(limit)
            length = (limit if shared.watched else best) if best else self._probe(limit)
            self._fresh = False
            return length

    def worth_going_on(self, confidences: Sequence[float]) -> bool:
        """Whether another token is worth its cost, after tokens drafted with these confidences.

        It is of use only if all before it are kept, and then saves what a token costs otherwise.
        """
        shared = self._shared
        with shared.lock:
            if not shared.times.draft:
                return True
            so_far = math.prod(shared.kept_at[bisect(CONFIDENCES, each)].value for each in confidences)
            kept = so_far ** (1 + 1 / len(confidences))  # the next one as likely as those
            return kept * shared.times.token > shared.times.one_more

    def _best(self, limit: int) -> int:
        """Return the draft length with the most tokens a second, 0 where plain decoding is about as fast."""
        times = self._shared.times
        acceptance = self._own.with_prior(self._shared.acceptance.value, OTHERS_WEIGHT)
        longer = [answer - self._generated for answer in self._shared.answers if answer > self._generated]
        left = median(longer) if longer else limit  # a usual answer's end: no token comes behind it
        best, least = 0, (1 - LEAST_GAIN) * times.plain
        for length in range(1, limit + 1):
            seconds = times.round(length) / min(expected_tokens(acceptance, length), left)
            if seconds < least:
                best, least = length, seconds
        return best

    def _probe(self, limit: int) -> int:
        """Return a short draft's length where the last one was accepted, or there is time to look whether it pays."""
        shared, times = self._shared, self._shared.times
        length = min(limit, PROBE_LENGTH)
        cost = times.round(length) - times.plain
        if cost >= times.plain * length:
            return 0  # not even if every draft were accepted
        usual = median(shared.answers) * times.plain if shared.answers else 0.0
        if self._promising or (self._fresh and cost < FIRST_PROBE_SHARE * usual):
            return length
        shared.allowance = min(shared.allowance, 2 * cost)
        if shared.allowance < cost:
            return 0
        shared.allowance -= cost
        return length

    def observe_plain(self, seconds: float) -> None:
        """Take note of a plain step."""
        with self._shared.lock:
            self._generated += 1
            self._shared.times.add_plain(seconds)
            self._shared.allowance += PROBE_SHARE * seconds

    def observe_round(self, seen: Round) -> None:
        """Take note of a draft and its verification."""
        shared = self._shared
        with shared.lock:
            self._generated += seen.tokens
            shared.times.add_round(seen)
            shared.judgement.add(seen, shared.times)
            shared.acceptance.add(seen.accepted, seen.tested)
            self._own.add(seen.accepted, seen.tested)
            self._promising = seen.accepted == seen.drafted
            shared.watched = bool(seen.confidences)
            for place, confidence in enumerate(seen.confidences[: seen.tested]):
                shared.kept_at[bisect(CONFIDENCES, confidence)].add(place < seen.accepted, 1)

    def observe_answer(self, tokens: int) -> None:
        """Take note of the whole answer's length."""
        with self._shared.lock:
            self._shared.answers.append(tokens)
