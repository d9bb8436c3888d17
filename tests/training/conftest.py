"""What tests of budgets share."""

from __future__ import annotations

import pytest

from embedcache.training.budget import ladder
from embedcache.training.step.settings import StepSettings


@pytest.fixture
def recording(monkeypatch):
    """Recipes as on a GPU that records them."""
    monkeypatch.setattr(
        ladder,
        "plain_settings",
        lambda *given: StepSettings(one_row=True, cuda_graph=True, ahead=1),
    )
