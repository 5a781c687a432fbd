"""Sample requests as the SDK really serializes them; what is wrong is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tinker import types

from tests.wire.test_requests import _sent
from tinsmith.wire.errors import WireError
from tinsmith.wire.fields import Fields
from tinsmith.wire.sample_request import SampleRequest
from tinsmith.wire.targets import PromptTargets


def test_sample() -> None:
    fields = _sent(
        types.SampleRequest(
            sampling_session_id="s",
            seq_id=10**18,
            num_samples=2,
            prompt=types.ModelInput(
                chunks=[types.EncodedTextChunk(tokens=[1, 2]), types.EncodedTextChunk(tokens=[3])]
            ),
            sampling_params=types.SamplingParams(max_tokens=5, stop=[7, 8], top_k=-1),
            prompt_logprobs=True,
            topk_prompt_logprobs=3,
        )
    )
    request = SampleRequest.read(fields)
    assert np.frombuffer(request.prompt, np.int32).tolist() == [1, 2, 3]
    assert (request.sampling_session_id, request.seq_id, request.num_samples) == ("s", 10**18, 2)
    assert (request.stop, request.top_k, request.prompt_logprobs) == ((7, 8), -1, True)
    assert (request.topk_prompt_logprobs, request.seed) == (3, None)


@pytest.mark.parametrize(
    ("stop", "read"),
    [(None, None), ([], ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([1], (1,))],
)
def test_stop_in_all_its_forms(stop: object, read: object) -> None:
    body = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"stop": stop}, "base_model": "m"}
    assert SampleRequest.read(Fields(body)).stop == read


def targets_of(tensor: types.TensorData, length: int = 4) -> PromptTargets | None:
    """As SamplingClient.sample writes it."""
    from tinker.lib.public_interfaces.sampling_client import _tensor_data_to_model

    request = types.SampleRequest(
        base_model="m",
        prompt=types.ModelInput.from_ints(list(range(length))),
        sampling_params=types.SamplingParams(),
        target_prompt_logprobs=_tensor_data_to_model(tensor),
    )
    return SampleRequest.read(_sent(request)).targets


def test_targets_dense_and_sparse() -> None:
    ids = torch.tensor([[5, -1], [-1, -1], [7, 8]])
    dense = targets_of(types.TensorData.from_torch(ids))
    assert dense == PromptTargets(3, 2, ids.numpy().tobytes())
    wide = torch.full((3, 9), -1)
    wide[2, 4] = 0
    sparse = targets_of(types.TensorData.from_torch_sparse(wide, pad_value=-1))
    assert sparse is not None
    assert (sparse.rows, sparse.columns) == (3, 9)
    assert np.frombuffer(sparse.ids, np.int64).tolist() == [0]
    assert np.frombuffer(sparse.crow or b"", np.int64).tolist() == [0, 0, 0, 1]
    assert np.frombuffer(sparse.col or b"", np.int64).tolist() == [4]


GOOD = {"data": [1, 2, 3], "dtype": "int64", "shape": [3, 1]}


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"dtype": "float32"}, "dtype", "must be 'int64'"),
        ({"shape": [3]}, "shape", "len(prompt) - 1, K"),
        ({"shape": [-3, -1]}, "shape", "an integer from 0"),
        ({"shape": [3, "x"]}, "shape", "an integer from 0"),
        ({"shape": None}, "shape", "is missing"),
        ({"shape": [2, 1], "data": [1, 2]}, "shape", "for a prompt of 4 tokens it must have 3"),
        ({"data": [1, 2]}, "data", "has 2 values, but the shape [3, 1] needs 3"),
        ({"data": [1, 2, 0.5]}, "data", "integers"),
        ({"data": [1, 2, [3]]}, "data", "integers"),
        ({"data": [1, 2, 2**70]}, "data", "integers"),
        ({"data": [True, False, True]}, "data", "integers"),
        ({"sparse_crow_indices": [0, 1, 2, 3]}, "sparse_col_indices", "is missing"),
        (
            {"sparse_crow_indices": [0, 1, 2, 4], "sparse_col_indices": [0, 0, 0]},
            "sparse_crow_indices",
            "not a CSR tensor",
        ),
        (
            {"sparse_crow_indices": [0, 1, 2, 3], "sparse_col_indices": [0, 0, 1]},
            "sparse_crow_indices",
            "not a CSR tensor of shape [3, 1]",
        ),
        ({"sparse_crow_indices": [], "sparse_col_indices": []}, "sparse_crow_indices", "not a CSR tensor"),
    ],
)
def test_wrong_targets_are_named(change: dict[str, object], field: str, says: str) -> None:
    body = {
        "prompt": {"chunks": [{"tokens": [1, 2, 3, 4]}]},
        "base_model": "m",
        "target_prompt_logprobs": {**GOOD, **change},
    }
    with pytest.raises(WireError) as caught:
        SampleRequest.read(Fields(body))
    assert caught.value.field == f"target_prompt_logprobs.{field}"
    assert says in str(caught.value)


@pytest.mark.parametrize("last_n", [0, 4, -1, "x", 1.5])
def test_a_wrong_last_n_is_named(last_n: object) -> None:
    body = {
        "prompt": {"chunks": [{"tokens": [1, 2, 3, 4]}]},
        "base_model": "m",
        "prompt_logprobs": True,
        "prompt_logprobs_last_n": last_n,
    }
    with pytest.raises(WireError, match="prompt_logprobs_last_n"):
        SampleRequest.read(Fields(body))


def test_last_n_needs_prompt_logprobs() -> None:
    body = {"prompt": {"chunks": [{"tokens": [1, 2]}]}, "base_model": "m", "prompt_logprobs_last_n": 1}
    with pytest.raises(WireError, match="goes with prompt_logprobs"):
        SampleRequest.read(Fields(body))
