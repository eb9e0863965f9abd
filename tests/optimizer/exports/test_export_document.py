from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from export_builders import document
from hypothesis import given, settings
from hypothesis import strategies as st
from report_builders import LOSSES
from storage_builders import engine_latency

from optimizer.errors import UsageFault
from optimizer.exports.card import model_card
from optimizer.exports.document import PlanDocument, describe, json_schema, read, shared_name
from optimizer.exports.importing import import_plan
from optimizer.exports.interface import Guide
from optimizer.registries import EXPORT_FORMATS
from storage.database import Database
from storage.errors import NotFound
from storage.records import lookup, plans
from storage.records.plans import PlanQuery

SCHEMA = Path(__file__).parents[3] / "docs" / "schema" / "skipplan-plan.schema.json"
REGENERATE = (
    'python -c "import json; from optimizer.exports.document import json_schema; '
    'print(json.dumps(json_schema(), indent=2))" > docs/schema/skipplan-plan.schema.json'
)


SERVED = (engine_latency(1.4, seconds_per_token=None),)


def test_the_published_schema_is_the_one_in_force():
    assert json.loads(SCHEMA.read_text()) == json_schema(), REGENERATE


def test_a_document_survives_its_file(tmp_path: Path):
    figures = replace(document("RFBS").figures, engine_latencies=SERVED)
    written = document("RFBS", figures=figures)
    file = tmp_path / "skipplan.json"
    file.write_text(written.to_json())
    assert read(file) == written == read(tmp_path)
    jsonschema.validate(json.loads(file.read_text()), json.loads(SCHEMA.read_text()))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(0.5), st.text(max_size=3), st.just([]), st.just({})
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values stand in a JSON document."""
    found = [path] if path else []
    for key, item in value.items() if isinstance(value, dict) else ():
        found += paths(item, (*path, key))
    return found


BASE = json.loads(document("RFBS").to_json())
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(paths(BASE)), value=VALUES, drop=st.booleans())
def test_reader_refuses_whatever_the_schema_refuses(path: tuple[Any, ...], value: Any, drop: bool):
    changed = json.loads(json.dumps(BASE))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    valid = VALIDATOR.is_valid(changed)
    try:
        PlanDocument.model_validate_json(json.dumps(changed))
        accepted = True
    except ValueError:
        accepted = False
    assert not accepted or valid  # the reader also compares fields with each other, which a schema cannot


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "RFXS"}, "plan"),
        ({"mode": "lossless"}, "figures.extra_bytes: a lossless plan needs it"),
        ({"plan": "RFB"}, "3 letters, the model 4 layers"),
        ({"schema_version": 1}, "schema_version"),
        ({"extra": 1}, "extra"),
        ({"published_at": "2026-05-01T12:00:00"}, "published_at"),
        ({"figures": BASE["figures"] | {"accuracy_low": 0.95, "accuracy_high": 0.8}}, "accuracy_low is above"),
        ({"figures": BASE["figures"] | {"accuracy": 1.9, "accuracy_high": 1.9}}, "figures.accuracy"),
        ({"figures": BASE["figures"] | {"latency_seconds": float("nan")}}, "figures.latency_seconds"),
        ({"model": BASE["model"] | {"fingerprint": "../../etc"}}, "model.fingerprint"),
    ],
)
def test_a_bad_document_is_refused_naming_the_field(tmp_path: Path, change: dict[str, Any], message: str):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(BASE | change))
    with pytest.raises(UsageFault, match="is no valid plan") as refused:
        read(file)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"plan": "R"}'])
def test_what_is_no_document_is_refused(tmp_path: Path, content: str):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UsageFault, match="no valid plan"):
        read(tmp_path / "plan.json")
    with pytest.raises(UsageFault, match="cannot be read"):
        read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("/home/someone/models/llava-12", "llava-12"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("llava-12", "llava-12"),
        ("configs/reference/llava-12", "llava-12"),
        ("~/llava", "llava"),
    ],
)
def test_directories_of_a_person_are_not_published(name: str, shared: str):
    assert shared_name(name) == shared


def test_an_imported_plan_is_found_and_marked(db: Database, tmp_path: Path):
    file = tmp_path / "skipplan.json"
    file.write_text(document("RFBS").to_json())
    stored = import_plan(db, read(file), file)
    assert stored.origin == "imported" and stored.job_id is None
    assert plans.best(db, PlanQuery("tiny", "easy-vqa")) == stored
    again = describe(stored, lookup.model(db, stored.model_id), lookup.task(db, stored.task_id))
    original = document("RFBS")
    assert again == original.model_copy(update={"origin": "imported", "published_at": again.published_at})
    assert asdict(stored)["secondary"] == original.figures.secondary
    assert stored.device == original.device

    better = original.model_copy(update={"figures": replace(original.figures, n_samples=300, engine_latencies=SERVED)})
    file.write_text(better.to_json())
    found = import_plan(db, read(tmp_path), tmp_path)
    assert found.n_samples == 300 and found.engine_latencies == SERVED
    assert len(plans.list_plans(db)) == 1  # the new figures took the place of the old


def test_unknown_identities_are_not_found(db: Database):
    for look_up, kind in ((lookup.model, "model"), (lookup.task, "task")):
        with pytest.raises(NotFound, match=f"no {kind} 99"):
            look_up(db, 99)


def test_nothing_from_elsewhere_can_mark_up_the_card():
    hostile = document("RS", device="cpu | <script>alert(1)</script> [x](http://x)\n# Title")
    hostile = hostile.model_copy(update={"export": EXPORT})
    text = model_card(hostile, EXPORT_FORMATS["checkpoint"], Guide("", ()))
    assert "<script>" not in text and "\n# Title" not in text and "[x](" not in text


EXPORT = PlanDocument.model_validate_json(
    json.dumps(
        BASE
        | {
            "export": {
                "format": "checkpoint",
                "created_at": "2026-05-02T12:00:00Z",
                "model_fingerprint": "cd" * 32,
                "versions": {"torch": "2"},
                "files": {},
            }
        }
    )
).export


def test_the_card_tells_every_figure_and_what_was_forced_or_imported():
    figures = replace(document("RFBS").figures, engine_latencies=SERVED)
    imported = document("RFBS", origin="imported", figures=figures).model_copy(update={"export": EXPORT})
    text = model_card(imported, EXPORT_FORMATS["runtime"], Guide("USAGE", ("LIMIT",)))
    for figure in ("0.9000", "0.8700 to 0.9300", "-0.0200", "98.75 %", "1.500", "1.400 to 1.600", "200", "4096"):
        assert figure in text
    assert "| speed-up in vllm 0.32.0, 1 at once | 1 | 1.400 | 1.330 to 1.470 |" in text
    assert "imported, not measured" in text and "not of this model" in text
    assert "USAGE" in text and "- LIMIT" in text and "batch=1 new=4" in text


def test_the_card_tells_each_of_several_losses():
    own = document("RFBS").figures
    several = replace(own, secondary=own.secondary | {"goals": LOSSES})
    export = EXPORT.model_copy(update={"model_fingerprint": None})
    exported = document("RFBS", figures=several).model_copy(update={"export": export})
    text = model_card(exported, EXPORT_FORMATS["runtime"], Guide("", ()))
    for row in (
        "| accuracy on counts, 100 held-out samples (at least 0.7) | 0.9200 | 0.9000 | 0.8690 to 0.9270 |",
        "| difference to dense on counts (loss at most 0.03) |  | -0.0200 | -0.0250 to -0.0100 (at 98.75 %) |",
        "| difference to dense on shapes (loss at most 0.01) |  | -0.0100 | -0.0120 to +0.0000 (at 98.75 %) |",
        "nats a token, 100 held-out passages (limit 0.4) | 0 | 0.2000 | 0.1000 to 0.2500 (at 98.75 %) |",
        "- The plan was chosen for counts, shapes and judged on text beside; on other tasks its accuracy is unknown.",
    ):
        assert row in text
    (index,) = yaml.safe_load(text.split("---")[1])["model-index"]
    told = {
        (result["dataset"]["name"], metric["type"]): (metric["value"], metric["args"]["low"], metric["args"]["high"])
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert told == {
        ("counts", "accuracy"): (0.9, 0.869, 0.927),
        ("counts", "accuracy_difference"): (-0.02, -0.025, -0.01),
        ("shapes", "accuracy"): (0.91, 0.879, 0.937),
        ("shapes", "accuracy_difference"): (-0.01, -0.012, 0.0),
        ("text", "kl_divergence"): (0.2, 0.1, 0.25),
        ("easy-vqa", "speedup"): (1.5, 1.4, 1.6),
    }
