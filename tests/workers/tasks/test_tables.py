"""Tables as people save them: encodings, separators, compression, types, and what is left out."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from workers.errors import TaskError
from workers.tasks import load_task, parse_spec
from workers.tasks.spec import FileSource
from workers.tasks.tables import _read_table

HEADER = ("image", "question", "answers")
ROWS = [(f"{number}.png", f"Was ist {number}, grün?", "schön") for number in range(6)]
CSV = "\n".join(",".join(f'"{cell}"' for cell in row) for row in (HEADER, *ROWS))
JSONL = "\n".join(json.dumps(dict(zip(HEADER, row, strict=True)), ensure_ascii=False) for row in ROWS)

Load = Callable[..., list[tuple[str, str, tuple[str, ...]]]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a file of this content as a task; its samples by row, as image, question and answers."""
    for number in range(6):
        Image.new("RGB", (9, 9), (number * 20, 0, 0)).save(tmp_path / f"{number}.png")

    def load(name: str, content: bytes | str, **source: Any) -> list[tuple[str, str, tuple[str, ...]]]:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        spec = {
            "name": "mine",
            "source": {"kind": "file", "path": name, **source},
            "prompt": "{question}",
            "answer": {"kind": "short", "max_new_tokens": 4},
            "metric": "exact_match",
            "splits": {"unit": "images", "calibration": 1, "search": 1, "held_out": 4},
        }
        task = load_task(parse_spec(spec, base=tmp_path))
        samples = sorted((*task.calibration, *task.search, *task.held_out), key=lambda sample: sample.id)
        return [(Path(s.image.path).name, s.question, s.answers) for s in samples]  # type: ignore[union-attr]

    return load


EXPECTED = [(image, question, (answer,)) for image, question, answer in ROWS]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(("name", "text"), [("d.csv", CSV), ("d.jsonl", JSONL), ("d.ndjson", JSONL)])
def test_a_byte_order_mark_names_the_encoding(load: Load, name: str, text: str, encoding: str) -> None:
    assert load(name, text.encode(encoding)) == EXPECTED


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl"])
def test_other_encodings_are_refused_naming_the_place(load: Load, name: str) -> None:
    text = CSV if name == "d.csv" else JSONL
    content = text.encode("latin-1")
    place = content.index("ü".encode("latin-1"))
    line = 2 if name == "d.csv" else 1
    with pytest.raises(TaskError, match=rf"{name}: .*: line {line} is no utf-8 text \(byte {place}: 0xfc\); save the"):
        load(name, content)
    with pytest.raises(TaskError, match=rf"{name}: .* holds null characters, as UTF-16 without a byte order mark"):
        load(name, text.replace("ü", "u").replace("ö", "o").encode("utf-16-le"))


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_tables_are_read(load: Load, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    assert load(f"d.csv.{suffix}", pack(CSV.encode())) == EXPECTED
    assert load(f"d.JSONL.{suffix}", pack(JSONL.encode("utf-8-sig"))) == EXPECTED
    table = io.BytesIO()
    pd.DataFrame(ROWS, columns=list(HEADER)).to_parquet(table)
    assert load(f"d.parquet.{suffix}", pack(table.getvalue())) == EXPECTED
    assert load("d.csv", pack(CSV.encode())) == EXPECTED  # whatever its name says
    with pytest.raises(TaskError, match=rf"d\.csv\.{suffix}: not a readable csv file: "):
        load(f"d.csv.{suffix}", pack(CSV.encode())[:-9])


@pytest.mark.parametrize(("beginning", "name"), [(b"PK\x03\x04", "ZIP"), (b"\x28\xb5\x2f\xfd", "Zstandard")])
def test_archives_are_called_so(load: Load, beginning: bytes, name: str) -> None:
    with pytest.raises(TaskError, match=f"it is a {name} file; unpack it, or compress it with gzip"):
        load("d.csv.gz", beginning + b"....")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["d.csv", "d.tsv"])
def test_the_separator_is_the_one_of_the_first_line(load: Load, name: str, separator: str, end: str) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=separator, lineterminator=end).writerows([HEADER, *ROWS])
    assert load(name, file.getvalue()) == EXPECTED


def test_separators_at_the_end_of_lines_add_no_column(load: Load) -> None:
    rows = "\n".join(",".join((image, f'"{question}"', answer, " ", "")) for image, question, answer in ROWS)
    assert load("d.csv", f"{','.join(HEADER)}\n{rows}\n\n") == EXPECTED
    assert load("d.csv", f"{' , '.join(HEADER)} ,,\n{rows}") == EXPECTED


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_the_line_that_names_the_separator_is_no_header(load: Load, separator: str, mark: str) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows([HEADER, *ROWS])
    assert load("d.csv", f"{mark}sep={separator}\r\n{file.getvalue()}") == EXPECTED


def test_a_first_line_that_is_no_header_is_shown(load: Load) -> None:
    with pytest.raises(TaskError, match=r"d\.csv: no column 'image'; it has # by hand \(source\.columns"):
        load("d.csv", f"# by hand\n{CSV}")


