"""The example methods of the documentation keep the contracts that the same page tells to check."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/own-method.md"


def test_the_example_methods_keep_their_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    examples = [block for block in blocks if block.startswith("# my_methods.py")]
    module = ModuleType("my_methods")
    monkeypatch.setitem(sys.modules, "my_methods", module)
    for block in examples:
        exec(compile(block, str(PAGE), "exec"), module.__dict__)
    checks: dict[str, object] = {}
    exec(compile(blocks[-1], str(PAGE), "exec"), checks)
    assert len(examples) == 2
    checks["test_my_methods"]()  # type: ignore[operator]
