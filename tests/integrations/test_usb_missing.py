"""Without USB the integration says what is missing."""

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("semilearn") is not None, reason="USB is installed here")


def test_import_names_the_extra_to_install():
    with pytest.raises(ImportError, match=r"needs USB.*No module named 'semilearn'.*pip install '\.\[usb\]'"):
        importlib.import_module("bacon_fast.integrations.usb")