def test_a_table_that_unpacks_to_fill_the_memory_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.tasks.tables.MOST_UNPACKED", 2**20)
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        assert load("d.csv.gz", pack((CSV + "\n" * (2**20 - len(CSV.encode()))).encode())) == EXPECTED
        with pytest.raises(
            TaskError, match=r"d\.csv\.gz: not a readable csv file: it unpacks to more than 0\.00\d+ GiB"
        ):
            load("d.csv.gz", pack((CSV + "\n" * (2**20 + 1 - len(CSV.encode()))).encode()))


def test_ragged_rows_are_named(load: Load) -> None:
    for row, cells in (("a.png,what", 2), ("a.png,what,yes,no", 4)):
        with pytest.raises(TaskError, match=rf"d\.csv: .* row 2 \(line 4\) has {cells} cells, the header 3"):
            load("d.csv", f'image,question,answers\n0.png,"two\nlines",yes\n{row}\n1.png,what,yes\n')
    with pytest.raises(TaskError, match=r"d\.csv: not a readable csv file: unexpected end of data"):
        load("d.csv", 'image,question,answers\n0.png,"what,yes\n')


def test_a_column_that_is_there_twice_is_refused_where_it_is_needed(load: Load) -> None:
    with pytest.raises(TaskError, match=r"d\.csv: has 2 columns 'answers'; which one is meant\?"):
        load("d.csv", "image,question,answers,answers\n0.png,what,a,b\n")
    with pytest.raises(TaskError, match=r"d\.jsonl: .* line 1 is not JSON: 'answers' is given twice"):
        load("d.jsonl", '{"image": "0.png", "question": "q", "answers": "a", "answers": "b"}')
    twice = pyarrow.table([[f"{n}.png" for n in range(6)], ["q"] * 6, ["a"] * 6, ["b"] * 6], [*HEADER, "answers"])
    table = io.BytesIO()
    parquet.write_table(twice, table)
    with pytest.raises(TaskError, match=r"d\.parquet: has 2 columns 'answers'; which one is meant\?"):
        load("d.parquet", table.getvalue())
    rows = "\n".join(f'{image},"{question}",{answer},1,2' for image, question, answer in ROWS)
    assert load("d.csv", f"image,question,answers,note,note\n{rows}") == EXPECTED


def test_a_list_of_objects_is_read_as_the_lines_that_it_means(load: Load) -> None:
    rows = [json.loads(line) for line in JSONL.split("\n")]
    for indent in (None, 2):
        assert load("d.jsonl", json.dumps(rows, indent=indent)) == EXPECTED
    with pytest.raises(TaskError, match=r"d\.jsonl: .* row 2 must be a JSON object"):
        load("d.jsonl", '[{"image": "0.png"}, 3]')
    with pytest.raises(TaskError, match=r"d\.jsonl: .* it is not JSON"):
        load("d.jsonl", '[{"image": "0.png"},')
    with pytest.raises(TaskError, match=r"d\.jsonl: .* line 1 is not JSON"):
        load("d.jsonl", '{"image": ' * 100_000)


def test_characters_that_end_lines_elsewhere_end_none_in_json(load: Load) -> None:
    rows = [(image, f"a\u2028b\x85{question}", answer) for image, question, answer in ROWS]
    text = "\n".join(json.dumps(dict(zip(HEADER, row, strict=True)), ensure_ascii=False) for row in rows)
    assert [question for _, question, _ in load("d.jsonl", text)] == [question for _, question, _ in rows]


@pytest.mark.parametrize(
    ("cells", "meant"),
    [
        (pd.array([5, 2**60 + 1, None], dtype="Int64"), ["5", str(2**60 + 1), None]),
        (pd.array([True, None, False], dtype="boolean"), ["True", None, "False"]),
        (pd.array(["NA", None, "nan"], dtype="string"), ["NA", None, "nan"]),
        (pd.Categorical(["red", None, "blue"]), ["red", None, "blue"]),
        ([5.0, float("nan"), 2.5], ["5", None, "2.5"]),
        (pd.array([0.1, 5, 2.5], dtype="float32"), ["0.1", "5", "2.5"]),
        (pd.to_datetime(["2024-01-05 00:00", None, "2024-01-05 10:30"]), ["2024-01-05", None, "2024-01-05 10:30:00"]),
        ([datetime.date(2024, 1, 5), None, None], ["2024-01-05", None, None]),
        ([{"answer": "red"}, None, {"answer": None}], ["red", None, None]),
        ([["red"], [], [None]], ["red", None, None]),
    ],
)
def test_a_cell_of_any_type_is_its_text_and_a_missing_one_is_named(load: Load, cells: Any, meant: list[Any]) -> None:
    frame = pd.DataFrame({"image": [f"{n}.png" for n in range(3)], "question": "q", "answers": cells})
    for row, text in enumerate(meant):
        table = io.BytesIO()
        pd.concat([frame[row : row + 1]] * 6).assign(image=[f"{n}.png" for n in range(6)]).to_parquet(table)
        if text is None:
            with pytest.raises(TaskError, match=r"d\.parquet, row 1: column 'answers' has no answer"):
                load("d.parquet", table.getvalue())
        else:
            assert load("d.parquet", table.getvalue())[0][2] == (text,)


