"""Images in training data and prompts: what transformers makes of them, whatever the company and the room."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from tests.engine.reference import Reference
from tests.engine.test_sampler import PLENTY, ids, lps, run, sample
from tests.engine.test_training import job_of, train
from tests.engine.tiny import (
    IMAGE_TOKEN,
    VISION,
    load,
    logprobs,
    make_run,
    make_tokenizer,
    make_vision_model,
    relative,
    tensor,
    tokens,
)
from tinsmith.engine import sample_scheduler as module
from tinsmith.engine.commands import Sample
from tinsmith.engine.exactness import settle
from tinsmith.engine.model import vision
from tinsmith.engine.model.checks import check
from tinsmith.engine.sampler import Sampler
from tinsmith.engine.training import TrainingJob, run_pass
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.images import ImageChunk
from tinsmith.wire.training import ContentError

Folder = Callable[[str], Path]
Input = Sequence["list[int] | bytes"]  # text, and the bytes of png images


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("vision")

    def get(name: str) -> Path:
        return root / name if (root / name).exists() else make_vision_model(name, root / name)

    return get


def picture(width: int, height: int, seed: int = 0, form: str = "png", **options: object) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data = io.BytesIO()
    PIL.Image.fromarray(noise).save(data, form, **options)
    return data.getvalue()


def text(length: int, seed: int) -> list[int]:
    """Tokens without the model's special ones."""
    return tokens(length, seed, IMAGE_TOKEN)


SMALL, WIDE = picture(20, 30), picture(100, 40, 1)
INPUTS: list[Input] = [
    [text(5, 1), SMALL, text(30, 2)],
    [WIDE, text(9, 3), SMALL, text(4, 4), WIDE, text(70, 5)],
    [text(40, 6)],
]


def request(inputs: Sequence[Input], *, forward_only: bool = False) -> bytes:
    """A ForwardBackwardRequest that predicts each input's next tokens; its last one is a target alone."""
    message = pb.ForwardBackwardRequest(
        model_id="run", seq_id=1, loss_fn="cross_entropy", forward_only=forward_only
    )
    for each in inputs:
        datum = message.data.add()
        whole = flat(each)
        for i, part in enumerate(each):
            if isinstance(part, bytes):
                chunk = datum.model_input.add().image
                chunk.data, chunk.format = part, "png"
            else:
                own = part[:-1] if i == len(each) - 1 else part
                datum.model_input.add().encoded_text.tokens = np.asarray(own, np.int32).tobytes()
        datum.loss_fn_inputs["target_tokens"].CopyFrom(tensor(whole[1:], np.int64))
    return message.SerializeToString()


