"""What tests of texts share: a file with this content, and an error that says these words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from erase.prompts.errors import ErasureError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """A file of that name and content in `folder`."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@contextmanager
def raises(*words: str) -> Iterator[None]:
    """Expect an ErasureError whose message has every one of `words`."""
    with pytest.raises(ErasureError) as caught:
        yield
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