@pytest.mark.parametrize(
    ("cells", "meant"),
    [
        (pyarrow.array([b"rot"] * 6, pyarrow.large_binary()), ("rot",)),
        (pyarrow.array([b"rot"] * 6, pyarrow.binary(3)).dictionary_encode(), ("rot",)),
        (pyarrow.array([[b"rot", b"blau"]] * 6, pyarrow.large_list(pyarrow.binary())), ("rot", "blau")),
        (pyarrow.array(["rot"] * 6, pyarrow.large_string()).dictionary_encode(), ("rot",)),
        (pyarrow.array([Decimal("12.50")] * 6, pyarrow.decimal128(9, 2)), ("12.50",)),
        (pyarrow.array([Decimal("5.00")] * 6, pyarrow.decimal256(40, 2)), ("5",)),
        (pyarrow.array([0.1] * 6, pyarrow.float16()), ("0.1",)),
        (pyarrow.array([[("answer", "rot")]] * 6, pyarrow.map_(pyarrow.string(), pyarrow.string())), "holds a list"),
        (pyarrow.array([float("inf")] * 6), "holds inf, which is no number"),
        (pyarrow.array([b"\xff"] * 6), "holds bytes that are no UTF-8 text"),
        (pyarrow.nulls(6), "has no answer"),
    ],
    ids=str,
)
def test_a_parquet_column_of_any_type_is_its_text_or_refused(load: Load, cells: Any, meant: tuple[str] | str) -> None:
    table = io.BytesIO()
    parquet.write_table(pyarrow.table([[f"{n}.png" for n in range(6)], ["q"] * 6, cells], list(HEADER)), table)
    if isinstance(meant, str):
        with pytest.raises(TaskError, match=rf"d\.parquet, row 1: column 'answers' {meant}"):
            load("d.parquet", table.getvalue())
    else:
        assert {answers for _, _, answers in load("d.parquet", table.getvalue())} == {meant}


@pytest.mark.parametrize("value", [r'"\ud83d"', r'["red", "a\u0000b"]', "Infinity", "-Infinity"])
def test_what_is_no_text_is_refused_in_json(load: Load, value: str) -> None:
    rows = "\n".join(f'{{"image": "{n}.png", "question": "q", "answers": {value}}}' for n in range(6))
    with pytest.raises(TaskError, match=r"d\.jsonl, row 1: column 'answers' holds (-?inf, which|a null character or)"):
        load("d.jsonl", rows)


def test_a_number_keeps_its_digits_where_others_are_missing(tmp_path: Path) -> None:
    for dtype in ("Int64", "int64[pyarrow]", object):
        frame = pd.DataFrame({"answers": pd.Series([2**60 + 1, None, 3], dtype=dtype)})
        frame.to_parquet(tmp_path / "d.parquet")
        _, rows = _read_table(FileSource(path=str(tmp_path / "d.parquet")), ["answers"])
        assert [row["answers"] for row in rows] == [2**60 + 1, None, 3]


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress]),
)
def test_tables_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    separator: str,
    encoding: str,
    pack: Callable[[bytes], bytes],
) -> None:
    folder = tmp_path_factory.mktemp("table")
    file = io.StringIO()
    csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([HEADER, *rows])
    (folder / "d.csv").write_bytes(pack(file.getvalue().encode(encoding)))
    expected = [dict(zip(HEADER, row, strict=True)) for row in rows]
    assert _read_table(FileSource(path=str(folder / "d.csv")), HEADER) == (list(HEADER), expected)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in expected)
    (folder / "d.jsonl").write_bytes(pack(lines.encode(encoding)))
    assert _read_table(FileSource(path=str(folder / "d.jsonl")), HEADER) == (list(HEADER), expected)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["csv", "jsonl", "parquet"]), st.binary(max_size=60), st.integers(0, 200))
def test_any_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, kind: str, damage: bytes, place: int
) -> None:
    table = io.BytesIO(CSV.encode() if kind == "csv" else JSONL.encode())
    if kind == "parquet":
        pd.DataFrame(ROWS, columns=list(HEADER)).to_parquet(table := io.BytesIO())
    content = bytearray(table.getvalue())
    content[place : place + len(damage)] = damage
    path = tmp_path_factory.mktemp("table") / f"d.{kind}"
    path.write_bytes(content)
    try:
        _read_table(FileSource(path=str(path)), HEADER)
    except TaskError as error:
        assert "\n" not in str(error) and path.name in str(error)


def test_texts_are_what_is_seen_of_them(load: Load) -> None:
    """Accents in two characters, as macOS writes them, and characters without width are no difference that is seen."""
    rows = [("0.png", "caf\u0065\u0301?", "\u200bsch\u006f\u0308n\ufeff"), *ROWS[1:]]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in (HEADER, *rows))
    assert load("d.csv", text)[0] == ("0.png", "caf\u00e9?", ("sch\u00f6n",))
    rows[3] = ("3.png", "what?", " \u200b\ufeff")
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in (HEADER, *rows))
    with pytest.raises(TaskError, match="row 4: column 'answers' has no answer"):
        load("d.csv", text)
