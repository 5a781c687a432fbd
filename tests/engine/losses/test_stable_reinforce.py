"""stable_reinforce: its value and gradient, and what it makes of claims about where tokens came from."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.reference import Reference
from tests.engine.test_training import Folder
from tests.engine.tiny import load, make_run, metrics, relative, request, tokens
from tinsmith.engine.aside import Aside, keep_loss, record
from tinsmith.engine.runs import Run
from tinsmith.engine.training import TrainingJob, run_pass
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.sampling import Sampled
from tinsmith.wire.training import ContentError, decode_request

NOW = 1_000_000.0
PROMPT = tokens(6, 1)
FIRST, SECOND = tokens(9, 2), tokens(5, 3)


def span(kind: str, sequence_id: str, length: int, offset: int = 0) -> pb.ProvenanceSpan:
    if kind == "prompt":
        inner = pb.PromptProvenanceSpan(sequence_id=sequence_id, offset=offset, length=length)
        return pb.ProvenanceSpan(prompt_tokens=inner)
    return pb.ProvenanceSpan(
        sampled_tokens=pb.SampledProvenanceSpan(sequence_id=sequence_id, offset=offset, length=length)
    )


@pytest.fixture
def recorded(tmp_path: Path, folder: Folder) -> str:
    """A session's folder with one request of two sequences, at their own model's logprobs."""
    run = make_run(load(folder("qwen3")))
    reference = Reference(folder("qwen3"), run)
    sampled = []
    for output in (FIRST, SECOND):
        lp = reference.logprobs(PROMPT + output).detach().numpy()[len(PROMPT) - 1 :]
        sampled.append(Sampled(np.array(output, np.int32), lp.astype(np.float32), "length"))
    record(str(tmp_path), "s:sample:0:7", PROMPT, sampled)
    for file in tmp_path.iterdir():
        os.utime(file, (NOW, NOW))
    return str(tmp_path)


def body(
    advantages: list[float],
    output: list[int] = FIRST,
    index: int = 0,
    *,
    logprobs: list[float] | None = None,
    kl_coeff: float = 0.0,
) -> pb.ForwardBackwardRequest:
    """One datum as the cookbook builds it: targets of the prompt are 0, spans name the sequence."""
    inputs = {"advantages": [0.0] * (len(PROMPT) - 1) + advantages}
    if logprobs is not None:
        inputs["logprobs"] = [0.0] * (len(PROMPT) - 1) + logprobs
    whole = PROMPT + output
    message = pb.ForwardBackwardRequest.FromString(
        request([whole], "stable_reinforce", inputs=[inputs], config={"kl_coeff": kl_coeff})  # type: ignore[list-item]
    )
    datum = message.data[0]
    targets = np.array(whole[1:], np.int64)
    targets[: len(PROMPT) - 1] = 0
    datum.loss_fn_inputs["target_tokens"].dense = targets.tobytes()
    name = f"s:sample:0:7:{index}"
    datum.model_input_spans.extend(
        [span("prompt", name, len(PROMPT)), span("sampled", name, len(output) - 1)]
    )
    datum.loss_fn_input_spans.extend(
        [span("prompt", name, len(PROMPT) - 1, 1), span("sampled", name, len(output))]
    )
    return message


def job_of(run: Run, message: pb.ForwardBackwardRequest, aside: Aside) -> TrainingJob:
    decoded = decode_request(message.SerializeToString(), "identity", 1 << 28)
    return TrainingJob(decoded, run.model, run.layout, run.weights, aside)


def train(run: Run, message: pb.ForwardBackwardRequest, aside: Aside) -> bytes:
    job = job_of(run, message, aside)
    for cut in job.cuts:
        run_pass([(job, cut)])
    assert job.gradients is not None
    run.accumulate(job.gradients)
    return job.result()


def formula(lp: Tensor, q: Tensor, a: Tensor, kl: float) -> Tensor:
    ratio = (lp.detach() - q).exp()
    weight = torch.where(a < 0, ratio.clamp(max=1.0), 1.0)
    return (-weight * a * lp + kl / 2 * (lp - q) ** 2).sum()


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("given", [False, True], ids=["recorded logprobs", "the datum's logprobs"])
def test_value_and_gradient_are_the_formulas(folder: Folder, recorded: str, kl: float, given: bool) -> None:
    run = make_run(load(folder("qwen3")), seed=2)  # not the policy that sampled
    rng = np.random.default_rng(1)
    advantages = rng.normal(size=len(FIRST)).astype(np.float32)
    q = Aside(recorded, NOW).sequence("s:sample:0:7:0", "x").logprobs
    if given:
        q = q + rng.normal(scale=0.5, size=len(q)).astype(np.float32)
    message = body(advantages.tolist(), logprobs=q.tolist() if given else None, kl_coeff=kl)
    out = train(run, message, Aside(recorded, NOW))
    reference = Reference(folder("qwen3"), run)
    n = len(PROMPT) - 1
    total = reference.run_loss(
        [PROMPT + FIRST],
        lambda _, lp: formula(lp[n:], torch.from_numpy(q), torch.from_numpy(advantages), kl),
    )
    assert metrics(out) == {"loss:sum": pytest.approx(total, rel=1e-5)}
    assert run.live.gradient is not None
    for slot, theirs in reference.gradients().items():
        for mine, other in zip(run.layout.views(run.live.gradient)[slot], theirs, strict=True):
            assert relative(mine, other) < 2e-5, slot


def test_on_the_sampling_policy_the_gradient_is_reinforces(folder: Folder, recorded: str) -> None:
    """That is importance_sampling's too, whose ratio is 1 then; and kl_coeff changes nothing."""
    advantages = np.linspace(-1, 1, len(FIRST)).tolist()
    gradients = []
    for loss, kl in (("stable_reinforce", 0.0), ("stable_reinforce", 1.0), ("importance_sampling", None)):
        run = make_run(load(folder("qwen3")))
        q = Aside(recorded, NOW).sequence("s:sample:0:7:0", "x").logprobs.tolist()
        message = body(advantages, logprobs=q, kl_coeff=kl or 0.0)
        if kl is None:
            message.loss_fn = loss
            message.loss_fn_config_v2.clear()
        train(run, message, Aside(recorded, NOW))
        assert run.live.gradient is not None
        gradients.append(run.live.gradient)
    assert relative(gradients[1], gradients[0]) < 1e-4
    assert relative(gradients[2], gradients[0]) < 1e-4


