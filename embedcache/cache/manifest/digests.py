"""The seal: what is written once and never changes, told file by file.

Pass 0 publishes one of its tokens, documents and arrays as ``sealed.json``, so that a cache can be
verified before it is complete; the manifest holds it too, and one of what is kept of the base. Few
files are told in the seal itself; those of pass 0, which may be millions, in its digest tables.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedcache.cache.format.layout import SEALED
from embedcache.cache.manifest.digest_table import TableDigest
from embedcache.cache.manifest.file_record import FileRecord, check_files, record_file
from embedcache.cache.shards.errors import WAY_OUT, damaged
from embedcache.errors import CacheError
from embedcache.store.files import hash_json, publish_bytes

METADATA = "zarr.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """Files as they were written.

    ``metadata`` is every ``zarr.json`` verbatim, by path: Zarr believes whatever one says, and
    reads an empty object as a group without attributes, so readers compare all of it, and a repair
    restores it from here. ``digest_tables`` are of further files, by path (see `sealed_files`).
    """

    files: tuple[FileRecord, ...]
    metadata: dict[str, str]
    digest_tables: dict[str, TableDigest] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, folder: Path) -> Digests:
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
    def from_dict(cls, value: dict[str, Any]) -> Digests:
        """Return the seal that `to_dict` told; raises ``ValueError`` or ``TypeError`` else."""
        if not isinstance(value, dict) or set(value) != {"files", "metadata", "digest_tables"}:
            raise ValueError("it names no files")
        return cls(
            files=tuple(FileRecord(**record) for record in value["files"]),
            metadata=dict(value["metadata"]),
            digest_tables={
                name: TableDigest(**seal) for name, seal in value["digest_tables"].items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the seal as JSON-ready values."""
        return {
            "files": [asdict(record) for record in self.files],
            "metadata": self.metadata,
            "digest_tables": {name: asdict(seal) for name, seal in self.digest_tables.items()},
        }

    def to_text(self) -> str:
        """Return what ``sealed.json`` holds: the seal and its own SHA-256."""
        content = self.to_dict()
        return json.dumps(content | {"sha256": hash_json(content)}, indent=2) + "\n"

    @classmethod
    def parse(cls, text: str) -> Digests:
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

    def check(self, cache: Path) -> None:
        """Raise ``CacheError`` unless all but what digest tables tell is as it was written.

        Metadata is compared whole, files by `check_files`.
        """
        for name, text in self.metadata.items():
            if (fault := metadata_fault(cache / name, text)) is not None:
                raise damaged(cache / name, fault)
        check_files(cache, self.files)


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


def publish_digests(cache: Path, seal: Digests) -> None:
    """Publish ``sealed.json``."""
    publish_bytes(cache / SEALED, seal.to_text().encode())


def read_digests(cache: Path) -> Digests:
    """Read ``sealed.json``; raises ``CacheError`` where it is missing or damaged."""
    path = cache / SEALED
    try:
        return Digests.parse(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise damaged(path, "is missing") from error
    except ValueError as error:
        raise CacheError(f"{path} {error}. {WAY_OUT}") from error
