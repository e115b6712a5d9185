"""Launches under watch: see shadow_memory.py."""

import pytest


@pytest.fixture
def shadow():
    """Memory of all launches of the test; it fails if they left a finding that the test has not cleared."""
    from shadow_memory import ShadowMemory

    with ShadowMemory().watch() as memory:
        yield memory
    assert not memory.findings, dict(memory.findings)
