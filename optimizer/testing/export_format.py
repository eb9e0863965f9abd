"""Contract of export formats."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from optimizer.exports.interface import ExportFormat, Guide, Subject
from optimizer.testing.require import require
from workers.messages import NO_COMPENSATION
from workers.runtime.plan import LETTERS, SAVING_LETTERS, SkipPlan

PLANS = ("RRRR", *(text for letter in SAVING_LETTERS for text in (f"R{letter}RR", f"R{letter}{letter}R")), LETTERS)


def check_export_format(chosen: ExportFormat, subject: Subject | None = None) -> None:
    """Check an export format, and what it writes of ``subject`` where one is given.

    - It has a name for ``--format`` and a summary in one line.
    - It refuses a plan with a reason in one line, always the same; there is a plan that it takes.
    - What it says of its surroundings are lines of text.
    - It writes into an empty directory, beside which the document of the plan is put by the project; the model card's
      guide says how to use what was written.
    """
    require(chosen.name == chosen.name.strip().lower() != "", "the name is in lower case")
    require(bool(chosen.summary) and "\n" not in chosen.summary, "the summary is one line")
    refusals = []
    for text in PLANS:
        for compensation in (NO_COMPENSATION, "linear"):
            plan = SkipPlan.parse(text)
            reason = chosen.refusal(plan, compensation)
            require(reason == chosen.refusal(plan, compensation), "a plan is refused always or never")
            require(reason is None or (bool(reason) and "\n" not in reason), "a refusal says why in one line")
            refusals.append(reason)
    require(None in refusals, f"some plan is taken, of {', '.join(PLANS)} with and without compensation")
    require(all(isinstance(line, str) for line in chosen.check()), "check gives lines of text")
    if subject is None:
        return
    with TemporaryDirectory() as directory:
        chosen.write(subject, Path(directory))
        guide = chosen.guide(subject, Path(directory))
        require(isinstance(guide, Guide) and bool(guide.usage), "the guide says how to use what was written")
