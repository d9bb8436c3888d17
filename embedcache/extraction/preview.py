"""What an extraction would hold and take, without making it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedcache.base.forward import BlockForward
from embedcache.base.load import load_base, load_identity, load_tokenizer
from embedcache.base.locate import locate
from embedcache.base.taps import check_taps
from embedcache.cache.base_arrays import Cost
from embedcache.cache.blocks.commit import newest_generations
from embedcache.cache.format.layout import MANIFEST, SPLITS, ExtractSettings
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.corpus.config import CorpusConfig
from embedcache.device import resolve_device
from embedcache.extraction.calibrate_cache import (
    Calibrations,
    calibration_cost,
    calibrations_of,
    codecs_by_split,
)
from embedcache.extraction.measure import Measured, measure
from embedcache.extraction.plan import check_out, environment_for, sealed_attributes, write_tokens
from embedcache.extraction.prediction import Prediction
from embedcache.extraction.preflight import blocks_to_go, predict
from embedcache.extraction.sample import Known
from embedcache.extraction.store_base import base_cost
from embedcache.progress import SILENT, Progress
from embedcache.units import size


def preview(
    corpus: CorpusConfig,
    *,
    base: str,
    out: Path,
    settings: ExtractSettings,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = SILENT,
) -> tuple[Prediction, dict[str, Any]]:
    """Return what `extract` would hold and need, and the corpus's summary; ``out`` stays as it is.

    Tokens are sealed in the system's temporary folder (some 4 bytes each, removed at the end) and
    a few batches are run through the base, which is loaded for that. Where ``out`` was begun
    earlier, what is there is taken from it, and only the rest is predicted.
    """
    check_out(out)
    identity = load_identity(base, revision=revision)
    check_taps(settings.taps, identity.num_layers)
    target = resolve_device(device)
    environment = environment_for(out, target, dtype)
    attributes = sealed_attributes(out, corpus, identity, settings, environment)
    with _folder(out, sealed=attributes is not None) as folder:
        if attributes is None:
            tokenizer = load_tokenizer(base, revision=revision)
            attributes = write_tokens(
                corpus,
                tokenizer,
                identity,
                settings,
                environment,
                folder,
                progress,
                check_disk=False,
            )
        splits = {name: SplitTokens(folder, name, settings.block_tokens) for name in SPLITS}
        todo = blocks_to_go(
            splits, {name: set(newest_generations(folder, name)) for name in SPLITS}
        )
        calibrations: Calibrations = {}
        known: Known = {}
        loaded, measured, stored, spent = None, Measured(), Cost(), 0.0
        if todo and not (folder / MANIFEST).is_file():
            with progress.bar(f"loading the base ({_weights(base, revision)})", None, ""):
                loaded = load_base(
                    base, revision=revision, device=device, dtype=environment["dtype"]
                )
            started = time.perf_counter()
            forward = BlockForward(
                loaded,
                settings.taps,
                block_tokens=settings.block_tokens,
                batch_tokens=settings.batch_tokens,
            )
            calibrations, known = calibrations_of(
                folder,
                splits["train"],
                forward,
                loaded,
                settings,
                fresh=not newest_generations(folder, "train"),
            )
            codecs = codecs_by_split(settings, calibrations, loaded)
            measured = measure(loaded, forward, splits, todo, settings, codecs, progress)
            for item, batches in measured.known.items():
                known.setdefault(item, {}).update(batches)
            stored = base_cost(folder, loaded, None) + calibration_cost(folder, calibrations, None)
            spent = time.perf_counter() - started
        prediction = predict(
            folder,
            splits,
            todo,
            measured,
            base=loaded,
            stored=stored,
            known=known,
            spent=spent,
            out=out,
        )
    if folder != out:
        prediction = replace(prediction, bytes_to_go=prediction.bytes)
    return prediction, attributes.corpus["summary"]


@contextmanager
def _folder(out: Path, *, sealed: bool) -> Iterator[Path]:
    """Give the folder of a sealed pass 0: ``out``, or one that is removed afterwards."""
    if sealed:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="embedcache-") as scratch:
        yield Path(scratch)


def _weights(base: str, revision: str | None) -> str:
    """Return what the base's weights take, in words."""
    files = locate(base, revision=revision).glob("*.safetensors")
    return size(sum(path.stat().st_size for path in files))
