"""What a processor cannot take is found without the model, and what a checkpoint leaves out of it is filled in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import ModelError, PromptError
from workers.messages import ModelSource
from workers.models.describe import describe_model
from workers.models.dry_run import find_problems
from workers.models.loading import LoadedModel, load_config, load_model
from workers.models.processors import load_processor, special_token_in
from workers.models.prompts import build_inputs
from workers.tasks import Sample, Task
from workers.tasks.images import ImageFile
from workers.tasks.spec import Answer

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def copy(tiny_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_directory, tmp_path / "model"))


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def source(directory: Path) -> ModelSource:
    return ModelSource(str(directory), device="cpu")


def problems(directory: Path, task: Task, *samples: Sample) -> list[tuple[str, str]]:
    return [problem for _, problem in find_problems(source(directory), task.spec, samples or task.search[:2])]


def inputs(directory: Path, task: Task) -> dict[str, torch.Tensor]:
    processor = load_processor(directory, source(directory), load_config(directory, source(directory)))
    samples = task.search[:2]
    return dict(build_inputs(processor, task.spec, samples, [sample.image.open() for sample in samples]))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_ordinary_samples_have_no_problem(tiny_directory: Path, small_task: Task) -> None:
    assert problems(tiny_directory, small_task, *small_task.search) == []


@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>", "<pad>"])
def test_special_tokens_in_what_a_sample_says_are_named(tiny: LoadedModel, small_task: Task, token: str) -> None:
    directory, sample = Path(tiny.name), small_task.search[0]
    asked = replace(sample, question=f"is {token} red?")
    assert problems(directory, small_task, sample, asked) == [
        ("question", f"holds '{token}' in its text, a special token of this model; write it in another way")
    ]
    offered = replace(sample, choices=("a", f"b{token}"))
    assert [field for field, _ in problems(directory, small_task, offered)] == ["choices"]
    with pytest.raises(PromptError, match=rf"sample {sample.id}: its question holds '{token}'"):
        build_inputs(tiny.processor, small_task.spec, [sample, asked], [sample.image.open()] * 2)


@given(st.text(max_size=20), st.sampled_from(["<image>", "</s>", "<unk>"]), st.text(max_size=20))
def test_a_special_token_is_found_wherever_it_stands(before: str, token: str, after: str) -> None:
    assert special_token_in(PROCESSOR, before + token + after) is not None
    assert special_token_in(PROCESSOR, (before + after).replace("<", "")) is None


PROCESSOR = tiny_llava.build_processor()


def test_an_image_that_cannot_be_opened_or_processed_is_named(
    tiny_directory: Path, small_task: Task, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    sample = replace(small_task.search[0], image=ImageFile(str(tmp_path / "a.png")))
    assert problems(tiny_directory, small_task, small_task.search[0], sample) == [
        ("image", f"image {tmp_path / 'a.png'} cannot be decoded: its format is not known")
    ]


def test_an_option_without_tokens_is_named(tiny_directory: Path, small_task: Task) -> None:
    spec = small_task.spec.changed(
        answer=Answer(kind="choice", max_new_tokens=4, options="texts", separator=""), metric="multiple_choice"
    )
    sample = replace(small_task.search[0], choices=("red", ""))
    (problem,) = problems(tiny_directory, replace(small_task, spec=spec), sample)
    assert problem == ("", f"the model's processor refuses it: sample {sample.id}: the option '' has no tokens")


@pytest.mark.parametrize(
    ("rotary", "longest"),
    [({}, 78), ({"rope_type": "yarn", "factor": 4.0}, 78), ({"rope_type": "linear", "factor": 4.0}, 4 * 78)],
)
def test_a_prompt_that_does_not_fit_into_the_models_positions_is_named(
    copy: Path, small_task: Task, rotary: dict[str, Any], longest: int
) -> None:
    spec = small_task.spec.changed(answer=small_task.spec.answer.changed(max_new_tokens=longest - 70))
    settings = json.loads((copy / "config.json").read_text())
    settings["text_config"]["max_position_embeddings"] = 78
    settings["text_config"]["rope_parameters"] |= rotary
    (copy / "config.json").write_text(json.dumps(settings))
    for _, reason in problems(copy, replace(small_task, spec=spec)):
        assert f"and {longest - 70} new ones do not fit into the model's {longest} positions" in reason
    assert not problems(copy, replace(small_task, spec=spec.changed(answer=spec.answer.changed(max_new_tokens=1))))


RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
NO_IMAGE = "refuses it: " if RELEASE >= (5, 23) else "leaves out the image"
"""Since transformers 5.23 processors refuse prompts without an image's place themselves."""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'][1]['text'] }}{% endfor %}", NO_IMAGE),
        ("{% for m in messages %}<image>{% endfor %}", "leaves out the prompt's text"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", NO_IMAGE),
        ("{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}", "refuses it: TypeError: can only concatenate"),
        ("{% for m in messages %}<image><image>{{ m['content'][1]['text'] }}{% endfor %}", "refuses it: "),
    ],
)
def test_a_chat_template_that_leaves_something_out_is_named(
    copy: Path, small_task: Task, template: str, message: str
) -> None:
    (copy / "chat_template.jinja").write_text(template)
    found = problems(copy, small_task)
    assert len(found) == 2 and all(message in reason for _, reason in found)


