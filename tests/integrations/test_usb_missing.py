"""Without USB the integration says what is missing."""

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("semilearn") is not None, reason="USB is installed here")


def test_import_names_the_extra_to_install():
    expected = r"needs USB.*No module named 'semilearn'.*pip install 'bacon_fast\[usb\]'; pip install --no-deps"
    with pytest.raises(ImportError, match=expected):
        importlib.import_module("bacon_fast.integrations.usb")
