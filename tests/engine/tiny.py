"""Tiny random models in Hugging Face layout, and the engine's parts around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.runs import Run
from tinsmith.wire import tinsmith_pb2 as pb

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "intermediate_size": 128,
    "initializer_range": 0.1,
}
FAMILIES = ("llama", "llama-tied", "qwen3", "qwen3-tied", "qwen3-moe")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that the Qwen chat format needs."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
    )


def make_model(family: str, folder: Path, seed: int = 0) -> Path:
    """A model of `family` with random fp32 weights, saved in `folder`."""
    torch.manual_seed(seed)
    tied = family.endswith("-tied")
    kind = family.removesuffix("-tied")
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SIZES))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=16, tie_word_embeddings=tied, **SIZES))
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                head_dim=16,
                num_experts=8,
                num_experts_per_tok=2,
                moe_intermediate_size=64,
                tie_word_embeddings=tied,
                **SIZES,
            )
        )
    # The end tokens of a model without any of its own would be whatever id its config defaults to.
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_family(name: str, suffix: str, folder: Path, settings: dict) -> Path:
    """A random model of transformers' `name` family, with a config of the family's own class."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name.removesuffix('Text')}{suffix}")(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


IMAGE_TOKEN = 300
TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "initializer_range": 0.2,
}
TURN = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {  # the tower's own settings, and the language model's
    "Qwen3VL": (
        {**TOWER, "deepstack_visual_indexes": [0, 1]},
        {**SIZES, "head_dim": 16, "rope_parameters": {**TURN, "mrope_section": [4, 2, 2]}},
    ),
    "Qwen3_5": (
        TOWER,
        {
            **SIZES,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "rope_parameters": {**TURN, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
    ),
}


def make_vision_model(name: str, folder: Path) -> Path:
    """A random model with eyes: an image is a token for every 8 x 8 pixels, 64 at most."""
    torch.manual_seed(0)
    tower, language = VISION[name]
    config = getattr(transformers, f"{name}Config")(
        text_config=language,
        vision_config=tower,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 64 * 64}
    Qwen2VLImageProcessorPil(patch_size=4, size=size).save_pretrained(folder)
    return folder


DEVICE = torch.device("cpu")  # where models are loaded; test_gpu.py sets another one


def load(folder: Path, dtype: torch.dtype = torch.float32) -> BaseModel:
    return BaseModel(f"tests/{folder.name}", str(folder), DEVICE, dtype)


def make_run(model: BaseModel, rank: int = 8, seed: int = 1, *, random_b: bool = True, **flags: bool) -> Run:
    """A run whose B is random too, so that every gradient is alive."""
    run = Run.create("run", model, LoraSpec(rank=rank, seed=seed, **flags))
    if random_b:
        generator = torch.Generator().manual_seed(seed + 1000)
        for _, b in run.layout.views(run.live.params).values():
            b.copy_(torch.empty(b.shape).normal_(0, 0.05, generator=generator))
    return run


def tokens(length: int, seed: int, vocab: int = 512) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def tensor(values: Sequence[float] | Sequence[int] | np.ndarray, dtype: type = np.float32) -> pb.Tensor:
    array = np.asarray(values, dtype=dtype)
    return pb.Tensor(
        dense=array.tobytes(),
        dtype=pb.DTYPE_INT64 if dtype is np.int64 else pb.DTYPE_FLOAT32,
        shape=array.shape,
    )


def request(
    sequences: Sequence[Sequence[int]],
    loss_fn: str = "cross_entropy",
    *,
    inputs: Sequence[dict[str, Sequence[float]]] | None = None,
    config: dict[str, float] | None = None,
    forward_only: bool = False,
    seq_id: int = 1,
) -> bytes:
    """A serialized ForwardBackwardRequest that predicts each sequence's next tokens."""
    message = pb.ForwardBackwardRequest(
        model_id="run", seq_id=seq_id, loss_fn=loss_fn, forward_only=forward_only
    )
    for key, value in (config or {}).items():
        message.loss_fn_config_v2[key].number = value
    for i, ids in enumerate(sequences):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(ids[:-1], dtype=np.int32).tobytes()
        datum.loss_fn_inputs["target_tokens"].CopyFrom(tensor(ids[1:], np.int64))
        for key, values in (inputs[i] if inputs else {}).items():
            datum.loss_fn_inputs[key].CopyFrom(tensor(values))
    return message.SerializeToString()


def logprobs(output: bytes) -> list[np.ndarray]:
    """The per-datum logprobs of a ForwardBackwardOutput."""
    message = pb.ForwardBackwardOutput.FromString(output)
    found: list[np.ndarray] = []
    for record in message.loss_fn_outputs:
        field = record.fields["logprobs"]
        offsets = np.frombuffer(field.offsets, np.int64) // 4
        flat = np.frombuffer(field.data, np.float32)
        found += [flat[a:b].reshape(-1, *field.trailing_shape) for a, b in itertools.pairwise(offsets)]
    return found


def metrics(output: bytes) -> dict[str, float]:
    return dict(pb.ForwardBackwardOutput.FromString(output).metrics)


def relative(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """Norm of the difference over norm."""
    a, b = torch.as_tensor(a).double().cpu(), torch.as_tensor(b).double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
