"""From a folder in Hugging Face layout, or a hub id, to transformers' own model on the device.

transformers builds the model, renames the checkpoint's tensors and ties them; what it would do with the
values (reading, fusing experts, casting, moving) happens here, a piece of a tensor at a time and straight
into its place on the device. So loading needs the weights' own memory once, and quantized checkpoints, which
become full weights on the way, look to transformers like any other. What can be known to be wrong is looked
for before the first weight is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils.logging import disable_progress_bar

from tinsmith.engine.model import quantization
from tinsmith.engine.model.blueprint import Blueprint, draw, fetch, use_own_experts
from tinsmith.engine.model.checkpoint import PIECE, Stored, Weights, open_checkpoint, read_json, weight_files
from tinsmith.engine.model.errors import ModelError, short
from tinsmith.engine.model.vision import attention_of, sees

log = logging.getLogger(__name__)

disable_progress_bar()  # a server's log is no place for it


@dataclass(frozen=True, slots=True)
class Loaded:
    """transformers' model and tokenizer, and what was found out about them."""

    module: Any
    tokenizer: Any
    folder: Path
    quantized: str


def load(
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    room: int | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """The model with its weights on `device`, in `dtype` but for those that the family keeps in fp32.

    `room` is how many bytes there are for the weights. Raises ModelError, before anything large is read
    wherever the fault can be seen from config, index and headers.
    """
    plan = draw(path, dtype, trust_remote_code=trust_remote_code)
    if room is not None and plan.nbytes > room:
        raise ModelError(
            f"{plan.folder}: its weights need {plan.nbytes} bytes in {str(dtype).removeprefix('torch.')}, "
            f"and {max(0, room)} are left for them on {device}. Serve a smaller model or raise --memory"
        )
    fetch(path, True, trust_remote_code)
    tokenizer = _tokenizer(plan, trust_remote_code)
    weights = quantization.full_weights(open_checkpoint(plan.folder), plan.raw)
    assigned = assign(plan.module, weights)
    missing = _check(plan, assigned)
    module = _build(plan, assigned, dtype)
    _fill(module, assigned.weights, device)
    _refuse_damaged(plan, module, assigned)
    module.tinsmith_missing = missing  # see Vision
    return Loaded(module.to(device), tokenizer, plan.folder, plan.quantized)


def _tokenizer(plan: Blueprint, trust_remote_code: bool) -> Any:
    folder, file = plan.folder, plan.folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    auto_map = settings.get("auto_map")
    code = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else auto_map
    named = settings.get("tokenizer_class")
    needs_code = (
        bool(code)
        and not (folder / "tokenizer.json").is_file()
        and (not isinstance(named, str) or tokenizer_class_from_name(named) is None)
    )
    if needs_code and not trust_remote_code:
        source = next((c for c in (code if isinstance(code, list) else [code]) if c), "")
        raise ModelError(
            f"{file}: the tokenizer {named} is code of the checkpoint's own "
            f"({str(source).rpartition('.')[0]}.py). It runs only with --trust-remote-code: set that if you "
            "trust whoever wrote it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=plan.config, trust_remote_code=needs_code)
        size = len(tokenizer)
        files = ["*.model", "*.tiktoken", "tekken.json", *tokenizer.vocab_files_names.values()]
    except Exception as error:
        raise ModelError(f"no tokenizer could be loaded from {folder}: {short(error)}") from error
    # Some classes make one up where there is none.
    if size == 0 or (tokenizer.vocab_files_names and not any(any(folder.glob(file)) for file in files)):
        raise ModelError(f"{folder} has no tokenizer: there is no tokenizer.json, nor another vocabulary")
    return tokenizer


# Which tensor of the files goes where


@dataclass(frozen=True, slots=True)
class Stacked:
    """Experts' matrices as one tensor [experts, rows, columns]: `parts[i][e]` is the ith part of expert e's
    rows."""

    parts: tuple[tuple[Weights, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first, *_ = (part[0].shape for part in self.parts)
        if len(self.parts) == 1:
            return (len(self.parts[0]), *first)
        return (len(self.parts[0]), sum(part[0].shape[0] for part in self.parts), *first[1:])

    @property
    def place(self) -> tuple[str, int]:
        return self.parts[0][0].place

    def read(self, into: Tensor) -> None:
        for expert, own in enumerate(zip(*self.parts, strict=True)):
            row = 0
            for part in own:
                rows = part.shape[0] if len(self.parts) > 1 else None
                part.read(into[expert] if rows is None else into[expert, row : row + rows])
                row += rows or 0


class _Slice:
    """Weights as transformers takes them from a file: read when it asks for `[...]`."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def __getitem__(self, key: object) -> Tensor:
        if isinstance(self._weights, Stored):
            return self._weights.whole()
        made = torch.empty(self._weights.shape, dtype=self._dtype)
        self._weights.read(made)
        return made


@dataclass(slots=True)
class Assigned:
    """Where the tensors of the files go. `weights`: by the model's own names. `others`: by the names in the
    files, those that transformers itself makes something else of; `made` of which model's tensors.
    `unused`: names in the files of which the model has none."""

    weights: dict[str, Weights]
    others: dict[str, Weights]
    made: set[str]
    unused: list[str]


def assign(module: Any, tensors: Mapping[str, Weights]) -> Assigned:
    """By transformers' own table of how published checkpoints differ from its models."""
    state = module.state_dict()
    mapping = get_model_conversion_mapping(module)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = module.base_model_prefix
    found = Assigned({}, {}, set(), [])
    stacks: dict[str, dict[str, list[Weights]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        final, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if final not in state and name in state:
            final, pattern = rename_source_key(name, [], [], prefix, state)
        if final not in state:
            found.unused.append(name)
            continue
        stored = tensors[name]
        if (
            isinstance(stored, Stored)
            and stored.dtype.is_floating_point < state[final].dtype.is_floating_point
        ):
            raise ModelError(
                f"{stored.file}: {name} is {str(stored.dtype).removeprefix('torch.')} without a scale, where "
                "weights are expected"
            )
        if pattern is None:
            found.weights[final] = tensors[name]
        elif _stacks(by_pattern[pattern]):
            order = stacks.setdefault(final, {p: [] for p in by_pattern[pattern].source_patterns})
            order[pattern].append(tensors[name])
        else:
            found.others[name] = tensors[name]
            targets = by_pattern[pattern].target_patterns
            found.made |= {final.replace(targets[0], target) for target in targets}
    for final, parts in stacks.items():
        counts = {pattern: len(part) for pattern, part in parts.items()}
        shapes = {(p, w.shape) for p, part in parts.items() for w in part}
        if len(set(counts.values())) > 1 or len(shapes) > len(parts):
            file = next(w for part in parts.values() for w in part).place[0]
            have = (
                f"{n} of {pattern}: " + " or ".join(str(list(s)) for p, s in sorted(shapes) if p == pattern)
                for pattern, n in counts.items()
            )
            raise ModelError(
                f"{file}: {final} is made of one matrix an expert, and the files have {'; '.join(have)}"
            )
        found.weights[final] = Stacked(tuple(tuple(part) for part in parts.values()))
    return found


def _stacks(converter: WeightConverter) -> bool:
    """Whether a conversion puts experts one above the other, and their parts side by side."""
    match converter.operations:
        case [MergeModulelist(dim=0)]:
            return len(converter.source_patterns) == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
    return False


def _check(plan: Blueprint, assigned: Assigned) -> frozenset[str]:
    """The weights of a vision tower that are in no file. Raises ModelError where others are absent or have
    another shape than the config's."""
    state = plan.module.state_dict()
    for name, weights in assigned.weights.items():
        if tuple(weights.shape) != tuple(state[name].shape):
            raise ModelError(
                f"{weights.place[0]}: {name} is {list(weights.shape)}, where config.json makes it "
                f"{list(state[name].shape)}"
            )
    have = assigned.weights.keys() | assigned.made
    for target, source in plan.module.all_tied_weights_keys.items():
        if target in have or source in have:
            have |= {target, source}
    ignored = [re.compile(p) for p in plan.module._keys_to_ignore_on_load_missing or ()]
    missing = [n for n in state if n not in have and not any(p.search(n) for p in ignored)]
    own = _tower(plan.module) if sees(plan.config) else frozenset()
    needed = [name for name in missing if name not in own]
    if needed:
        more = f" and {len(needed) - 3} more" if len(needed) > 3 else ""
        raise ModelError(
            f"{plan.folder}: its weight files lack {', '.join(needed[:3])}{more}, of the {len(state)} "
            "tensors that its config.json describes"
        )
    if assigned.unused:
        log.info("%s: %d tensors are not used: %s", plan.folder, len(assigned.unused), assigned.unused[:3])
    return frozenset(missing)


def _tower(module: Any) -> frozenset[str]:
    """The names of what is not the language model."""
    parts = (module.get_decoder(), module.get_output_embeddings())
    language = {id(x) for part in parts for x in part.state_dict(keep_vars=True).values()}
    return frozenset(name for name, x in module.state_dict(keep_vars=True).items() if id(x) not in language)


# The model, and its weights


def _build(plan: Blueprint, assigned: Assigned, dtype: torch.dtype) -> Any:
    """transformers' model with all that it computes by itself, and one number for all of every weight."""
    state = plan.module.state_dict()
    apart = untie(plan.module, assigned.weights)
    tensors: dict[str, Any] = {
        name: torch.full((), name in apart, dtype=state[name].dtype).expand(state[name].shape)
        for name in assigned.weights
    }
    tensors |= {name: _Slice(weights, dtype) for name, weights in assigned.others.items()}
    try:
        module, found = type(plan.module).from_pretrained(
            None,
            config=plan.module.config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=attention_of(plan.config),
            output_loading_info=True,
        )
        if (plan.folder / "generation_config.json").is_file():
            module.generation_config = _generation_config(plan.folder)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{plan.folder}: the model could not be loaded: {short(error)}") from error
    wrong = set(found["missing_keys"]) - _tower(module) if sees(plan.config) else found["missing_keys"]
    if wrong:
        raise ModelError(f"{plan.folder}: its weight files lack {', '.join(sorted(wrong)[:3])}")
    use_own_experts(module)
    return module


def _generation_config(folder: Path) -> GenerationConfig:
    found = GenerationConfig.from_pretrained(folder)
    ids = found.eos_token_id
    if not all(isinstance(i, int) for i in (ids if isinstance(ids, list) else [ids]) if ids is not None):
        raise ModelError(
            f"{folder / 'generation_config.json'}: eos_token_id must be a token id or a list of them, "
            f"not {ids!r}"
        )
    return found


def untie(module: Any, weights: dict[str, Weights]) -> set[str]:
    """Of weights that the config ties and that are both in the files: drop the second if it is the same, else
    name it, so that it stays apart."""
    apart = set()
    for target, source in module.all_tied_weights_keys.items():
        if target in weights and source in weights and target != source:
            if _same(weights[target], weights[source]):
                del weights[target]
            else:
                apart.add(target)
    return apart


def _same(a: Weights, b: Weights) -> bool:
    if not (isinstance(a, Stored) and isinstance(b, Stored)) or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.pieces(PIECE), b.pieces(PIECE), strict=True))


def _fill(module: Any, weights: Mapping[str, Weights], device: torch.device) -> None:
    """Give every weight its memory on `device` and its values, in the order of the files."""
    state = module.state_dict(keep_vars=True)
    owners: dict[int, list[tuple[dict[str, Any], str]]] = {}  # several of a tied one
    for child in module.modules():
        for own in (child._parameters, child._buffers):
            for leaf, old in own.items():
                owners.setdefault(id(old), []).append((own, leaf))
    for name in sorted(weights, key=lambda name: weights[name].place):
        old = state[name]
        new = torch.empty(old.shape, dtype=old.dtype, device=device)
        weights[name].read(new)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        for own, leaf in owners[id(old)]:
            own[leaf] = new


def _refuse_damaged(plan: Blueprint, module: Any, assigned: Assigned) -> None:
    """One such number among the unembedding's and every logprob of every run would be none."""
    for name, weight in module.named_parameters():
        # A sum is finite where all of it is, and takes no memory; a sum of large numbers may not be.
        if not weight.sum().isfinite() and not all(
            p.isfinite().all() for p in weight.reshape(-1).split(PIECE)
        ):
            file = assigned.weights[name].place[0] if name in assigned.weights else plan.folder
            raise ModelError(f"{file}: {name} has numbers that are not finite: the file is damaged")


def fingerprint(folder: Path) -> str:
    """Identity of a base: its config, its weight files' names, headers or index, and samples of the data."""
    digest = hashlib.sha256()
    config = read_json(folder / "config.json")
    fields = {k: v for k, v in config.items() if k not in ("transformers_version", "dtype", "torch_dtype")}
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for file in weight_files(folder):
        digest.update(file.name.encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
        else:
            with file.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                digest.update(f.read(min(size, 64 << 20)))
                # The header does not change with the values: take a little of the data along.
                for part in range(16):
                    f.seek(8 + size + (file.stat().st_size - 8 - size) * part // 16)
                    digest.update(f.read(4096))
    return digest.hexdigest()[:32]