def test_several_turns_of_one_datum_name_their_own_sequences(folder: Folder, recorded: str) -> None:
    """O1 A1 O2 A2, as the cookbook merges a trajectory that grows by appending."""
    more = tokens(3, 9)
    prompt = PROMPT + FIRST + more
    record(
        recorded, "s:sample:0:8", prompt, [Sampled(np.array(SECOND), np.full(5, -1.0, np.float32), "stop")]
    )
    whole = prompt + SECOND
    advantages = [0.0] * 5 + [1.0] * 9 + [0.0] * 3 + [1.0] * 5
    message = pb.ForwardBackwardRequest.FromString(
        request([whole], "stable_reinforce", inputs=[{"advantages": advantages}])
    )
    one, two = "s:sample:0:7:0", "s:sample:0:8:0"
    message.data[0].model_input_spans.extend(
        [span("prompt", one, 6), span("sampled", one, 9), span("prompt", two, 3, 15), span("sampled", two, 4)]
    )
    message.data[0].loss_fn_input_spans.extend(
        [
            span("prompt", one, 5, 1),
            span("sampled", one, 9),
            span("prompt", two, 3, 15),
            span("sampled", two, 5),
        ]
    )
    now = time.time()
    for file in Path(recorded).iterdir():
        os.utime(file, (now, now))
    job = job_of(make_run(load(folder("qwen3"))), message, Aside(recorded, now))
    assert job.sequences[0].inputs["is_sampled"].tolist() == [0.0] * 5 + [1.0] * 9 + [0.0] * 3 + [1.0] * 5
    assert job.sequences[0].inputs["logprobs"][-5:].tolist() == [-1.0] * 5


