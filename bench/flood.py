"""Much work at once from one organization, until the process is ended: bench/fairness.py starts it.

    python bench/flood.py training|samples|queue URL KEY

Says "up" on a line of its own once the server is busy; for a queue, "queued" once everything waits.
"""

from __future__ import annotations

import asyncio
import sys

from engine_runs import MODEL, RANK, body, sequences

QUEUE = 500
PROTOBUF = {"Content-Type": "application/x-protobuf"}


async def flood(kind: str, url: str, key: str) -> None:
    import httpx

    from tinsmith.wire import tinsmith_pb2 as pb

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"{url}/api/v1/", headers={"X-API-Key": key}, timeout=120, limits=limits
    ) as http:

        async def post(path: str, **more: object) -> dict[str, object]:
            answer = await http.post(path, **more)  # type: ignore[arg-type]
            answer.raise_for_status()
            return dict(answer.json())

        async def until_done(request_id: object) -> None:
            asked = {"request_id": request_id, "allow_metadata_only": True}
            while (await http.post("retrieve_future", json=asked)).status_code == 408:
                pass

        session = str((await post("create_session", json={"tags": [], "sdk_version": "x"}))["session_id"])
        sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
        sampler = str((await post("create_sampling_session", json=sampling))["sampling_session_id"])
        numbers = iter(range(10**9))

        async def samples(tokens: int) -> object:
            ids = sequences([64])[0]
            wanted = {
                "sampling_session_id": sampler,
                "seq_id": next(numbers),
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": ids}]},
                "num_samples": 2,
                "sampling_params": {"max_tokens": tokens, "stop": []},
            }
            return (await post("asample", json=wanted))["request_id"]

        async def run(place: int) -> str:
            made = await post(
                "create_model",
                json={
                    "session_id": session,
                    "model_seq_id": place,
                    "base_model": MODEL,
                    "lora_config": {"rank": RANK},
                },
            )
            await until_done(made["request_id"])
            return str(made["model_id"])

        async def train(model: str, seq_id: int, lengths: list[int]) -> object:
            content = body(lengths, model, seq_id)
            return (await post("forward_backward", content=content, headers=PROTOBUF))["request_id"]

        async def training(model: str) -> None:
            waiting: list[object] = []
            for seq_id in range(1, 10**6):
                waiting.append(await train(model, seq_id, [512] * 4))
                if len(waiting) == 8:
                    await until_done(waiting.pop(0))

        async def sampling_client() -> None:
            while True:
                await until_done(await samples(256))

        work: list[asyncio.Task[None]] = []
        if kind == "training":
            models = [await run(place) for place in range(4)]
            work = [asyncio.create_task(training(model)) for model in models]
        elif kind == "samples":
            work = [asyncio.create_task(sampling_client()) for _ in range(64)]
        else:
            model = await run(0)
            message = pb.ForwardBackwardRequest.FromString(body([512] * 24, model))
            large = []
            for seq_id in range(1, QUEUE // 2 + 1):
                message.seq_id = seq_id
                large.append(message.SerializeToString())
            print("up", flush=True)
            sent = [post("forward_backward", content=each, headers=PROTOBUF) for each in large]
            pending = [each["request_id"] for each in await asyncio.gather(*sent)]
            pending += await asyncio.gather(*(samples(512) for _ in range(QUEUE // 2)))
            print("queued", flush=True)
            work = [asyncio.create_task(until_done(each)) for each in pending]
        if kind != "queue":
            await asyncio.sleep(2.0)
            print("up", flush=True)
        await asyncio.gather(*work)


if __name__ == "__main__":
    asyncio.run(flood(*sys.argv[1:]))
