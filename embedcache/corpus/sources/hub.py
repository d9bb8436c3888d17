"""Data sets of the Hugging Face hub, and data sets written by ``save_to_disk``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import CorpusSummary
from embedcache.corpus.sources.record_files import Record
from embedcache.errors import CorpusError, nearest


def is_saved_dataset(path: Path) -> bool:
    """Return whether ``save_to_disk`` of datasets wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def saved_records(
    path: Path, config: CorpusConfig, summary: CorpusSummary
) -> Iterator[tuple[int, Record]]:
    """Yield the records of a saved data set, numbered from 1.

    If the data set has splits, only ``dataset_split`` is read.

    Raises:
        CorpusError: the data set has no such split, or datasets is not installed.
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
                f"{', '.join(loaded)}.{nearest(config.dataset_split, loaded)} "
                f"Set `dataset_split=`, for example, to {next(iter(loaded), 'train')}."
            )
        loaded = loaded[config.dataset_split]
    yield from enumerate(loaded, 1)


def hub_records(
    name: str, config: CorpusConfig, summary: CorpusSummary
) -> Iterator[tuple[int, Record]]:
    """Yield the records of a hub data set or a local folder of data files, numbered from 1.

    Raises:
        CorpusError: the data set cannot be opened, or datasets is not installed.
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
            f"{str(error).strip()} If it has others, set `dataset_config=` or `dataset_split=`."
        ) from error
    yield from enumerate(loaded, 1)


def _import_datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{where}: reading this data set needs datasets. Run: pip install 'embedcache[data]'"
        ) from error
    return datasets
