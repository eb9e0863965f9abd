"""Job files: defaults, paths, environment, hashes, and errors that name the field."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from field_table import replaced
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from optimizer.errors import UsageFault
from optimizer.job.loading import ENVIRONMENT, load_job, parse_yaml, validate_job
from optimizer.job.spec import DETERMINES_RESULT, ONLY_WHERE_AND_WHEN, JobSpec
from workers.models.checkpoint import BUILT_MODELS

PROJECT = Path(__file__).resolve().parents[3]
MINIMAL = {"model": {"path": "llava-12"}, "task": "easy-vqa"}


def job(tmp_path: Path, text: str = "model: {path: llava-12}\ntask: easy-vqa\n", **options) -> JobSpec:
    (tmp_path / "job.yaml").write_text(text)
    return load_job(tmp_path / "job.yaml", environment=options.pop("environment", {}), **options)


def fields(section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        found += fields(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return found


def test_every_field_is_described_in_code_and_in_the_documentation():
    text = (PROJECT / "docs" / "jobs.md").read_text()
    for name in fields(JobSpec):
        assert f"| `{name}` |" in text, name
    for variable in ENVIRONMENT:
        assert f"`{variable}`" in text


def test_table_of_fields_is_current():
    text = (PROJECT / "docs" / "jobs.md").read_text()
    assert replaced(text) == text, "run: make fields"
    assert "| `search.strategy` |" in text
    assert "| `workload.batch_size` | `1` | whole number from 1 to 4096 | Prompts per request. |" in text


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_job_files_are_valid(path: Path):
    spec = load_job(path, environment={})
    assert spec.model.path in ("llava-12", *BUILT_MODELS)


def test_paths_are_relative_to_the_job_file_and_names_stay_names(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "task.yaml").write_text("name: t")
    spec = job(tmp_path, "model: {path: mine}\ntask: task.yaml\n")
    assert (spec.model.path, spec.task) == (str(tmp_path / "mine"), str(tmp_path / "task.yaml"))
    spec = job(tmp_path, "model: {path: org/model}\ntask: easy-vqa\n")
    assert (spec.model.path, spec.task) == ("org/model", "easy-vqa")
    assert job(tmp_path, "model: {path: ./gone}\ntask: t\n").model.path == str(tmp_path / "gone")


def test_option_wins_over_environment_wins_over_file(tmp_path: Path):
    text = "model: {path: m}\ntask: t\ndatabase: sqlite:///file.db\n"
    environment = {"SKIPPLAN_DATABASE": "sqlite:///environment.db", "SKIPPLAN_CLUSTER_WORKERS": "3"}
    assert job(tmp_path, text).database == "sqlite:///file.db"
    spec = job(tmp_path, text, environment=environment)
    assert (spec.database, spec.cluster.workers) == ("sqlite:///environment.db", 3)
    assert job(tmp_path, text, environment=environment, database="sqlite:///o.db").database == "sqlite:///o.db"


def test_a_worker_has_a_part_of_one_gpu_or_whole_ones(tmp_path: Path):
    text = "model: {path: llava-12}\ntask: easy-vqa\ncluster: {gpus_per_worker: %s}\n"
    for good in (0, 0.25, 1, 2, 4.0):
        assert job(tmp_path, text % good).cluster.gpus_per_worker == good
    with pytest.raises(
        UsageFault, match=r"^\S*job.yaml: cluster.gpus_per_worker: .*must be a part of one GPU or a whole"
    ):
        job(tmp_path, text % 1.5)


def test_a_field_outside_its_section_is_pointed_to_it(tmp_path: Path):
    expected = r"job.yaml: max_accuracy_drop: unknown field; did you mean constraint.max_accuracy_drop\?"
    with pytest.raises(UsageFault, match=expected):
        job(tmp_path, "model: {path: llava-12}\ntask: easy-vqa\nmax_accuracy_drop: 0.02\n")


def test_all_fields_of_former_names_are_named_at_once(tmp_path: Path):
    former = "search: {evaluations: 4, latency: layers}\nlatency_precision: 0.5\nlatency_seconds: 1\n"
    with pytest.raises(UsageFault, match="unknown field") as caught:
        job(tmp_path, f"model: {{path: llava-12}}\ntask: easy-vqa\n{former}")
    assert str(caught.value).endswith(
        "job.yaml: latency_precision: unknown field; latency_precision is latency.precision now, latency_seconds is "
        "latency.max_seconds now, search.evaluations is search.trials now, search.latency is search.latency_model "
        "(profile or layers) now"
    )


def test_every_field_either_counts_in_the_digest_or_does_not():
    assert JobSpec.model_fields.keys() == DETERMINES_RESULT | ONLY_WHERE_AND_WHEN
    assert not DETERMINES_RESULT & ONLY_WHERE_AND_WHEN


def test_digest_is_of_what_determines_the_result(tmp_path: Path):
    base = JobSpec.model_validate(MINIMAL)

    def digest(**changes) -> str:
        return JobSpec.model_validate({**MINIMAL, **changes}).digest(task="a", model="b")

    assert digest() == base.digest(task="a", model="b") == digest(database="sqlite:///x.db", cluster={"workers": 1})
    assert digest(actions=["skip", "freeze"]) == digest(actions=["freeze", "skip"])
    different = [digest(), digest(search={"seed": 1}), digest(protect=[0]), base.digest(task="other", model="b")]
    assert len(set(different)) == 4


def test_an_engine_goes_with_what_it_can_serve():
    def spec(**changes) -> JobSpec:
        return JobSpec.model_validate({**MINIMAL, "latency": {"engine": "vllm"}, **changes})

    assert spec(workload={"concurrency": 8}).workload.concurrency == 8
    plain, served = JobSpec.model_validate(MINIMAL), spec()
    assert plain.digest() != served.digest() != spec(workload={"concurrency": 8}).digest()
    assert "engine" not in plain.canonical()["latency"]
    mixed = spec(actions=["skip", "freeze", "bypass"])
    assert mixed.not_served("RFBS") == "" == spec().not_served("RS")
    assert mixed.not_served("RS").startswith(
        "actions: vllm as it is installed does not serve freeze, bypass; leave them"
    )
    for changes, message in (
        ({"latency": {"engine": "vlm"}}, "latency.engine: .*'transformers', 'vllm', 'llama.cpp'"),
        ({"workload": {"batch_size": 4}}, "workload.batch_size: latency.engine vllm is asked one prompt a request"),
        (
            {"latency": {"engine": "vllm", "max_seconds": 1000}},
            "request_timeout_seconds: 3600 is less than the 4000 that latency.max_seconds allows",
        ),
        ({"latency": {}, "workload": {"concurrency": 4}}, "workload.concurrency: needs an engine that serves"),
    ):
        with pytest.raises(UsageFault, match=message):
            validate_job({**MINIMAL, "latency": {"engine": "vllm"}, **changes}, "job")


def test_letters_follow_the_actions():
    assert JobSpec.model_validate(MINIMAL).letters == "RS"
    assert JobSpec.model_validate({**MINIMAL, "actions": ["skip", "bypass", "freeze"]}).letters == "RFBS"
    assert JobSpec.model_validate({**MINIMAL, "actions": ["skip_mlp", "skip_attention"]}).letters == "RAM"


def test_layers_without_a_part_are_not_compensated_on_dense_states():
    job = {**MINIMAL, "actions": ["skip", "skip_mlp"], "compensation": {"kind": "both", "source": "dense"}}
    with pytest.raises(ValueError, match="plans with skip_mlp are not compensated with source dense; take source pr"):
        JobSpec.model_validate(job)
    job["compensation"]["source"] = "pruned"
    JobSpec.model_validate(job)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*fields(JobSpec), "x"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_anything_is_a_job_or_one_line(value):
    try:
        document = parse_yaml(
            yaml.safe_dump({"model": value, **(value if isinstance(value, dict) else {})}), "job.yaml"
        )
        validate_job(document, "job.yaml")
    except UsageFault as fault:
        assert str(fault).startswith("job.yaml: ") and "\n" not in str(fault)


def test_round_trip_through_what_is_stored():
    from optimizer.service.runner import stored_spec

    spec = JobSpec.model_validate({**MINIMAL, "search": {"rungs": [8, 16]}, "database": "postgresql://u:secret@h/d"})
    stored = stored_spec(spec)
    assert "secret" not in str(stored)
    assert validate_job({**stored, "database": spec.database}, "job 1") == spec
