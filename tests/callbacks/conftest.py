"""The prepared clips that the tests of callbacks train on."""

from __future__ import annotations

import pytest

from tests.toy_run import make_prepared


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7, 30))
