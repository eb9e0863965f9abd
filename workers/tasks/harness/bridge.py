"""Read a task of lmms-eval and score answers to it, in lmms-eval's own environment.

Run by path (``python -I bridge.py``): it imports nothing of this project. Every line of standard input is a request, a
JSON object; every line of standard output a reply, with ``error`` where it could not be done. ``workers/tasks/harness``
has the other end:

    {"open": {"task": NAME, "include": DIRECTORY or null}}        what the task is
    {"read": {"images": DIRECTORY, "limit": N or null}}           a ``sample`` a line, then ``end``
    {"score": {"document": N, "hash": HASH, "answer": TEXT}}      the answer's scores by metric

What tasks print goes to standard error.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

MODEL_NAME = "skipplan"
"""Under which a YAML may have prompts of its own (``lmms_eval_specific_kwargs``)."""
DEFAULT_NEW_TOKENS = 1024
"""Most tokens of an answer where the task names none, as of the harness's own models."""
NOT_A_STOP = "\n\n"
"""The harness adds it to ``until`` by itself, and its own models leave it out."""
SEED = 1234
"""Of examples in prompts: the harness's default."""
JUDGES = (
    "lmms_eval.llm_judge",
    "lmms_eval.verifiers.gemini",
    "lmms_eval.verifiers.openai",
    "openai",
    "anthropic",
    "google.generativeai",
    "requests",
    "httpx",
    "urllib3",
    "dashscope",
)
"""Modules through which a score would be asked of another model or machine."""
NO_ANSWER = "-"


class Refused(Exception):  # noqa: N818
    """A task that cannot be used, with the reason."""


def main() -> None:
    """Answer requests until there are no more."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task: HarnessTask | None = None
    for line in sys.stdin:
        ((kind, request),) = json.loads(line).items()
        try:
            if kind == "open":
                task = HarnessTask.named(**request)
                _reply(replies, task.described())
            elif task is None:
                raise Refused("no task is open")
            elif kind == "read":
                for sample in task.samples(Path(request["images"]), request["limit"]):
                    _reply(replies, {"sample": sample})
                _reply(replies, {"end": True})
            else:
                _reply(replies, {"scores": task.score(**request)})
        except Exception as error:  # tasks are programs, and raise all kinds
            _reply(replies, {"error": str(error) if isinstance(error, Refused) else _explained(error)})


def _reply(replies: Any, content: Mapping[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def _explained(error: BaseException) -> str:
    """Word an error in one line; of something that was tried again, the last attempt's."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def draw_again(document: int = SEED) -> None:
    """Seed what tasks draw by chance in prompts and scores, so that it is the same in every process."""
    random.seed(document)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(document)


def cut(answer: str, until: Sequence[str]) -> str:
    """Cut an answer where one of the task's stop texts begins, as the harness's models do."""
    answer = answer.strip()
    for stop in until:
        if stop and stop != NOT_A_STOP:
            answer = answer.split(stop)[0]
    return answer.strip()


def stops(generation: Mapping[str, Any]) -> list[str]:
    """Return the stop texts of ``generation_kwargs``."""
    until = generation.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def sampling(generation: Mapping[str, Any]) -> str:
    """Say which setting of ``generation_kwargs`` asks for other answers than greedy ones; empty where none does."""
    greedy: dict[str, tuple[Any, ...]] = {
        "do_sample": (False, None),
        "num_beams": (1, None),
        "repetition_penalty": (1, None),
    }
    if generation.get("do_sample") is not False:
        greedy["temperature"] = (0, None)
    found = [f"{name}: {generation[name]}" for name, allowed in greedy.items() if generation.get(name) not in allowed]
    return found[0] if found else ""


