"""Show some of a job's samples as its model sees them, with the dense model's answers, before anything is run."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from optimizer.errors import UsageFault
from optimizer.job.inputs import load_job_task, model_source
from workers.errors import WorkersError

if TYPE_CHECKING:
    from optimizer.job.spec import JobSpec
    from workers.messages import ShownSample

STYLE = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto}img{max-width:24em;image-rendering:pixelated}"
STYLE += "pre{white-space:pre-wrap;background:#eee;padding:.5em}dt{font-weight:bold}"


def show(spec: JobSpec, count: int) -> tuple[ShownSample, ...]:
    """Load the model into this process, and ask it about samples spread over the search split.

    Raises UsageFault where task or model are not usable.
    """
    from workers.evaluation.plain import PlainEvaluator
    from workers.evaluation.shown import show as ask
    from workers.models.loading import load_model

    task = load_job_task(spec)
    parts = task.parts or (task,)
    shown: list[ShownSample] = []
    try:
        loaded = load_model(model_source(spec))
        for part in parts:
            whole, wanted = len(part.search), -(-count // len(parts))
            samples = [part.search[index] for index in sorted({number * whole // wanted for number in range(wanted)})]
            shown += ask(PlainEvaluator(loaded, part), samples, pictures=True)
        return tuple(shown)
    except WorkersError as error:
        raise UsageFault(str(error)) from None


def lines(sample: ShownSample) -> Iterator[tuple[str, str]]:
    """Yield what is shown of a sample: a heading, and its text."""
    yield "image", sample.image or "cannot be shown"
    yield "prompt", f"{sample.prompt!r}, {sample.prompt_tokens} tokens, {sample.vision_tokens} of them the image's"
    if sample.choices:
        yield "options", ", ".join(map(repr, sample.choices))
    yield "accepted", " or ".join(map(repr, dict.fromkeys(sample.accepted)))
    if sample.answer is None:
        yield "failed", sample.failure
        return
    cut = ", cut by answer.max_new_tokens" if sample.cut else ""
    yield "answer", f"{sample.answer!r}{cut}"
    yield "score", f"{sample.score:g}"


def page(title: str, samples: Sequence[ShownSample]) -> str:
    """Lay samples out as a self-contained HTML page, with their images after the processor."""
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>']
    parts.append(f"<style>{STYLE}</style><h1>{escape(title)}</h1>")
    for sample in samples:
        parts.append(f"<h2>Sample {escape(sample.id)}</h2>")
        if sample.picture:
            picture = b64encode(sample.picture).decode("ascii")
            parts.append(f'<img alt="the image as the model sees it" src="data:image/png;base64,{picture}">')
        items = "".join(f"<dt>{name}</dt><dd><pre>{escape(text)}</pre></dd>" for name, text in lines(sample))
        parts.append(f"<dl>{items}</dl>")
    return "\n".join(parts) + "</html>\n"
