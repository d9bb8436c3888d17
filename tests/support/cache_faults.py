"""Damaging a cache's files at random, and reading all that a trainer reads."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import SPLITS


@dataclass(frozen=True)
class Damage:
    """The kind of damage, and the damaged files, one of which a report must name."""

    kind: str
    files: tuple[str, ...]


def names_in(cache: Path) -> list[str]:
    """Return every file of a finished cache, except the lock."""
    paths = sorted(path for path in cache.rglob("*") if path.is_file())
    return [path.relative_to(cache).as_posix() for path in paths if path.name != ".lock"]


def flip_bit(cache: Path, name: str, draw: random.Random) -> None:
    data = bytearray((cache / name).read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (cache / name).write_bytes(data)


def truncate(cache: Path, name: str, draw: random.Random) -> None:
    os.truncate(cache / name, draw.randrange(1, (cache / name).stat().st_size))


def empty(cache: Path, name: str, draw: random.Random) -> None:
    os.truncate(cache / name, 0)


def delete(cache: Path, name: str, draw: random.Random) -> None:
    (cache / name).unlink()


def _some_file(harm: Callable[[Path, str, random.Random], None]) -> Any:
    def damage(cache: Path, draw: random.Random) -> tuple[str, ...]:
        name = draw.choice(names_in(cache))
        harm(cache, name, draw)
        return (name,)

    return damage


def swap(cache: Path, draw: random.Random) -> tuple[str, ...]:
    """Exchange the files of two chunks or shards of one array."""
    arrays: dict[str, list[str]] = {}
    for name in names_in(cache):
        if match := re.fullmatch(r"(.+)/c/\d+(/0)?", name):
            arrays.setdefault(match[1], []).append(name)
    several = [names for names in arrays.values() if len(names) > 1]
    while True:  # two blocks may hold equal loss masks
        first, second = draw.sample(draw.choice(several), 2)
        one, other = (cache / first).read_bytes(), (cache / second).read_bytes()
        if one != other:
            break
    (cache / first).write_bytes(other)
    (cache / second).write_bytes(one)
    return first, second


def _edit(cache: Path, name: str, change: Callable[[Any], None]) -> tuple[str, ...]:
    value = json.loads((cache / name).read_text())
    change(value)
    (cache / name).write_text(json.dumps(value, indent=2))
    return (name,)


def edit_marker(cache: Path, draw: random.Random) -> tuple[str, ...]:
    """Change one entry of a marker, but not its hash."""

    def change(value: Any) -> None:
        key = draw.choice(["block", "attempt", "quarantined", "bytes", "sha256"])
        match key:
            case "block":
                value["block"] += 1
            case "attempt":
                value["attempt"] = "0" * 32
            case "quarantined":
                value["quarantined"] = [0]
            case "bytes":
                value["files"][0]["bytes"] += 1
            case "sha256":
                value["files"][-1]["sha256"] = "0" * 64

    return _edit(cache, _one(cache, draw, "commits/"), change)


def delete_marker(cache: Path, draw: random.Random) -> tuple[str, ...]:
    name = _one(cache, draw, "commits/")
    (cache / name).unlink()
    return (name,)


def edit_attribute(cache: Path, draw: random.Random) -> tuple[str, ...]:
    """Change an attribute of the root, or a count of a split, to a value that Zarr accepts."""
    name = draw.choice(["zarr.json", *(f"{split}/zarr.json" for split in SPLITS)])

    def change(value: Any) -> None:
        held = value["attributes"]["embedcache"]
        if name != "zarr.json":
            held[draw.choice(["sequences", "tokens", "targets"])] += 1
            return
        match draw.choice(["codec", "hidden", "taps", "block", "sources"]):
            case "codec":
                held["settings"]["codec"] = (
                    "bf16" if held["settings"]["codec"] != "bf16" else "int8"
                )
            case "hidden":
                held["base"]["hidden_size"] //= 2
            case "taps":
                held["settings"]["taps"].reverse()
            case "block":
                held["settings"]["block_tokens"] *= 2
            case "sources":
                held["corpus"]["config"]["sources"] = ["/elsewhere"]

    return _edit(cache, name, change)


def edit_array(cache: Path, draw: random.Random) -> tuple[str, ...]:
    """Change the codecs, shape, type or fill value of an array's metadata."""
    arrays = [
        name
        for name in names_in(cache)
        if name.endswith("zarr.json")
        and json.loads((cache / name).read_text())["node_type"] == "array"
    ]

    def change(value: Any) -> None:
        match draw.choice(["codecs", "shape", "data_type", "fill_value", "chunk_grid"]):
            case "codecs":
                value["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
            case "shape":
                value["shape"][0] *= 2
            case "data_type":
                value["data_type"] = "int16" if value["data_type"] != "int16" else "uint16"
            case "fill_value":
                value["fill_value"] = 7 if value["data_type"] != "bool" else True
            case "chunk_grid":
                value["chunk_grid"]["configuration"]["chunk_shape"][0] *= 2

    return _edit(cache, draw.choice(arrays), change)


def edit_digest_table(cache: Path, draw: random.Random) -> tuple[str, ...]:
    """Change a record or a page hash of a digest table, add a record, or exchange the table."""
    name = _one(cache, draw, "digests/")
    data = bytearray((cache / name).read_bytes())
    match draw.choice(["size", "sha256", "page hash", "one more", "another's"]):
        case "size":
            data[0] += 1 if data[0] < 255 else -1
        case "sha256":
            data[12:44] = bytes(32)
        case "page hash":
            data[-2:] = bytes(byte ^ 255 for byte in data[-2:])
        case "one more":
            data[-32:-32] = data[:44]
        case "another's":
            other = draw.choice([n for n in names_in(cache) if n.startswith("digests/")])
            data = bytearray((cache / other).read_bytes()) if other != name else data[:-1]
    (cache / name).write_bytes(data)
    return (name,)


def _one(cache: Path, draw: random.Random, start: str) -> str:
    return draw.choice([name for name in names_in(cache) if name.startswith(start)])


KINDS: dict[str, Callable[[Path, random.Random], tuple[str, ...]]] = {
    "bit flip": _some_file(flip_bit),
    "truncation": _some_file(truncate),
    "zero length": _some_file(empty),
    "deleted file": _some_file(delete),
    "swapped shards": swap,
    "edited marker": edit_marker,
    "deleted marker": delete_marker,
    "edited attribute": edit_attribute,
    "changed array": edit_array,
    "edited digest table": edit_digest_table,
}


def harm(cache: Path, seed: int) -> Damage:
    """Damage a cache: the kinds take turns, the rest is drawn from the seed."""
    kind = list(KINDS)[seed % len(KINDS)]
    return Damage(kind, KINDS[kind](cache, random.Random(seed)))


def served(path: Path) -> dict[str, bytes]:
    """Return everything that a trainer reads of a cache, as bytes by name."""
    cache = Cache(path)
    cache.require_taps(cache.attributes.settings.taps)
    found: dict[str, Any] = {
        "manifest": cache.manifest.hash,
        "attributes": cache.attributes.to_dict(),
        "head": cache.head_settings(),
    }
    for name in ("head/weight", "head/bias", "token_embedding/weight"):
        array = cache.base_array(name)
        found[name] = None if array is None else array.float().numpy().tobytes()
    for name in SPLITS:
        split = cache.split(name)
        found[f"{name}/documents"] = split.documents
        for number in range(split.manifest.blocks):
            block = split.block(number)
            for part in ("ids_N", "loss_mask_N", "rows_S2", "sequence_S", "document_S"):
                found[f"{name}/{number}/{part}"] = getattr(block, part).tobytes()
            for tap, x_NH in block.x_NH.items():
                found[f"{name}/{number}/{tap}"] = x_NH.float().numpy().tobytes()
    return {key: v if isinstance(v, bytes) else repr(v).encode() for key, v in found.items()}
