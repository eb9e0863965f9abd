"""What is found of vLLM's environment, and what its log says of why it ended."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workers.engines import vllm_plugin
from workers.engines.vllm import ENGINE, PYTHON_VARIABLE, reason
from workers.runtime import Action

ALL = "".join(action.letter for action in Action)


def environment(folder: Path, *, plugin: str | None) -> Path:
    """Make a Python that has a package of vLLM's name, and the plug-in where its letters are given."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "vllm").mkdir()
    (packages / "vllm" / "__init__.py").touch()
    names = ["vllm"]
    if plugin is not None:
        names.append("skipplan_vllm")
        shutil.copytree(Path(vllm_plugin.__file__).parent, packages / "skipplan_vllm")
        file = packages / "skipplan_vllm" / "plan.py"
        kept = f"\nLETTERS = {{letter: LETTERS[letter] for letter in {plugin!r}}}\n"
        file.write_text(file.read_text() + kept)
    for name in names:
        information = packages / f"{name}-0.1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (information / "top_level.txt").write_text(name)
    return folder / "bin" / "python"


@pytest.mark.parametrize(("plugin", "letters"), [(None, "RS"), ("RFBS", "RFBS"), (ALL, ALL)])
def test_vllm_serves_the_actions_that_the_plug_in_beside_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str | None, letters: str
) -> None:
    """A plug-in of before there were parts of layers has the same name, and refuses their letters."""
    monkeypatch.setenv(PYTHON_VARIABLE, str(environment(tmp_path / "vllm", plugin=plugin)))
    found = ENGINE.installed()
    assert sorted(found.letters) == sorted(letters)
    assert ("skipplan_vllm" in found.versions) == (plugin is not None)


def test_a_plan_that_the_plug_in_refuses_is_told_by_the_plug_in_s_line() -> None:
    """The end of a log of vLLM 0.32.0."""
    log = """\
    s.__pydantic_validator__.validate_python(ArgsKwargs(args, kwargs), self_instance=s)
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, skipplan: layer 0 is frozen: add --enforce-eager [type=value_error, input_value=ArgsKwargs((), {}), \
input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""
    assert reason(log) == "skipplan: layer 0 is frozen: add --enforce-eager"
