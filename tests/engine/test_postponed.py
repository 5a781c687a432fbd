"""What the server's two processes leave out: torch in the one, torch's compiler in the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tinker import types

from tests.harness import MODEL, Server, datum, descendants

PROGRAM = """
import sys
from tinsmith.engine.postponed import postpone_compiler
postpone_compiler()
import torch, transformers.masking_utils
assert not {"triton", "torch._inductor", "torch._dynamo.utils"} & sys.modules.keys()
package = torch._dynamo
assert package.disable(len) is len
import torch._dynamo.utils
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert torch._dynamo is package
assert package.disable(len) is not len
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
"""


def test_who_compiles_gets_the_real_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "[2.0, 2.0]\n", done.stderr


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="a GPU's kernels are Triton's")
def test_a_server_loads_neither_torch_nor_its_engine_a_compiler(server: Server) -> None:
    with server.sdk() as client:
        training = client.create_lora_training_client(base_model=MODEL, rank=4).result()
        training.forward_backward([datum()], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=0.1)).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints([1, 2, 3])
        sampler.sample(prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=2)).result()
    assert server.process is not None
    (engine,) = descendants(server.process.pid)
    loaded = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, engine)}
    assert "libtorch" in loaded[engine]
    assert "libtriton" not in loaded[engine]
    assert "libtorch" not in loaded[server.process.pid]
