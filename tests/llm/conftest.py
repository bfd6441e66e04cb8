from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted import Scripted


@pytest.fixture
def llm() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.close()
