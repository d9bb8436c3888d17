"""Calibrating the ``transform`` codec on a sample of train, before the first block is written.

Axes: N sampled rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from embedcache.base.head import Head
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.transform import Calibration, TransformCodec, quantise, unit_rows
from embedcache.loss import linear_cross_entropy

Array = np.ndarray[Any, Any]

SAMPLE_ROWS = 65_536
"""Number of rows to calibrate on, if not `ROWS_PER_COMPONENT` for each component are more."""

ROWS_PER_COMPONENT = 16

BATCHES = 16
"""Smallest number of batches that rows are taken from, if train has as many."""

HEAD_ROWS = 4096
"""Rows over which the head's metric and the rise of the cross-entropy are computed."""

HEAD_TILE = 16_384
"""Rows of the head that are converted to float32 at a time."""

ISOTROPIC = 0.1
"""Weight of the identity in the metric: the branch also reads directions the head ignores."""

RIDGE = 1e-2

OCTAVES = 20
HALVINGS = 14


@dataclass(frozen=True, slots=True)
class Sample:
    """Sampled rows of one tap."""

    x_NH: torch.Tensor
    """Embeddings, float32 and on the calibrating device once `to` is called."""
    ids_N: Array
    """Token ids, on the host."""
    targets_N: Array
    """The following tokens, -1 for a token that is no target."""
    part_N: Array
    """The part of the corpus that each row comes from, ascending."""

    def to(self, device: torch.device) -> Sample:
        """Return the sample in float32 on a device."""
        return replace(self, x_NH=self.x_NH.to(device).float())

    def rows(self, keep_N: Array) -> Sample:
        """Return the rows where ``keep_N`` is true."""
        place = torch.from_numpy(np.flatnonzero(keep_N)).to(self.x_NH.device)
        kept = (values[keep_N] for values in (self.ids_N, self.targets_N, self.part_N))
        return Sample(self.x_NH[place], *kept)

    def held_out(self) -> Array:
        """Return the rows to leave out of the fit: every fourth part, or a quarter of the only one.

        Whole parts are held out, because neighbouring rows are alike and would flatter the fit.
        """
        part_N = np.unique(self.part_N, return_inverse=True)[1]
        if part_N[-1] == 0:
            part_N = np.arange(len(part_N)) * 4 // len(part_N)
        held_N: Array = part_N % 4 == min(3, part_N[-1])
        return held_N