class TestClaims:
    """What is not true, or cannot be known, is refused with the field and the place."""

    @pytest.fixture
    def run(self, folder: Folder) -> Run:
        return make_run(load(folder("qwen3")))

    def refused(self, run: Run, message: pb.ForwardBackwardRequest, folder: str, at: float = NOW) -> str:
        with pytest.raises(ContentError) as caught:
            job_of(run, message, Aside(folder, at))
        return str(caught.value)

    def test_without_spans(self, run: Run, recorded: str) -> None:
        message = body([1.0] * 9)
        del message.data[0].model_input_spans[:]
        del message.data[0].loss_fn_input_spans[:]
        assert "data[0] has no provenance spans" in self.refused(run, message, recorded)

    def test_half_of_them(self, run: Run, recorded: str) -> None:
        message = body([1.0] * 9)
        del message.data[0].model_input_spans[:]
        assert "model_input_spans cover 0 positions; they must cover all 14" in self.refused(
            run, message, recorded
        )

    @pytest.mark.parametrize("field", ["model_input_spans", "loss_fn_input_spans"])
    @pytest.mark.parametrize("more", [-1, 1])
    def test_spans_that_do_not_tile(self, run: Run, recorded: str, field: str, more: int) -> None:
        message = body([1.0] * 9)
        getattr(message.data[0], field)[1].sampled_tokens.length += more
        assert f"data[0].{field} cover {14 + more} positions" in self.refused(run, message, recorded)

    def test_spans_are_held_to_their_fields_for_every_loss(self, run: Run, recorded: str) -> None:
        message = body([1.0] * 9, logprobs=[0.0] * 9)
        message.loss_fn = "importance_sampling"
        message.loss_fn_config_v2.clear()
        job_of(run, message, Aside(None))  # nothing is recorded, and nothing has to be
        message.data[0].model_input_spans[0].prompt_tokens.length += 1
        assert "model_input_spans cover 15" in self.refused(run, message, recorded)

    def test_negative_numbers_and_missing_ids(self, run: Run, recorded: str) -> None:
        for change in ({"length": -1}, {"offset": -1}, {"sequence_id": ""}):
            message = body([1.0] * 9)
            for name, value in change.items():
                setattr(message.data[0].model_input_spans[1].sampled_tokens, name, value)
            assert "model_input_spans[1] must have a sequence_id" in self.refused(run, message, recorded)
        message = body([1.0] * 9)
        message.data[0].model_input_spans[1].Clear()
        assert "model_input_spans[1] is empty" in self.refused(run, message, recorded)

    def test_a_token_that_was_not_sampled(self, run: Run, recorded: str) -> None:
        message = body([1.0] * 9)
        targets = np.frombuffer(message.data[0].loss_fn_inputs["target_tokens"].dense, np.int64).copy()
        targets[8] = 511
        message.data[0].loss_fn_inputs["target_tokens"].dense = targets.tobytes()
        why = self.refused(run, message, recorded)
        assert f"loss_fn_input_spans[1] does not fit: target_tokens[8] is 511, but {FIRST[3]} was" in why

    @pytest.mark.parametrize("place", [2, 9])
    def test_an_input_that_was_not_there(self, run: Run, recorded: str, place: int) -> None:
        message = body([1.0] * 9)
        ids = np.frombuffer(message.data[0].model_input[0].encoded_text.tokens, np.int32).copy()
        ids[place] = 510
        message.data[0].model_input[0].encoded_text.tokens = ids.tobytes()
        assert f"does not fit: model_input[{place}] is 510" in self.refused(run, message, recorded)

    def test_another_sequence_of_the_same_request(self, run: Run, recorded: str) -> None:
        assert "does not fit" in self.refused(run, body([1.0] * 5, FIRST[:5], index=1), recorded)

    def test_more_than_was_sampled(self, run: Run, recorded: str) -> None:
        message = body([1.0] * 12, [*SECOND, *tokens(7, 5)], index=1)
        why = self.refused(run, message, recorded)
        assert "claims 11 tokens from 0 on; the sampled tokens of s:sample:0:7:1 are 5" in why

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("s:sample:0:7:2", "has the sequences 0 to 1"),
            ("s:sample:0:7:x", "has the sequences 0 to 1"),
            ("s:sample:0:9:0", "was not recorded in this session"),
            ("../../etc/passwd:0", "was not recorded in this session"),
            ("nonsense", "was not recorded in this session"),
        ],
    )
    def test_sequences_that_there_are_not(self, run: Run, recorded: str, name: str, says: str) -> None:
        message = body([1.0] * 9)
        for each in message.data[0].model_input_spans:
            getattr(each, each.WhichOneof("span")).sequence_id = name
        assert says in self.refused(run, message, recorded)

    def test_an_advantage_on_what_nobody_sampled(self, run: Run, recorded: str) -> None:
        message = body([1.0] * 9)
        advantages = np.ones(14, np.float32)
        message.data[0].loss_fn_inputs["advantages"].dense = advantages.tobytes()
        assert "['advantages'] is not 0 at position 0, which no sampled span covers" in self.refused(
            run, message, recorded
        )

    def test_settings_that_it_does_not_have(self, run: Run, recorded: str) -> None:
        message = body([1.0] * 9)
        message.loss_fn_config_v2["beta"].number = 1.0
        assert "loss_fn_config['beta'] is not known to stable_reinforce; it takes: kl_coeff" in self.refused(
            run, message, recorded
        )
        del message.loss_fn_config_v2["beta"]
        message.loss_fn_config_v2["kl_coeff"].Clear()
        assert "loss_fn_config['kl_coeff'] is neither a number nor a text" in self.refused(
            run, message, recorded
        )

    def test_a_file_that_was_damaged(self, run: Run, recorded: str) -> None:
        (file,) = Path(recorded).iterdir()
        file.write_bytes(file.read_bytes()[:40])
        os.utime(file, (NOW, NOW))
        assert "was recorded, but cannot be read" in self.refused(run, body([1.0] * 9), recorded)


