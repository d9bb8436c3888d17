"""The README of the format: its code reads what `Cache` reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.digest_tables import put_aside

import embedcache.cache
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import SPLITS, TABLES
from embedcache.cache.manifest.digests import read_digests
from embedcache.cache.tokens.files import TOKEN_ARRAYS

README = Path(embedcache.cache.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The names that the README's code defines."""
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code, README, "exec"), names)
    return names


def test_the_code_reads_every_sequence(
    caches: dict[str, Path], codec: str, documented: dict[str, Any]
) -> None:
    cache = Cache(caches[codec])
    for name in SPLITS:
        split = cache.split(name)
        for number in {0, split.manifest.blocks - 1}:  # the last is not full
            block = split.block(number)
            for sequence, (first, stop), document in zip(
                block.sequence_S.tolist(), block.rows_S2.tolist(), block.document_S, strict=True
            ):
                for tap in split.taps:
                    found = documented["read_sequence"](caches[codec], name, sequence, tap)
                    assert found[0] == split.documents[document]
                    assert np.array_equal(found[1], block.ids_N[first:stop])
                    assert np.array_equal(found[2], block.loss_mask_N[first:stop])
                    expected = block.x_NH[tap][first:stop]
                    x_TH = torch.from_numpy(found[3])
                    if codec == "transform" and name == "train":
                        torch.testing.assert_close(x_TH, expected.float(), rtol=2**-7, atol=1e-3)
                    else:
                        assert torch.equal(x_TH.bfloat16(), expected)


def test_the_code_finds_quarantined_sequences(copied: Path, documented: dict[str, Any]) -> None:
    assert documented["quarantined"](copied, "train") == set()
    put_aside(copied, "train", 0, (1, 2))
    assert documented["quarantined"](copied, "train") == {1, 2}


def test_the_tree_names_every_array_with_its_type(caches: dict[str, Path]) -> None:
    text = README.read_text()
    for name, (dtype, columns) in TOKEN_ARRAYS.items():
        (line,) = re.findall(rf"^ +{name} +(.*)$", text, re.MULTILINE)
        assert line.startswith(dtype)
        assert re.search(rf", {columns[0]}\]" if columns else r"\[[^,]*\]", line)
    order = [name.rpartition("/")[2] for name in TOKEN_ARRAYS]
    assert f"chunks of {', '.join(order)} |" in text
    arrays = {
        path.split("/", 1)[1] for path in read_digests(caches["int8"]).metadata if "/" in path
    }
    for name in ("embeddings/<tap>", "scale/<tap>", *TABLES):
        assert f"{name.replace('<tap>', 'final')}/zarr.json" in arrays