def test_a_prompt_without_image_tokens_is_named_where_the_processor_takes_it(
    tiny_directory: Path, small_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.models.dry_run.build_inputs", lambda *_: {"input_ids": torch.tensor([[1, 2, 3]])})
    assert problems(tiny_directory, small_task) == [("", "the model's chat template leaves out the image")] * 2


def test_a_chat_template_of_the_tokenizer_is_taken(copy: Path, small_task: Task) -> None:
    expected = inputs(copy, small_task)
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    assert not same(inputs(copy, small_task), expected)  # the plain prompt, as it should be without one
    edit(copy / "tokenizer_config.json", lambda content: content.update(chat_template=template))
    assert same(inputs(copy, small_task), expected)
    assert problems(copy, small_task) == []


def test_what_an_old_processor_leaves_out_is_taken_from_the_configuration(copy: Path, small_task: Task) -> None:
    expected = inputs(copy, small_task)
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    edit(copy / "processor_config.json", lambda content: [content.pop(name) for name in names])
    assert same(inputs(copy, small_task), expected)
    assert problems(copy, small_task) == []
    edit(copy / "config.json", lambda content: content["vision_config"].update(model_type="dinov2"))
    with pytest.raises(ModelError, match=r"its processor_config.json has no patch_size; write patch_size, ") as caught:
        inputs(copy, small_task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["", "text_config"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, r"quantised \(awq\); Loading an AWQ quantized model requires gptqmodel"),
        (
            {"quant_method": "modelopt"},
            r"quantised \(modelopt\), which transformers does not load; take the checkpoint",
        ),
    ],
)
def test_quantised_checkpoints_that_nothing_here_loads_are_refused_alike(
    copy: Path, small_task: Task, section: str, settings: dict[str, Any], message: str
) -> None:
    def quantise(content: dict[str, Any]) -> None:
        (content[section] if section else content)["quantization_config"] = settings

    edit(copy / "config.json", quantise)
    for use in (load_model, describe_model, lambda asked: problems(Path(asked.path), small_task)):
        with pytest.raises(ModelError, match=message):
            use(source(copy))


def test_an_adapter_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for use in (load_model, describe_model):
        with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config.json\), not a model; merge it"):
            use(source(tmp_path))


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(copy: Path, small_task: Task) -> None:
    plain = inputs(copy, small_task)
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + template)
    dated = inputs(copy, small_task)
    (copy / "chat_template.jinja").write_text("26 Jul 2024 " + template)
    assert same(dated, inputs(copy, small_task)) and not same(dated, plain)
    assert problems(copy, small_task) == []
