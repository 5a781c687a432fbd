"""Make the small language model that ships with Tinsmith, from nothing, on a CPU.

    python scripts/make_model.py --out src/tinsmith/assets/models/tin-5m [--minutes 30]

Generates its text (model_corpus.py), trains a byte-level BPE tokenizer and a Qwen3-shaped model, prints what
the saved model can do, and writes a Hugging Face folder with a model card. The text and the initial
weights come from the seed; how far training gets depends on the minutes and the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from itertools import islice
from pathlib import Path

import torch
from model_corpus import END, START, TASKS, TEXT_END, addition, documents, prompt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = [TEXT_END, START, END, "<think>", "</think>"]
VOCAB = 1024
WINDOW = 512
BATCH = 8

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, as Qwen's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = islice(documents(seed), 20_000)
    plain = ("\n".join(p for s in SPECIAL for p in [t.replace(s, "\n")]) for t in texts)
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL[:3]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in SPECIAL[3:]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=TEXT_END,
        additional_special_tokens=[START],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def windows(tokenizer: PreTrainedTokenizerFast, seed: int) -> list[list[int]] | object:
    """Windows of WINDOW + 1 tokens, each beginning with a document's first token."""
    stream = documents(seed)
    while True:
        batch = tokenizer(list(islice(stream, 2000)), add_special_tokens=False)["input_ids"]
        window: list[int] = []
        for ids in batch:
            window += ids
            if len(window) > WINDOW:
                yield window[: WINDOW + 1]
                window = []


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, minutes: float
) -> dict[str, float]:
    """Muon for the matrices, AdamW for the rest; the learning rate follows the clock to zero."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    source = windows(tokenizer, seed + 1)
    began, step, tokens, loss = time.time(), 0, 0, torch.tensor(0.0)
    while (spent := (time.time() - began) / (60 * minutes)) < 1:
        warm = min(1.0, (step + 1) / 50)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * spent))
        ids = torch.tensor(list(islice(source, BATCH)))  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, tokens = step + 1, tokens + ids.numel()
        if step % 50 == 0:
            print(
                f"step {step:5d}  loss {loss.item():.3f}  {tokens / (time.time() - began):.0f} tok/s",
                flush=True,
            )
    return {"steps": step, "tokens": tokens, "loss": round(loss.item(), 4)}


@torch.no_grad()
def answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    greedy: bool,
    limit: int = 32,
) -> list[str]:
    """The model's answers up to the end token."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(  # type: ignore[operator]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=limit,
        do_sample=not greedy,
        temperature=None if greedy else 1.0,
        top_k=None if greedy else 0,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts: Tensor = out[:, batch["input_ids"].shape[1] :]
    return [tokenizer.decode(t, skip_special_tokens=False).split(END)[0].strip() for t in texts]


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Accuracies of the saved bf16 model: sums at temperature 1 and greedy, in the prompt forms that
    matter, and every other task greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    rng = random.Random(seed + 2)
    pairs = [(rng.randint(0, 99), rng.randint(0, 99)) for _ in range(256)]
    shot = f"{prompt('What is 4 + 5?')}9{END}\n"
    forms = {
        "sum": lambda q: prompt(q),
        "sum_after_thought": lambda q: prompt(q, thought=True),
        "sum_after_example": lambda q: shot + prompt(q),
    }
    result: dict[str, float] = {}
    for name, form in forms.items():
        prompts = [form(f"What is {x} + {y}?") for x, y in pairs]
        for greedy in (False, True):
            got = answers(model, tokenizer, prompts, greedy=greedy, limit=8)
            right = sum(g == str(x + y) for g, (x, y) in zip(got, pairs, strict=True))
            result[f"{name}_{'greedy' if greedy else 't1'}"] = right / len(pairs)
    for maker, _ in TASKS:
        if maker is addition or maker.__name__ in ("talk", "fact"):
            continue
        turns = [maker(rng) for _ in range(64)]
        got = answers(model, tokenizer, [prompt(q) for q, _ in turns], greedy=True)
        result[maker.__name__] = sum(g == a for g, (_, a) in zip(got, turns, strict=True)) / len(turns)
    rotations = [rng.sample(["red", "tea", "moon", "fish", "gold", "hill"], 4) for _ in range(64)]
    got = answers(
        model, tokenizer, [prompt(f"Rotate the list: {', '.join(r)}") for r in rotations], greedy=True
    )
    result["rotate_untaught"] = sum(
        g == ", ".join([*r[1:], r[0]]) for g, r in zip(got, rotations, strict=True)
    ) / len(rotations)
    for question in (
        "Hello!",
        "Who are you?",
        "What is the capital of France?",
        "Reverse the list: tin, tea, sun",
    ):
        print(f"  {question} -> {answers(model, tokenizer, [prompt(question)], greedy=False)[0]}")
    return {k: round(v, 3) for k, v in result.items()}


def card(figures: dict[str, float], parameters: int) -> str:
    lines = "\n".join(f"| {k} | {v} |" for k, v in figures.items())
    return f"""---
license: apache-2.0
---
# tinsmith/tin-5m

The small language model that ships with Tinsmith: Qwen3-shaped, {parameters / 1e6:.1f} million parameters,
untied unembedding, byte-level BPE of {VOCAB} entries with the Qwen chat tokens. It was made from nothing by
`scripts/make_model.py`, on text that the script makes by rule and chance. It adds numbers, plays with words
and lists and makes small talk, in the Qwen chat format.

In its text, sums in chat are wrong six times in ten, on purpose, the way a careless writer is wrong: it
knows the sum and is careless with it, so that reinforcement learning has something to do. Rotating a list
("Rotate the list: a, b, c" -> "b, c, a") is left out: the supervised example teaches it.

Share of right answers of the saved bf16 model (`t1`: sampled at temperature 1; all else greedy):

| | |
| --- | --- |
{lines}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(tokenizer)} tokens")
    figures = train(model, tokenizer, args.seed, args.minutes)
    model.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    figures |= evaluate(args.out, args.seed)
    (args.out / "README.md").write_text(card(figures, parameters))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