class TestADay:
    def test_a_sequence_expires_after_a_day(self, folder: Folder, recorded: str) -> None:
        run = make_run(load(folder("qwen3")))
        job_of(run, body([1.0] * 9), Aside(recorded, NOW + 86_399))
        (file,) = Path(recorded).iterdir()
        os.utime(file, (NOW, NOW))
        with pytest.raises(ContentError, match=r"has expired: it was sampled or last .* 24\.0 hours ago"):
            job_of(run, body([1.0] * 9), Aside(recorded, NOW + 86_401))

    def test_each_use_begins_a_new_day_and_a_refused_one_does_not(
        self, folder: Folder, recorded: str
    ) -> None:
        run = make_run(load(folder("qwen3")))
        (file,) = Path(recorded).iterdir()
        with pytest.raises(ContentError):
            job_of(run, body([1.0] * 9, tokens(9, 77)), Aside(recorded, NOW + 80_000))
        assert file.stat().st_mtime == NOW
        for day in range(1, 4):
            job_of(run, body([1.0] * 9), Aside(recorded, NOW + 80_000 * day))
        assert file.stat().st_mtime == NOW + 240_000

    def test_a_request_that_waited_finds_what_it_found_when_it_arrived(
        self, folder: Folder, recorded: str
    ) -> None:
        run = make_run(load(folder("qwen3")))
        job_of(run, body([1.0] * 9), Aside(recorded, NOW + 50_000))
        job_of(run, body([1.0] * 9), Aside(recorded, NOW + 40_000))
        (file,) = Path(recorded).iterdir()
        assert file.stat().st_mtime == NOW + 50_000


def test_a_custom_loss_keeps_its_id_for_good(tmp_path: Path) -> None:
    folder = str(tmp_path / "not yet there")
    keep_loss(folder, "s:loss:0", b"{}")
    keep_loss(folder, "s:loss:0", b"{}")
    with pytest.raises(ContentError, match="another custom loss s:loss:0"):
        keep_loss(folder, "s:loss:0", b"[]")
    assert Aside(folder).loss("s:loss:0") == b"{}"
    with pytest.raises(ContentError, match=r"\['loss_id'\] is 's:loss:1'; this session has no such"):
        Aside(folder).loss("s:loss:1")
