"""Training runs on an engine in this process, as the training benchmarks drive them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MODEL = "bench/model"
RANK = 32


def sequences(lengths: Sequence[int], vocab: int = 8192) -> list[list[int]]:
    """Random tokens, one more than each length."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, n + 1).tolist() for n in lengths]


def body(lengths: Sequence[int], run: str = "r", seq_id: int = 1, *, loss_fn: str = "cross_entropy") -> bytes:
    """A serialized forward_backward of sequences of these lengths."""
    from tinsmith.wire import tinsmith_pb2 as pb

    message = pb.ForwardBackwardRequest(model_id=run, seq_id=seq_id, loss_fn=loss_fn)
    for ids in sequences(lengths):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(ids[:-1], np.int32).tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = np.asarray(ids[1:], np.int64).tobytes(), pb.DTYPE_INT64
        target.shape.append(len(ids) - 1)
    return message.SerializeToString()


class Runs:
    """`count` runs; `step` gives forward_backward and optim_step to the first `busy` of them together."""

    def __init__(self, folder: Path, count: int, rank: int = RANK, memory: int = 12 << 30) -> None:
        from tinsmith.engine.commands import CreateAdapter, EngineConfig, LoraSpec, ModelSource
        from tinsmith.engine.engine import Engine

        spill = tempfile.mkdtemp()
        self.engine = Engine(
            EngineConfig((ModelSource(MODEL, str(folder)),), spill, "cpu", "bf16", memory=memory)
        )
        self.count = count
        for i in range(count):
            self._tell(CreateAdapter(f"r{i}", MODEL, LoraSpec(rank=rank, seed=i)))

    def _tell(self, *commands: object) -> None:
        from tinsmith.engine.commands import Done, Reply

        replies: list[Reply] = []
        for command in commands:
            self.engine.submit(command, replies.append)  # type: ignore[arg-type]
        while len(replies) < len(commands):
            self.engine.step()
        assert all(isinstance(r, Done) for r in replies), replies

    def step(self, request: bytes, busy: int | None = None) -> None:
        """Decoding of the requests and encoding of the results included."""
        from tinsmith.engine.commands import AdamParams, ForwardBackward, OptimStep

        names = [f"r{i}" for i in range(self.count if busy is None else busy)]
        self._tell(
            *(ForwardBackward(name, 1, request) for name in names),
            *(OptimStep(name, 2, AdamParams()) for name in names),
        )

    def publish(self, name: str) -> None:
        """The first run's weights as a sampler."""
        from tinsmith.engine.commands import Publish

        self._tell(Publish("r0", 3, name))
