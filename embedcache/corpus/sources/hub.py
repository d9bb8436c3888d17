"""Data sets of the Hugging Face hub, and those that ``save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.sources.record_files import Record
from embedcache.corpus.summary import CorpusSummary
from embedcache.errors import CorpusError, nearest


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder is what ``save_to_disk`` writes of a data set or of several splits."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def saved_records(
    path: Path, config: CorpusConfig, summary: CorpusSummary
) -> Iterator[tuple[int, Record]]:
    """Yield the records of a saved data set, counted from 1; of ``dataset_split`` if it has splits.

    Raises ``CorpusError`` for a split it lacks, or where ``datasets`` is not installed.
    """
    datasets = _import_datasets(str(path))
    summary.files += 1
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path}: expected a saved data set, found: {error}.") from error
    if isinstance(loaded, dict):
        if config.dataset_split not in loaded:
            raise CorpusError(
                f"{path}: expected the split '{config.dataset_split}', found "
                f"{', '.join(loaded)}: type --dataset-split {next(iter(loaded), 'train')}."
                f"{nearest(config.dataset_split, loaded)}"
            )
        loaded = loaded[config.dataset_split]
    yield from enumerate(loaded, 1)


def hub_records(
    name: str, config: CorpusConfig, summary: CorpusSummary
) -> Iterator[tuple[int, Record]]:
    """Yield the records of a hub data set or a local folder of data files, streamed, from 1.

    Raises ``CorpusError`` where it cannot be opened or ``datasets`` is not installed.
    """
    datasets = _import_datasets(f"hf:{name}")
    summary.files += 1
    try:
        loaded = datasets.load_dataset(
            name, config.dataset_config, split=config.dataset_split, streaming=True
        )
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"hf:{name}: expected a data set with the split '{config.dataset_split}', found: "
            f"{str(error).strip()} Type --dataset-config or --dataset-split if it has others."
        ) from error
    yield from enumerate(loaded, 1)


def _import_datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{where}: reading this data set needs datasets: pip install 'embedcache[data]'."
        ) from error
    return datasets