def grid(data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches and the grid [1, 3] that transformers' own processor makes of a png."""
    processor = AutoImageProcessor.from_pretrained(grid.folder, backend="pil")  # type: ignore[attr-defined]
    made = processor(images=[PIL.Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"]


@pytest.fixture(autouse=True)
def _processor(seeing: Folder) -> None:
    grid.folder = seeing("Qwen3VL")  # type: ignore[attr-defined]


def flat(each: Input) -> list[int]:
    """The tokens of an input with its placeholders."""
    found: list[int] = []
    for part in each:
        if isinstance(part, bytes):
            found += [IMAGE_TOKEN] * (int(grid(part)[1].prod()) // 4)
        else:
            found += part
    return found


def images(each: Input, length: int) -> dict[str, torch.Tensor]:
    """What transformers' forward takes beside the first `length` token ids of an input."""
    made = [grid(part) for part in each if isinstance(part, bytes)]
    if not made:
        return {}
    kinds = [int(t == IMAGE_TOKEN) for t in flat(each)[:length]]
    return {
        "pixel_values": torch.cat([p for p, _ in made]),
        "image_grid_thw": torch.cat([g for _, g in made]),
        "mm_token_type_ids": torch.tensor([kinds]),
    }


def prompt(name: str, each: Input, /, **options: object) -> Sample:
    """A sample request whose prompt is `each`."""
    ids: list[int] = []
    chunks: list[ImageChunk] = []
    for i, part in enumerate(each):
        if isinstance(part, bytes):
            chunks.append(ImageChunk(i, len(ids), part, "png"))
        else:
            ids += part
    return sample(name, ids, images=tuple(chunks), **options)


class TestTraining:
    @pytest.mark.parametrize("name", VISION)
    def test_logprobs_and_gradients_are_those_of_transformers(self, seeing: Folder, name: str) -> None:
        model = load(seeing(name))
        check(model)
        assert model.vision is not None
        trained = make_run(model)
        out = logprobs(train(trained, request(INPUTS)))
        reference = Reference(seeing(name), trained, auto=AutoModelForImageTextToText)
        for ours, each in zip(out, INPUTS, strict=True):
            whole = flat(each)
            theirs = reference.logprobs(whole, **images(each, len(whole) - 1))
            assert np.abs(ours - theirs.detach().numpy()).max() < 1e-5
            (-theirs.sum()).backward()
        assert trained.live.gradient is not None
        views = trained.layout.views(trained.live.gradient)
        for slot, theirs in reference.gradients().items():
            for mine, other in zip(views[slot], theirs, strict=True):
                assert other.norm() > 0
                # in_proj_a: transformers' own fp32 gradient is as far away from its float64 one.
                assert relative(mine, other) < (1e-4 if slot.endswith("in_proj_a") else 1e-5), slot

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("name", VISION)
    def test_company_changes_no_bit_with_images_or_without(
        self, seeing: Folder, name: str, dtype: torch.dtype
    ) -> None:
        model = load(seeing(name), dtype)

        def job(which: int, rank: int) -> TrainingJob:
            return job_of(make_run(model, rank, seed=which), request([INPUTS[which], INPUTS[which]]))

        together = [job(which, rank) for which, rank in ((1, 4), (2, 8), (0, 16), (1, 8))]
        run_pass([(each, cut) for each in together for cut in each.cuts])
        for each, (which, rank) in zip(together, ((1, 4), (2, 8), (0, 16)), strict=False):
            alone = job(which, rank)
            run_pass([(alone, cut) for cut in alone.cuts])
            assert all(np.array_equal(a, b) for a, b in zip(alone.outputs, each.outputs, strict=True))
            assert alone.gradients is not None
            assert each.gradients is not None
            assert torch.equal(alone.gradients.flat, each.gradients.flat)

    def test_the_adapters_are_those_of_the_language_model(self, seeing: Folder, tmp_path: Path) -> None:
        whole = AutoModelForImageTextToText.from_pretrained(seeing("Qwen3_5"))
        alone = transformers.Qwen3_5ForCausalLM(whole.config.text_config)
        alone.save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        assert load(tmp_path).slots == load(seeing("Qwen3_5")).slots

    def test_override_dimensions_resize_first(self, seeing: Folder) -> None:
        model = load(seeing("Qwen3VL"))
        resized = io.BytesIO()
        PIL.Image.open(io.BytesIO(WIDE)).resize((24, 40), PIL.Image.Resampling.BICUBIC).save(resized, "png")
        plain = [resized.getvalue(), text(9, 1)]
        message = pb.ForwardBackwardRequest.FromString(request([plain]))
        image = message.data[0].model_input[0].image
        image.data = WIDE
        image.override_dimensions.width, image.override_dimensions.height = 24, 40
        ours, theirs = (
            logprobs(train(make_run(model), body)) for body in (message.SerializeToString(), request([plain]))
        )
        assert np.array_equal(ours[0], theirs[0])


class TestSampling:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("name", VISION)
    def test_the_sampler_is_the_trainer(self, seeing: Folder, name: str, dtype: torch.dtype) -> None:
        model = load(seeing(name), dtype)
        runs = [make_run(model, rank, seed=rank) for rank in (8, 4, 8)]
        work = [
            (prompt(f"s{i}", each, max_tokens=20, stop=(), seed=i, prompt_logprobs=True), own.weights)
            for i, (each, own) in enumerate(zip(INPUTS, runs, strict=True))
        ]
        near = 1e-5 if dtype is torch.float32 else 2e-2
        for each, own, out in zip(INPUTS, runs, run(Sampler(model, PLENTY), *work, gap=2), strict=True):
            (sequence,) = out.sequences
            sampled = np.concatenate([np.frombuffer(out.prompt_logprobs, np.float32)[1:], lps(sequence)])
            (trained,) = logprobs(train(own, request([[*each, ids(sequence)]], forward_only=True)))
            if name == "Qwen3VL":
                assert np.array_equal(sampled, trained)
            else:
                assert relative(sampled, np.array(trained)) < near

    @pytest.mark.parametrize("name", VISION)
    def test_greedy_is_transformers_generate(self, seeing: Folder, name: str) -> None:
        reference = AutoModelForImageTextToText.from_pretrained(seeing(name), dtype=torch.float32)
        model = load(seeing(name))
        for each in INPUTS:
            whole = torch.tensor([flat(each)])
            expected = reference.generate(
                whole,
                attention_mask=torch.ones_like(whole),
                max_new_tokens=25,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **images(each, whole.shape[1]),
            )
            (out,) = run(
                Sampler(model, PLENTY), (prompt("g", each, max_tokens=25, stop=(), temperature=0.0), None)
            )
            assert ids(out.sequences[0]) == expected[0, whole.shape[1] :].tolist()

    @pytest.mark.parametrize("name", VISION)
    def test_company_chunks_and_room_change_no_bit(
        self, seeing: Folder, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(seeing(name))
        settle([model], 32)
        weights = make_run(model, 8).weights
        command = prompt("me", INPUTS[1], max_tokens=60, stop=(), seed=5, num_samples=3)
        if name != "Qwen3VL":  # chunks of a prompt are part of a recurrence's result
            monkeypatch.setitem(module.PREFILL_ROWS, "cpu", 48)
        (alone,) = run(Sampler(model, PLENTY), (command, weights))
        monkeypatch.setitem(module.PREFILL_ROWS, "cpu", 48)  # cuts through images
        monkeypatch.setattr(vision, "CACHE_BYTES", 0)
        others = [
            (prompt(f"o{i}", each, max_tokens=90, stop=(), seed=i), w)
            for i, (each, w) in enumerate(
                zip(INPUTS, (None, weights, make_run(model, 4, 9).weights), strict=True)
            )
        ]
        tight = Sampler(model, PLENTY)
        tight.pool.capacity = 12
        put_off: list[object] = []
        real = tight.scheduler.put_off
        monkeypatch.setattr(tight.scheduler, "put_off", lambda s: (put_off.append(s), real(s)))
        beside = run(tight, *others[:2], (command, weights), *others[2:], gap=2)[2]
        assert put_off, "the test wants a sequence that had to make room"
        for a, b in zip(alone.sequences, beside.sequences, strict=True):
            assert a.tokens == b.tokens
            assert a.logprobs == b.logprobs

    def test_another_image_is_another_prefix(self, seeing: Folder) -> None:
        sampler = Sampler(load(seeing("Qwen3VL")), PLENTY)
        same, other = ([text(20, 1), data, text(200, 2)] for data in (WIDE, picture(100, 40, 2)))
        outs = [
            run(sampler, (prompt(name, each, max_tokens=4, stop=(), seed=1), None))[0]
            for name, each in (("a", same), ("b", other), ("c", same))
        ]
        assert [out.prompt_cache_hit_tokens for out in outs] == [0, 0, 256]
        assert outs[0].sequences[0].logprobs == outs[2].sequences[0].logprobs
        # The very tokens, without the image that the placeholders stood for.
        (out,) = run(sampler, (sample("d", flat(same), max_tokens=1), None))
        assert out.prompt_cache_hit_tokens == 0

    def test_an_image_is_encoded_once(self, seeing: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        model = load(seeing("Qwen3VL"))
        assert model.vision is not None
        seen: list[object] = []
        encode = model.vision._encode
        monkeypatch.setattr(model.vision, "_encode", lambda *x: (seen.append(x), encode(*x))[1])
        trained = make_run(model)
        for _ in range(2):
            train(trained, request(INPUTS))
        run(Sampler(model, PLENTY), (prompt("a", INPUTS[1], max_tokens=2, num_samples=3), None))
        assert len(seen) == 2


class TestContent:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"expected_tokens": 7}, r"expected_tokens is 7; this model makes 8 tokens of the image"),
            ({"data": SMALL[:200]}, "cannot be decoded as png"),
            ({"data": b""}, "cannot be decoded as png"),
            ({"data": SMALL[:60] + b"\0" * 40 + SMALL[100:]}, "cannot be decoded as png"),
            ({"data": picture(20, 30, 0, "jpeg")}, "has the format 'png', but its data is jpeg"),
            ({"format": "gif"}, "has the format 'gif'; send 'png' or 'jpeg'"),
            ({"data": picture(900, 4)}, "cannot be shown to this model: absolute aspect ratio"),
            ({"size": (0, 5)}, "has the override_dimensions 0 x 5"),
            ({"size": (1 << 20, 1 << 20)}, "has the override_dimensions 1048576 x 1048576"),
        ],
    )
    def test_a_bad_image_is_refused_by_name(self, seeing: Folder, change: dict, message: str) -> None:
        model = load(seeing("Qwen3VL"))
        fields = {"data": SMALL, "format": "png", **change}
        command = sample("x", [1, 2], images=(ImageChunk(1, 2, **fields),))
        with pytest.raises(ContentError, match=rf"^prompt\.chunks\[1\]\.?.*{message}"):
            Sampler(model, PLENTY).add(command, None, lambda _: None)
        body = pb.ForwardBackwardRequest.FromString(request([[text(2, 1), SMALL, text(4, 2)]]))
        chunk = body.data[0].model_input[1].image
        chunk.data, chunk.format = fields["data"], fields["format"]
        if "expected_tokens" in fields:
            chunk.expected_tokens = fields["expected_tokens"]
        if "size" in fields:
            chunk.override_dimensions.width, chunk.override_dimensions.height = fields["size"]
        with pytest.raises(ContentError, match=rf"^data\[0\]\.model_input\.chunks\[1\]\.?.*{message}"):
            job_of(make_run(model), body.SerializeToString())

    def test_what_is_too_large_is_refused(self, seeing: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        model = load(seeing("Qwen3VL"))
        command = prompt("x", [SMALL, [1]])
        monkeypatch.setattr(vision, "MOST_PIXELS", 500)
        with pytest.raises(ContentError, match=r"chunks\[0\] has 20 x 30 pixels; at most 500"):
            Sampler(model, PLENTY).add(command, None, lambda _: None)
        monkeypatch.setattr(vision, "MOST_PIXELS", 600)
        monkeypatch.setattr(vision, "MOST_TOKENS", 7)
        with pytest.raises(ContentError, match=r"chunks\[0\] would become 8 tokens; .* at most 7"):
            Sampler(model, PLENTY).add(command, None, lambda _: None)

    def test_an_image_that_the_memory_cannot_hold_is_refused(self, seeing: Folder) -> None:
        model = load(seeing("Qwen3VL"))
        assert model.vision is not None
        model.vision.most_bytes = 10_000
        with pytest.raises(ContentError, match=r"chunks\[0\] has 32 patches, .* has 10000 for it"):
            job_of(make_run(model), request([[SMALL, [1, 2]]]))

    def test_two_images_need_something_between_them(self, seeing: Folder) -> None:
        model = load(seeing("Qwen3VL"))
        with pytest.raises(ContentError, match=r"chunks\[2\] stands directly behind another image"):
            job_of(make_run(model), request([[[1], SMALL, WIDE, [1, 2]]]))

    def test_placeholders_count_as_tokens(self, seeing: Folder) -> None:
        model = load(seeing("Qwen3VL"))
        model.max_context = 12
        with pytest.raises(ContentError, match=r"data\[0\].model_input has 13 tokens; the context"):
            job_of(make_run(model), request([[SMALL, text(6, 1)]]))
        with pytest.raises(ContentError, match="prompt has 13 tokens and max_tokens is 1"):
            Sampler(model, PLENTY).add(prompt("x", [SMALL, text(5, 1)], max_tokens=1), None, lambda _: None)
        message = pb.ForwardBackwardRequest.FromString(request([[SMALL, text(3, 1)]]))
        message.data[0].loss_fn_inputs["target_tokens"].CopyFrom(tensor([1, 2], np.int64))
        with pytest.raises(ContentError, match="N = 10, the length of model_input"):
            job_of(make_run(model), message.SerializeToString())

    def test_a_model_of_text_alone_refuses_images_by_name(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        with pytest.raises(
            ContentError, match=r"data\[0\]\.model_input\.chunks\[0\] is image; this model takes"
        ):
            job_of(make_run(model), request([[SMALL, [1, 2]]]))
        with pytest.raises(
            ContentError, match=r"prompt\.chunks\[0\] is image; this model takes encoded text"
        ):
            Sampler(model, PLENTY).add(prompt("x", [SMALL, [1]]), None, lambda _: None)

    def test_a_photograph_is_seen_upright(self, seeing: Folder) -> None:
        model = load(seeing("Qwen3VL"))
        assert model.vision is not None
        turned = PIL.Image.Exif()
        turned[0x0112] = 6  # to be turned by a quarter
        data = picture(100, 40, 1, "jpeg", exif=turned)
        made = model.vision.expand(np.zeros(1, np.int64), [ImageChunk(0, 0, data, "jpeg")], "x")
        ((_, image),) = made.images
        assert image.grid == (1, 24, 10)


class TestLoading:
    def test_positions_that_are_not_transformers_own_are_found_out(self, seeing: Folder) -> None:
        model = load(seeing("Qwen3VL"))
        assert model.vision is not None
        real = model.module.base_model.get_rope_index
        mine = type("Shifted", (), {})()
        mine.get_rope_index = lambda *a, **k: tuple(x.clamp(max=6) for x in real(*a, **k))
        mine.get_image_features = model.module.base_model.get_image_features
        model.vision._model = mine
        check(model)
        assert model.vision is None
        with pytest.raises(
            ContentError, match="takes no images here: Qwen3VLForConditionalGeneration treats"
        ):
            job_of(make_run(model), request([[SMALL, [1, 2]]]))

    def test_without_the_towers_weights_it_serves_text(self, seeing: Folder, tmp_path: Path) -> None:
        shutil.copytree(seeing("Qwen3_5"), tmp_path / "model")
        file = tmp_path / "model" / "model.safetensors"
        save_file({n: x for n, x in load_file(file).items() if "visual" not in n}, file, {"format": "pt"})
        model = load(tmp_path / "model")
        assert model.vision is None
        assert "no weights for its vision tower" in model.no_images

    def test_without_an_image_processor_it_serves_text(self, seeing: Folder, tmp_path: Path) -> None:
        shutil.copytree(seeing("Qwen3VL"), tmp_path / "model")
        (tmp_path / "model" / "preprocessor_config.json").unlink()
        model = load(tmp_path / "model")
        check(model)
        assert len(logprobs(train(make_run(model), request([INPUTS[2]])))) == 1
        with pytest.raises(
            ContentError, match=r"chunks\[0\] is image; .* image processor could not be loaded"
        ):
            job_of(make_run(model), request([[SMALL, [1, 2]]]))
