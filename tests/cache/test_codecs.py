"""The codecs bf16 and int8 compared with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from embedcache.cache.codecs.integers import STATELESS, check_codec, codec_name
from embedcache.errors import UsageError

BF16, INT8 = STATELESS["bf16"], STATELESS["int8"]
NO_IDS = np.empty(0, np.int64)


def test_bf16_keeps_every_one_of_the_65536_bit_patterns() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16).reshape(-1, 32)
    x_NH = torch.from_numpy(bits).view(torch.bfloat16)
    stored = BF16.encode(x_NH, NO_IDS)["embeddings"]
    assert stored.dtype == torch.uint16
    assert np.array_equal(stored.numpy(), bits)  # -0.0, infinities, subnormals and payloads of NaN
    assert torch.equal(
        BF16.decode({"embeddings": stored}, NO_IDS).view(torch.uint16), x_NH.view(torch.uint16)
    )


def test_bf16_rounds_float32_to_nearest_even() -> None:
    halfway = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, math.inf, 2.0**-133]
    decoded = BF16.decode(BF16.encode(torch.tensor([halfway]), NO_IDS), NO_IDS)[0]
    assert decoded.tolist() == [1.0, 1 + 2**-6, 0.0, math.inf, 2.0**-133]
    assert math.copysign(1, decoded[2].item()) == -1


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 9)),
        elements=st.floats(-1e4, 1e4, width=32).map(lambda v: 0.0 if abs(v) < 1e-30 else v),
    )
)
def test_int8_is_within_half_a_step_of_each_token(x_NH: np.ndarray) -> None:
    stored = INT8.encode(torch.from_numpy(x_NH), NO_IDS)
    q_NH, scale_N = stored["embeddings"].numpy(), stored["scale"].numpy()
    assert q_NH.dtype == np.int8
    assert scale_N.dtype == np.float32
    assert q_NH.min(initial=0) >= -127
    error_NH = np.abs(q_NH * scale_N[:, None].astype(np.float64) - x_NH)
    assert (error_NH <= scale_N[:, None] * (0.5 + 1e-4)).all()


def test_int8_of_a_row_of_zeros_is_zeros_and_its_scale_is_usable() -> None:
    x_NH = torch.tensor([[0.0, 0.0], [3.0, -127.0]])
    stored = INT8.encode(x_NH, NO_IDS)
    assert stored["scale"].tolist() == [1.0, 1.0]
    assert INT8.decode(stored, NO_IDS).tolist() == x_NH.tolist()


def test_int8_decodes_to_the_product_in_bfloat16() -> None:
    q_NH = np.array([[1, -127], [3, 50]], np.int8)
    scale_N = np.array([0.37, 2.5], np.float32)
    decoded = INT8.decode(
        {"embeddings": torch.from_numpy(q_NH), "scale": torch.from_numpy(scale_N)}, NO_IDS
    )
    expected = torch.from_numpy(q_NH.astype(np.float32) * scale_N[:, None]).bfloat16()
    assert torch.equal(decoded, expected)


def test_only_train_is_lossy() -> None:
    assert codec_name("train", "int8") == "int8"
    assert codec_name("dev", "int8") == codec_name("test", "int8") == "bf16"


def test_the_error_for_an_unknown_codec_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"bf16, int8, transform.*Did you mean 'int8'"):
        check_codec("int")
