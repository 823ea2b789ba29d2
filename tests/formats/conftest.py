"""Formats are read the same under every event loop."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