def calibrate(
    sample: Sample,
    embedding_VH: torch.Tensor,
    *,
    head: Head | None,
    bits: float | None,
    quality: float | None = None,
) -> Calibration:
    """Fit a tap's transform on three quarters of a sample; find the step on the rest.

    Args:
        sample: rows of the tap.
        embedding_VH: the base's token embedding, on the host.
        head: the base's head, for the final tap: errors are weighted by their effect on the logits.
        bits: coded bits a value to reach, if no quality is given.
        quality: permitted rise of the base's cross-entropy from decoded embeddings, in nats.
    """
    held_N = sample.held_out()
    fit, held = sample.rows(~held_N), sample.rows(held_N)
    shape = _fit(fit, embedding_VH, head)
    codec = TransformCodec(replace(shape, step=1.0), embedding_VH)
    y_NH = codec.coefficients(held.x_NH, held.ids_N)
    finest = max(y_NH.square().mean().sqrt().item(), 1e-6) / 2 ** (OCTAVES // 2)

    def at(octave: float) -> Calibration:
        return replace(shape, step=finest * 2**octave)

    def too_coarse(octave: float) -> bool:
        if quality is not None and head is not None:
            return rise(at(octave), held, embedding_VH, head) > quality
        return coded_bits(y_NH, at(octave).step) < (bits or 0)

    found = at(_largest(too_coarse))
    measured = {"bits": round(coded_bits(y_NH, found.step), 4), "rows": float(len(fit.ids_N))}
    if head is not None and (held.targets_N >= 0).any():
        measured["rise"] = round(rise(found, held, embedding_VH, head), 4)
    return replace(found, measured=measured)


def _largest(too_coarse: Callable[[float], bool]) -> float:
    """Return the largest number of octaves that is not too coarse, by bisection."""
    low, high = 0.0, float(OCTAVES)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if too_coarse(middle) else (middle, high)
    return low


def _fit(fit: Sample, embedding_VH: torch.Tensor, head: Head | None) -> Calibration:
    """Return a calibration with a step of 1."""
    device = fit.x_NH.device
    mean_H = fit.x_NH.mean(dim=0)
    e_NH = unit_rows(embedding_VH[torch.from_numpy(fit.ids_N)].to(device))
    centre_H = e_NH.mean(dim=0)
    e_NH -= centre_H
    gram_HH = (e_NH.T @ e_NH).double()
    gram_HH.diagonal().add_(RIDGE * gram_HH.diagonal().mean())
    predictor_HH = torch.linalg.solve(gram_HH, (e_NH.T @ (fit.x_NH - mean_H)).double())
    predictor_HH = predictor_HH.bfloat16()
    residual_NH = fit.x_NH - mean_H - e_NH @ predictor_HH.float()
    root_HH = _root(_metric(fit, head))
    covariance_HH = root_HH @ torch.cov(residual_NH.T.double()) @ root_HH
    variance_H, axes_HH = torch.linalg.eigh(covariance_HH)
    forward_HH = root_HH @ axes_HH[:, variance_H.argsort(descending=True)]
    # Rounded for the disk; the forward transform is the inverse of what is stored.
    inverse_HH = torch.linalg.inv(forward_HH).bfloat16()
    return Calibration(
        mean_H=mean_H.cpu(),
        centre_H=centre_H.cpu(),
        predictor_HH=predictor_HH.cpu(),
        inverse_HH=inverse_HH.cpu(),
        step=1.0,
        measured={},
    )


def _metric(fit: Sample, head: Head | None) -> torch.Tensor:
    """Return the metric G [H, H], float64, in which an error e costs eᵀ G e.

    With a head, G is the Fisher information of its logits, E[Wᵀ (diag p - p pᵀ) W]: a small error
    causes half of its cost as divergence. Soft-capping is ignored.
    """
    H = fit.x_NH.shape[1]
    identity = torch.eye(H, dtype=torch.float64, device=fit.x_NH.device)
    if head is None:
        return identity
    x_NH = fit.x_NH[:: max(1, len(fit.x_NH) // HEAD_ROWS)]
    V = len(head.weight_VH)
    p_V = torch.zeros(V, device=x_NH.device)
    fisher_HH = torch.zeros_like(identity)
    tiles = [slice(start, start + HEAD_TILE) for start in range(0, V, HEAD_TILE)]
    for rows_NH in x_NH.split(512):
        p_NV = head(rows_NH.to(head.weight_VH.dtype)).float().softmax(dim=-1)
        p_V += p_NV.sum(dim=0)
        seen_NH = torch.zeros_like(rows_NH)
        for tile in tiles:
            seen_NH.addmm_(p_NV[:, tile], head.weight_VH[tile].float())
        fisher_HH -= seen_NH.double().T @ seen_NH.double()
    for tile in tiles:
        weight_CH = head.weight_VH[tile].float()
        fisher_HH += ((weight_CH.T * p_V[tile]) @ weight_CH).double()
    return fisher_HH / fisher_HH.diagonal().mean() + ISOTROPIC * identity


def _root(metric_HH: torch.Tensor) -> torch.Tensor:
    """Return the symmetric square root."""
    value_H, axes_HH = torch.linalg.eigh(metric_HH)
    return (axes_HH * value_H.clamp_min(0).sqrt()) @ axes_HH.T


def coded_bits(y_NH: torch.Tensor, step: float) -> float:
    """Return the stored bits a value of coefficients that are quantised with a step."""
    q_NH = quantise(y_NH, step)
    return 8 * len(CODERS["pco"].encode(q_NH.cpu().numpy())) / q_NH.numel()


def rise(calibration: Calibration, held: Sample, embedding_VH: torch.Tensor, head: Head) -> float:
    """Return the rise of the base's cross-entropy from exact to decoded rows, in nats a token."""
    places = np.flatnonzero(held.targets_N >= 0)
    if not len(places):
        return math.nan
    keep_N = np.zeros(len(held.targets_N), bool)
    keep_N[places[:: -(-len(places) // HEAD_ROWS)]] = True
    some = held.rows(keep_N)
    codec = TransformCodec(calibration, embedding_VH)
    dtype = head.weight_VH.dtype
    targets_N = torch.from_numpy(some.targets_N).to(some.x_NH.device)
    exact_N = linear_cross_entropy(some.x_NH.to(dtype), head, targets_N)
    decoded_NH = codec.decode(codec.encode(some.x_NH, some.ids_N), some.ids_N)
    decoded_N = linear_cross_entropy(decoded_NH.to(dtype), head, targets_N)
    return float((decoded_N - exact_N).double().mean())
