# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    # Runs without a ledger path write theirs below the current directory.
    monkeypatch.chdir(tmp_path)