class HarnessTask:
    """A task of the harness that is scored per sample."""

    def __init__(self, name: str, task: Any, yaml_file: Path | None) -> None:
        self.name, self._task, self._yaml = name, task, yaml_file
        self._split = task.config.test_split if task.has_test_docs() else task.config.validation_split
        self._generation = dict(task.config.generation_kwargs or {})
        self._documents = task.eval_docs_no_media
        self._prepare()
        self.metrics = self._scored_metrics()

    @classmethod
    def named(cls, task: str, include: str | None) -> HarnessTask:
        """Load a task: of the YAML files under ``include``, or the harness's own. Raises Refused."""
        try:
            from lmms_eval.tasks import TaskManager
        except ImportError as error:
            raise Refused(f"lmms-eval cannot be imported: {error}") from None

        manager = TaskManager("ERROR", include_path=include, include_defaults=include is None, model_name=MODEL_NAME)
        if task not in manager.all_tasks:
            if include is not None:
                there = ", ".join(manager.all_subtasks) or "none"
                raise Refused(f"no YAML file under {include} says task: {task}; there are {there}")
            import difflib

            close = difflib.get_close_matches(task, manager.all_subtasks, n=3)
            raise Refused("lmms-eval has no such task" + (f"; did you mean {' or '.join(close)}?" if close else ""))
        entry = manager.task_index[task]
        if entry["type"] in ("group", "tag"):
            inside = entry["task"] if isinstance(entry.get("task"), list) else []
            raise Refused(f"it is a {entry['type']} of tasks, each of which is one" + _listed(inside))
        (loaded,) = manager.load_task_or_group([task], "simple").values()
        yaml_file = None if entry["yaml_path"] == -1 else Path(entry["yaml_path"]).resolve()
        return cls(task, loaded, yaml_file)

    def described(self) -> dict[str, Any]:
        """Say what the task is: its metrics, how long answers are, and what identifies it."""
        return {
            "metrics": self.metrics,
            "max_new_tokens": int(self._generation.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
            "documents": len(self._documents),
            "version": version("lmms-eval"),
            "identity": self._identity(),
        }

    def samples(self, images: Path, limit: int | None) -> Iterator[dict[str, Any]]:
        """Ask for every document's prompt and image; the image goes to a file that is named by its pixels.

        Raises Refused naming the document that shows other than one image.
        """
        task = self._task
        draw_again()
        task.build_all_requests(limit=limit)
        images.mkdir(parents=True, exist_ok=True)
        media = task.dataset[self._split]
        for request in task.instances:
            prompt, _, doc_to_visual, number = request.arguments[:4]
            if not isinstance(prompt, str):
                raise Refused(f"document {number}: its prompt is no text")
            visuals = doc_to_visual(media[number]) if callable(doc_to_visual) else None
            file, pixels, content = _write_image(one_image(visuals, number), images)
            yield {
                "document": number,
                "hash": self._hash(number),
                "prompt": prompt,
                "answers": self._targets(number),
                "image": file,
                "pixels": pixels,
                "content": content,
            }

    def score(self, document: int, hash: str, answer: str) -> dict[str, float]:
        """Score an answer by the harness's filters and ``process_results``. Raises Refused where the data changed."""
        if document >= len(self._documents) or self._hash(document) != hash:
            raise Refused(f"document {document} is another one than when the task was read; start again")
        found = self._results(document, cut(answer, stops(self._generation)))
        scores = {}
        for name in self.metrics:
            value = _number(found.get(name))
            if value is None:
                raise Refused(f"document {document}: {name} is {found.get(name)!r}, no score in [0, 1]")
            scores[name] = value
        return scores

    def _prepare(self) -> None:
        """Set what the harness sets before it asks; refuse what cannot be asked here."""
        task, config = self._task, self._task.config
        if task.OUTPUT_TYPE != "generate_until":
            raise Refused(
                f"its output_type is {task.OUTPUT_TYPE}; only answers that are generated in one turn (generate_until) "
                "can be taken over"
            )
        if setting := sampling(self._generation):
            raise Refused(f"its generation_kwargs have {setting}, and answers are decoded greedily here")
        if (config.repeats or 1) > 1:
            raise Refused(f"it asks every question {config.repeats} times (repeats)")
        if judge := _judge(config.process_results):
            raise Refused(f"its scores are asked of another model or machine ({judge}), not computed")
        if config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
        from lmms_eval.api.reasoning import parse_reasoning_tags_config
        from lmms_eval.filters.selection import TakeFirstFilter
        from lmms_eval.filters.transformation import StripThinkingFilter

        self._tags = parse_reasoning_tags_config(task_value=config.reasoning_tags)
        self._filter = task._filters[0]
        if config.auto_strip_thinking and self._tags is None:
            self._filter.filters.insert(0, StripThinkingFilter())
        self._filter_reads = any(not isinstance(each, TakeFirstFilter) for each in self._filter.filters)

    def _scored_metrics(self) -> list[str]:
        """List the metrics that are means of numbers in [0, 1] per sample, higher being better. Raises Refused."""
        from lmms_eval.api.registry import get_aggregation

        task, mean = self._task, get_aggregation("mean")
        found, reasons = [], []
        probe = self._results(0, self._targets(0)[0])
        for name, aggregation in task.aggregation().items():
            if aggregation is not mean:
                reasons.append(f"{name} is computed over all samples ({getattr(aggregation, '__name__', 'function')})")
            elif not task.higher_is_better().get(name, True):
                reasons.append(f"of {name} less is better")
            elif name not in probe:
                reasons.append(f"{name} is not among the results of a sample")
            elif _number(probe[name]) is None:
                reasons.append(f"{name} of a sample is {probe[name]!r}, no number in [0, 1]")
            else:
                found.append(name)
        if not found:
            raise Refused(f"none of its metrics is a mean of scores in [0, 1]: {'; '.join(reasons)}")
        return found

    def _results(self, document: int, answer: str) -> dict[str, Any]:
        """Score one answer by the steps of ``lmms_eval.evaluator``; one that is guessed by chance always the same."""
        from lmms_eval.api.instance import Instance
        from lmms_eval.api.reasoning import strip_reasoning_tags

        task = self._task
        metadata = {"task": self.name, "doc_id": document, "repeats": 1}
        request = Instance("generate_until", (), 0, metadata, resps=[answer])
        self._filter.apply([request], [task.task_docs[document]] if self._filter_reads else [])
        filtered = request.filtered_resps[self._filter.name]
        if self._tags is not None:
            if isinstance(filtered, str):
                filtered = strip_reasoning_tags(filtered, self._tags)
            elif isinstance(filtered, list):
                filtered = [strip_reasoning_tags(e, self._tags) if isinstance(e, str) else e for e in filtered]
        draw_again(document)
        results: dict[str, Any] = task.process_results(self._documents[document], [filtered])
        return results

    def _targets(self, document: int) -> list[str]:
        """Return the answers that count as right, as far as the task says them in words."""
        task, config, doc = self._task, self._task.config, self._documents[document]
        named = config.doc_to_target
        if isinstance(named, str) and named not in task.features and "{" not in named:
            found: Any = doc.get("answers", doc.get("answer"))  # the name of a column that is not there
        else:
            found = task.doc_to_target(doc)
            if isinstance(found, int) and config.doc_to_choice is not None:
                found = task.doc_to_choice(doc)[found]
        each = found if isinstance(found, (list, tuple)) else [found]
        return [text for text in (str(one).strip() for one in each if one is not None) if text] or [NO_ANSWER]

    def _hash(self, document: int) -> str:
        content = json.dumps(self._documents[document], sort_keys=True, default=_plain)
        return hashlib.sha256(content.encode()).hexdigest()

    def _identity(self) -> str:
        """Hash what decides prompts and scores: the YAML with what it includes, the task's code, the harness's."""
        import lmms_eval

        files = set(_included(self._yaml)) if self._yaml is not None else set()
        near = {file.parent for file in files}
        for value in vars(self._task.config).values():
            code = getattr(getattr(value, "func", value), "__code__", None)
            if code is not None:
                files.add(Path(code.co_filename).resolve())
        base = Path(lmms_eval.__file__).resolve().parent
        own = {base / "api", base / "filters", base / "tasks", base / "utils.py"}
        for module in list(sys.modules.values()):
            name = getattr(module, "__file__", None)
            file = Path(name).resolve() if name is not None else None
            if file is not None and (file.parent in near or not own.isdisjoint((file, *file.parents))):
                files.add(file)
        hashes = sorted((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files if file.is_file())
        return hashlib.sha256(json.dumps([version("lmms-eval"), hashes]).encode()).hexdigest()


def one_image(visuals: Any, number: int) -> Any:
    """Return the image of a document in RGB, as the harness's models see it. Raises Refused for other than one."""
    from PIL.Image import Image

    found = list(visuals or [])
    if len(found) != 1:
        raise Refused(f"document {number} shows {len(found) or 'no'} images, and every question here is about one")
    if not isinstance(found[0], Image):
        raise Refused(f"document {number} shows a {type(found[0]).__name__}, not an image")
    return found[0].convert("RGB")


def _write_image(image: Any, directory: Path) -> tuple[str, str, str]:
    """Write an image once; return its file, the hash of its pixels, and that of the file."""
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    file = directory / f"{pixels}.png"
    if not file.is_file():
        unfinished = directory / f".{pixels}.{os.getpid()}"
        image.save(unfinished, "PNG", compress_level=1)
        unfinished.replace(file)
    return str(file), pixels, hashlib.sha256(file.read_bytes()).hexdigest()


def _number(value: Any) -> float | None:
    """Return a score in [0, 1]; None for anything else."""
    if value is None or isinstance(value, (str, list, tuple, dict)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0.0 <= number <= 1.0 else None


def _plain(value: Any) -> str:
    """Stand for what JSON does not hold, the same in every process."""
    if hasattr(value, "tobytes") and hasattr(value, "size"):
        return hashlib.sha256(repr(value.size).encode() + value.tobytes()).hexdigest()
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _judge(function: Any) -> str:
    """Name a module through which a function, or one of its own modules' that it calls, asks others; else empty."""
    waiting: list[Callable[..., Any]] = [function] if isinstance(function, FunctionType) else []
    seen: set[int] = set()
    while waiting:
        own = waiting.pop()
        if id(own) in seen or not isinstance(own, FunctionType):
            continue
        seen.add(id(own))
        for name in _names(own.__code__):
            value = own.__globals__.get(name)
            module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or name
            for judge in JUDGES:
                if module == judge or module.startswith(f"{judge}."):
                    return judge
            if isinstance(value, FunctionType) and value.__globals__ is own.__globals__:
                waiting.append(value)
    return ""


def _names(code: Any) -> Iterator[str]:
    """List the names that a function looks up or imports, inner functions' included."""
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names(constant)


def _included(yaml_file: Path) -> Iterator[Path]:
    """List a YAML file, those that it includes, and the Python files whose functions they name."""
    import yaml
    from lmms_eval.utils import ignore_constructor

    content = yaml_file.read_bytes()
    yield yaml_file
    for name in re.findall(rb"!function\s+(\S+)\.\w+", content):
        yield (yaml_file.parent / f"{name.decode()}.py").resolve()
    yaml.add_constructor("!function", ignore_constructor)
    names = (yaml.full_load(content) or {}).get("include") or []
    for name in [names] if isinstance(names, str) else names:
        place = Path(name) if Path(name).is_file() else yaml_file.parent / name
        if place.is_file():
            yield from _included(place.resolve())


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f": {shown}{', ...' if len(names) > 8 else ''}" if shown else ""


if __name__ == "__main__":
    main()
