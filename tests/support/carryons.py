"""A branch's own output, g ⊙ f, for tests that compute y(α) by hand."""

from __future__ import annotations

from torch import Tensor

from embedcache.carryon.branch.model import Branch
from embedcache.carryon.protocol import CarryOnInputs, batch_features
from embedcache.data.batch import Batch
from embedcache.data.frozen import FrozenInputs


def change(model: Branch, x_BTH: dict[str, Tensor], **inputs: object) -> Tensor:
    """Return g ⊙ f, (K)BTH, of embeddings by tap."""
    return model.change(model.features(CarryOnInputs(x_BTH=x_BTH, **inputs)))  # type: ignore[arg-type]


def change_at(model: Branch, batch: Batch, frozen: FrozenInputs) -> Tensor:
    """Return g ⊙ f, (K)NH, at the predicting positions of a batch, in the dtype of the head."""
    h_BTR = batch_features(model, batch, frozen)
    h_NR = h_BTR.flatten(-3, -2).index_select(-2, batch.predict_N)
    with frozen.autocast():
        return model.change(h_NR.unsqueeze(-3)).to(frozen.dtype).squeeze(-3)
