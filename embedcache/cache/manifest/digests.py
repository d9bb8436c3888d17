"""Digests: sizes and hashes of files that are written once and never change.

Pass 0 publishes the digests of tokens, documents and metadata as ``tokens.json``, so that a cache
can be verified before it is complete. The manifest repeats them and adds those of the base and of
the codec. A few files are listed one by one; those of pass 0, which may be millions, in digest
tables.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedcache.cache.format.layout import TOKENS_DIGESTS
from embedcache.cache.manifest.digest_table import TableDigest
from embedcache.cache.manifest.file_record import FileRecord, check_files, record_file
from embedcache.cache.shards.errors import REPAIR_HINT, damaged_error
from embedcache.errors import CacheError
from embedcache.store.files import hash_json, publish_bytes

METADATA = "zarr.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """Files as they were written.

    Attributes:
        files: files that are listed one by one.
        metadata: every ``zarr.json`` verbatim, by path. Zarr does not check metadata, and reads an
            empty object as a group without attributes; so readers compare all of it, and a repair
            restores it from here.
        digest_tables: digests of tables of further files, by path; see `TokenFiles`.
    """

    files: tuple[FileRecord, ...]
    metadata: dict[str, str]
    digest_tables: dict[str, TableDigest] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, folder: Path) -> Digests:
        """Return the digests of every file in ``folder``, by its path inside ``root``."""
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
        """Parse the value of `to_dict`; raises ``ValueError`` or ``TypeError`` for another."""
        if not isinstance(value, dict) or set(value) != {"files", "metadata", "digest_tables"}:
            raise ValueError("it names no files")
        return cls(
            files=tuple(FileRecord(**record) for record in value["files"]),
            metadata=dict(value["metadata"]),
            digest_tables={
                name: TableDigest(**table) for name, table in value["digest_tables"].items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the digests as JSON-ready values."""
        return {
            "files": [asdict(record) for record in self.files],
            "metadata": self.metadata,
            "digest_tables": {name: asdict(table) for name, table in self.digest_tables.items()},
        }

    def to_text(self) -> str:
        """Return the content of ``tokens.json``: the digests and their own SHA-256."""
        content = self.to_dict()
        return json.dumps(content | {"sha256": hash_json(content)}, indent=2) + "\n"

    @classmethod
    def parse(cls, text: str) -> Digests:
        """Parse the text of `to_text`; raises ``ValueError``, saying why, for another text."""
        try:
            value = json.loads(text)
            value.pop("sha256")
            digests = cls.from_dict(value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is no list of digests ({error})") from error
        if digests.to_text() != text:
            raise ValueError("does not match its own SHA-256: it was edited")
        return digests

    def check(self, cache: Path) -> None:
        """Raise ``CacheError`` unless metadata and listed files are as they were written.

        Metadata is compared whole, files by `check_files`; digest tables are checked when used.
        """
        for name, text in self.metadata.items():
            if (fault := metadata_fault(cache / name, text)) is not None:
                raise damaged_error(cache / name, fault)
        check_files(cache, self.files)


def metadata_fault(path: Path, text: str) -> str | None:
    """Return how a ``zarr.json`` differs from ``text``, naming its entries, or None if equal."""
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


def publish_digests(cache: Path, digests: Digests) -> None:
    """Publish ``tokens.json``."""
    publish_bytes(cache / TOKENS_DIGESTS, digests.to_text().encode())


def read_digests(cache: Path) -> Digests:
    """Read ``tokens.json``; raises ``CacheError`` where it is missing or damaged."""
    path = cache / TOKENS_DIGESTS
    try:
        return Digests.parse(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise damaged_error(path, "is missing") from error
    except ValueError as error:
        raise CacheError(f"{path} {error}. {REPAIR_HINT}") from error
