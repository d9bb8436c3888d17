"""The seal: what is written once and never changes, told file by file.

Pass 0 publishes one of its tokens, documents and arrays as ``sealed.json``, so that a cache can be
verified before it is complete; the manifest holds it too, and one of what is kept of the base.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from embedcache.cache.damaged import WAY_OUT
from embedcache.cache.layout import SEALED
from embedcache.cache.records import FileRecord, check_files, record_file
from embedcache.errors import CacheError
from embedcache.files import hash_json, publish_bytes

METADATA = "zarr.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """Files as they were written.

    ``metadata`` is every ``zarr.json`` verbatim, by path: Zarr believes whatever one says, and
    reads an empty object as a group without attributes, so readers compare all of it, and a repair
    restores it from here.
    """

    files: tuple[FileRecord, ...]
    metadata: dict[str, str]

    @classmethod
    def of(cls, root: Path, folder: Path) -> Seal:
        """Return the seal of every file in ``folder``, by its path inside ``root``."""
        names = {
            path.relative_to(root).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return cls(
            files=tuple(
                record_file(path, name) for name, path in names.items() if path.name != METADATA
            ),
            metadata={
                name: path.read_bytes().decode()
                for name, path in names.items()
                if path.name == METADATA
            },
        )

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Seal:
        """Return the seal that `to_dict` told; raises ``ValueError`` or ``TypeError`` else."""
        if not isinstance(value, dict) or set(value) != {"files", "metadata"}:
            raise ValueError("it names no files")
        return cls(
            files=tuple(FileRecord(**record) for record in value["files"]),
            metadata=dict(value["metadata"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the seal as JSON-ready values."""
        return {"files": [asdict(record) for record in self.files], "metadata": self.metadata}

    def to_text(self) -> str:
        """Return what ``sealed.json`` holds: the seal and its own SHA-256."""
        content = self.to_dict()
        return json.dumps(content | {"sha256": hash_json(content)}, indent=2) + "\n"

    @classmethod
    def parse(cls, text: str) -> Seal:
        """Return the seal that `to_text` told; ``ValueError`` saying why for another text."""
        try:
            value = json.loads(text)
            value.pop("sha256")
            seal = cls.from_dict(value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is no list of sealed files ({error})") from error
        if seal.to_text() != text:
            raise ValueError("does not match its own SHA-256: it was edited")
        return seal

    def overlaid(self, new: Seal, *, gone: Collection[str] = ()) -> Seal:
        """Return the seal of what is there once the files of ``new`` are in place, others gone."""
        records = {record.path: record for record in (*self.files, *new.files)}
        kept = [record for path, record in records.items() if path not in gone]
        return Seal(
            files=tuple(sorted(kept, key=lambda record: PurePosixPath(record.path).parts)),
            metadata=self.metadata | new.metadata,
        )

    def check(self, cache: Path, *, but: Collection[str] = ()) -> None:
        """Raise ``CacheError`` unless all is as it was written, but for the files of ``but``.

        Metadata is compared whole, files by `check_files`.
        """
        for name, text in self.metadata.items():
            if (fault := metadata_fault(cache / name, text)) is not None:
                raise CacheError(f"{cache / name} {fault}: the cache is damaged. {WAY_OUT}")
        check_files(cache, (record for record in self.files if record.path not in but))


def metadata_fault(path: Path, text: str) -> str | None:
    """Return how a ``zarr.json`` differs from ``text``, naming its entries; None if it does not."""
    if not path.is_file():
        return "is missing"
    try:
        found = path.read_bytes()
        if found == text.encode():
            return None
        changed = _differences(json.loads(found), json.loads(text))
    except ValueError as error:
        return f"is no JSON ({error})"
    except OSError as error:  # a disk that is failing
        return f"cannot be read ({error.strerror})"
    return f"was edited ({', '.join(changed[:3]) or 'its spelling'})"


def _differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """Return the dotted places where two JSON values differ."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return [] if found == expected else [place or "all of it"]
    return [
        difference
        for key in sorted({*found, *expected})
        for difference in _differences(
            found.get(key), expected.get(key), f"{place}.{key}" if place else key
        )
    ]


def publish_seal(cache: Path, seal: Seal) -> None:
    """Publish ``sealed.json``."""
    publish_bytes(cache / SEALED, seal.to_text().encode())


def read_seal(cache: Path) -> Seal:
    """Read ``sealed.json``; raises ``CacheError`` where it is missing or damaged."""
    path = cache / SEALED
    try:
        return Seal.parse(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing: the cache is damaged. {WAY_OUT}") from error
    except ValueError as error:
        raise CacheError(f"{path} {error}. {WAY_OUT}") from error
