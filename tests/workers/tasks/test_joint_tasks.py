from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.choice_tasks import as_choices
from workers.errors import TaskError
from workers.models.prompts import prompt_text
from workers.tasks import Task, TextTask, join_tasks, load_spec, load_task, load_tasks
from workers.tasks.splits import SPLITS


def task(name: str, *, calibration: int = 6, search: int = 10, held_out: int = 10, seed: int = 0) -> Task:
    spec = load_spec(name).with_splits(calibration=calibration, search=search, held_out=held_out, seed=seed)
    return load_task(spec)


EASY, SCENES = task("easy-vqa"), task("scenes", calibration=12, search=20, held_out=20)
JOINT = join_tasks([SCENES, EASY])


def test_a_joint_task_asks_what_its_parts_ask_in_their_order_and_scores_nothing() -> None:
    assert JOINT.name == "easy-vqa+scenes" and JOINT.parts == (EASY, SCENES)
    assert JOINT.spec.answer.kind == "free" and JOINT.spec.answer.max_new_tokens == 24
    for split in SPLITS:
        for part in JOINT.parts:
            own = [each for each in JOINT.split(split) if each.id.startswith(f"{part.name}/")]
            assert [each.id for each in own] == [f"{part.name}/{each.id}" for each in part.split(split)]
            assert [prompt_text(JOINT.spec, each) for each in own] == [
                prompt_text(part.spec, each) for each in part.split(split)
            ]
            assert [(each.image, each.answers) for each in own] == [
                (each.image, each.answers) for each in part.split(split)
            ]
        assert len(JOINT.split(split)) == sum(len(part.split(split)) for part in JOINT.parts)
    sizes = JOINT.spec.splits
    assert (sizes.calibration, sizes.search, sizes.held_out) == (18, 30, 30)


@pytest.mark.parametrize("split", SPLITS)
def test_every_beginning_of_a_split_holds_the_parts_in_proportion(split: str) -> None:
    samples, part = JOINT.split(split), EASY.split(split)
    for length in range(1, len(samples) + 1):
        own = sum(each.id.startswith("easy-vqa/") for each in samples[:length])
        assert abs(own - length * len(part) / len(samples)) < 1


def test_the_order_of_the_tasks_does_not_matter_and_every_hash_of_a_part_does() -> None:
    assert join_tasks([EASY, SCENES]) == JOINT
    for name in ("data_hash", "split_hash", "definition_hash"):
        other = join_tasks([replace(EASY, **{name: "other"}), SCENES])
        differing = [
            each
            for each in ("data_hash", "split_hash", "definition_hash")
            if getattr(other, each) != getattr(JOINT, each)
        ]
        assert differing == [name]


def test_a_part_that_chooses_is_asked_with_its_options_and_kept_as_it_is() -> None:
    joint = join_tasks([as_choices(EASY), SCENES])
    assert joint.part("easy-vqa") == as_choices(EASY)
    assert joint.spec.answer.kind == "free"


def test_units_that_differ_are_counted_in_samples() -> None:
    samples = load_task(load_spec("easy-vqa").with_splits(calibration=7, search=9, held_out=9, unit="samples"))
    sizes = join_tasks([samples, SCENES]).spec.splits
    assert (sizes.unit, sizes.calibration, sizes.search) == ("samples", 19, 29)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ([EASY], "two tasks at least"),
        ([EASY, EASY], "task easy-vqa is given 2 times; give each task once, or rename one"),
        ([EASY, JOINT], r"task easy-vqa\+scenes: a name with '\+' cannot be joined"),
        (
            [EASY, replace(SCENES, spec=SCENES.spec.changed(plain_prompt="{image} {prompt}"))],
            "tasks easy-vqa and scenes have different plain_prompt; give both the same",
        ),
    ],
)
def test_tasks_that_cannot_be_joined_are_refused(tasks: list[Task], reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        join_tasks(tasks)


def renamed(changed: Task) -> Task:
    return replace(changed, spec=changed.spec.changed(name="other"))


def test_an_image_that_one_task_is_searched_on_and_another_held_out_on_is_refused() -> None:
    reason = r"tasks easy-vqa and other share \d+ images between the (search|calibration) split of the first and the "
    for split, theirs in (("search", "held_out"), ("calibration", "held_out"), ("calibration", "search")):
        mixed = replace(renamed(EASY), **{theirs: EASY.split(split)[:3] + EASY.split(theirs)})
        with pytest.raises(TaskError, match=f"(easy-vqa|other).*({split}|{theirs}).*same split seed and sizes"):
            join_tasks([EASY, mixed])
    with pytest.raises(TaskError, match=reason):
        join_tasks(
            [task("easy-vqa", search=400, held_out=400), renamed(task("easy-vqa", search=400, held_out=400, seed=1))]
        )
    assert join_tasks([EASY, renamed(EASY)]).name == "easy-vqa+other"


def test_a_joint_task_is_loaded_by_its_name_and_a_file_by_its_path(tmp_path: Path) -> None:
    loaded = load_tasks("scenes+easy-vqa")
    assert loaded.name == "easy-vqa+scenes"
    assert loaded.parts == (load_task("easy-vqa"), load_task("scenes"))
    file = tmp_path / "one+two.yaml"
    file.write_text(Path("configs/tasks/scenes.yaml").read_text().replace("256", "2").replace("500", "3"))
    assert not load_tasks(file).parts and load_tasks(str(file)).name == "scenes"
    with pytest.raises(TaskError, match="no such task file"):
        load_tasks("scenes+unknown")


def test_a_part_is_found_by_its_name_and_a_joint_task_is_not_scored() -> None:
    text = TextTask.of(" ".join(f"word{number}" for number in range(3000)))
    job = replace(JOINT, beside=(text, renamed(EASY)))
    assert (job.part("scenes"), job.part("text"), job.part("other")) == (SCENES, text, renamed(EASY))
    assert EASY.part("") is EASY
    with pytest.raises(TaskError, match="cannot be scored as a whole; there are text, other, easy-vqa, scenes"):
        job.part("")
    with pytest.raises(TaskError, match="nothing of it is named 'else'; there are no other tasks"):
        EASY.part("else")
