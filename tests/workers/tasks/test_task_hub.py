from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from workers.errors import ImageError, TaskError
from workers.tasks import images, load_task, parse_spec
from workers.tasks.loading import hash_definition

INSTALLED = importlib.util.find_spec("datasets") is not None


def spec(dataset: str, **source: object) -> object:
    return {
        "name": "from-hub",
        "source": {"kind": "hub", "id": dataset, "split": "train"} | source,
        "prompt": "{question}",
        "answer": {"kind": "short", "max_new_tokens": 4},
        "metric": "exact_match",
        "splits": {"calibration": 2, "search": 2, "held_out": 2},
    }


@pytest.mark.skipif(INSTALLED, reason="the datasets package is installed")
def test_without_the_datasets_package_the_extra_is_named() -> None:
    with pytest.raises(TaskError, match=r"needs the datasets package: pip install 'skipplan\[hub\]'"):
        load_task(parse_spec(spec("owner/data")))


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A directory laid out as a hub repository: one Parquet file with encoded images, one of them broken."""
    datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    images = []
    for number in range(8):
        Image.new("RGB", (5, 5), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        images.append({"bytes": (tmp_path / f"{number}.png").read_bytes(), "path": None})
    images[5] = {"bytes": b"no image", "path": None}
    rows = {"picture": images, "question": ["q"] * 8, "answers": [["a", "b"]] * 8}
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image(decode=False))
    table = table.cast_column("picture", datasets.Image())
    table.to_parquet(tmp_path / "data" / "train.parquet")
    return str(tmp_path / "data")


def test_a_dataset_is_read_with_its_columns_mapped(dataset: str) -> None:
    task = load_task(parse_spec(spec(dataset, columns={"image": "picture"})))
    samples = [*task.calibration, *task.search, *task.held_out]
    assert len({sample.image_key for sample in samples}) == 6
    assert samples[0].answers == ("a", "b")
    sizes, failures = set(), []
    for sample in samples:
        try:
            sizes.add(sample.image.open().size)
        except ImageError as error:
            failures.append(str(error))
    assert sizes == {(5, 5)}
    assert all("row 5: cannot decode" in failure for failure in failures)


def test_what_is_wrong_with_a_dataset_is_named(dataset: str) -> None:
    with pytest.raises(TaskError, match="no column 'image'; it has picture, question, answers"):
        load_task(parse_spec(spec(dataset)))
    with pytest.raises(TaskError, match="column 'question' holds no images"):
        load_task(parse_spec(spec(dataset, columns={"image": "question"})))
    with pytest.raises(TaskError, match="cannot be loaded"):
        load_task(parse_spec(spec(dataset + "-gone", columns={"image": "picture"})))


def test_a_dataset_that_moves_under_a_job_gives_no_other_images(dataset: str) -> None:
    """Another revision of a default branch puts other images into the same rows."""
    import datasets

    task = load_task(parse_spec(spec(dataset, columns={"image": "picture"})))
    table = datasets.load_dataset(dataset, split="train")
    table.select([1, 2, 3, 4, 6, 7, 0, 5]).to_parquet(Path(dataset) / "train.parquet")
    images._hub_images.cache_clear()
    for sample in (*task.calibration, *task.search):
        with pytest.raises(ImageError, match="it is another image than when the task was read"):
            sample.image.open()
    again = load_task(parse_spec(spec(dataset, columns={"image": "picture"})))
    assert again.data_hash == task.data_hash  # the same rows in another order


def test_another_dataset_is_another_definition() -> None:
    found = {
        hash_definition(parse_spec(spec("owner/data", **source)))
        for source in ({}, {"split": "test"}, {"revision": "a1"}, {"subset": "b"}, {"columns": {"question": "q"}})
    }
    assert len(found) == 5
