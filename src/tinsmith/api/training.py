"""Training: everything that becomes a command of a run."""

from __future__ import annotations

import asyncio
import ipaddress

from starlette.requests import Request
from starlette.responses import Response

from tinsmith.service.runs import Receipt
from tinsmith.wire.compression import MAGIC, decompress_prefix
from tinsmith.wire.envelope import read_envelope
from tinsmith.wire.errors import BodyTooLarge, WireError
from tinsmith.wire.fields import parse_object
from tinsmith.wire.optimizers import config_of
from tinsmith.wire.requests import Target
from tinsmith.wire.training_json import read_target, to_protobuf

from .http import Call, json_response

_LARGEST_LOSS = 1 << 20  # bytes of a traced graph


async def create_model(call: Call) -> Response:
    return _receipt(await call.service.training.create_model(call.caller, await call.fields()))


async def create_custom_loss(call: Call) -> Response:
    body = await call.body()
    if len(body) > _LARGEST_LOSS:
        raise WireError("graph", f"the request has {len(body)} bytes; at most {_LARGEST_LOSS} are allowed")
    return _receipt(await call.service.losses.create(call.caller, parse_object(body)))


async def forward(call: Call) -> Response:
    """SDKs before 0.27 ask for a forward pass here."""
    return await _from_json(call, forward_only=True)


async def forward_backward(call: Call) -> Response:
    """The body goes on as it came; here it is only found out whose it is. One that is too large but
    says whose it is fails through its future, like everything else that is wrong with its content."""
    if call.media_type == "application/json":
        return await _from_json(call, forward_only=False)
    training = call.service.training
    try:
        raw, compressed = await call.raw_body()
        body = await call.decompress(raw) if compressed else raw
    except BodyTooLarge as error:
        envelope = read_envelope(_plain(error.prefix), cut=True)
        target = Target(envelope.model_id, envelope.seq_id)
        return _receipt(await training.refuse(call.caller, target, "forward_backward", str(error)))
    envelope = read_envelope(body)
    return _receipt(
        await training.forward_backward(
            call.caller,
            Target(envelope.model_id, envelope.seq_id),
            envelope.forward_only,
            raw,
            "zstd" if compressed else "identity",
        )
    )


async def _from_json(call: Call, *, forward_only: bool) -> Response:
    """A request of an SDK that sends JSON goes on as the protobuf that it would be today."""
    training = call.service.training
    target, fields = await asyncio.to_thread(read_target, await call.body())
    try:
        body = await asyncio.to_thread(to_protobuf, target, fields, forward_only)
    except WireError as error:
        kind = "forward" if forward_only else "forward_backward"
        return _receipt(await training.refuse(call.caller, target, kind, str(error)))
    return _receipt(await training.forward_backward(call.caller, target, forward_only, body, "identity"))


async def optim_step(call: Call) -> Response:
    return _receipt(await call.service.training.optim_step(call.caller, await call.fields()))


async def save_weights(call: Call) -> Response:
    return _receipt(await call.service.training.save_weights(call.caller, await call.fields()))


async def save_weights_for_sampler(call: Call) -> Response:
    return _receipt(await call.service.training.save_weights_for_sampler(call.caller, await call.fields()))


async def save_weights_external(call: Call) -> Response:
    return _receipt(await call.service.training.save_weights_external(call.caller, await call.fields()))


async def load_weights(call: Call) -> Response:
    return _receipt(await call.service.training.load_weights(call.caller, await call.fields()))


async def get_info(call: Call) -> Response:
    """About a run's model. A client on this machine gets its tokenizer from this machine's disk."""
    run = await call.service.runs.get(call.caller, (await call.fields()).text("model_id"))
    model = call.service.context.model(run.row.base_model)
    tokenizer = model.tokenizer_path if _is_local(call.request) else model.name
    return json_response(
        {
            "type": "get_info",
            "model_id": run.row.id,
            "model_data": {
                "arch": model.architecture,
                "model_name": model.name,
                "tokenizer_id": tokenizer,
            },
            "optimizer_config": config_of(run.row.optimizer),
            "is_lora": True,
            "lora_rank": run.row.lora.get("rank"),
            "model_name": model.name,
        }
    )


def _is_local(request: Request) -> bool:
    if request.client is None or "x-forwarded-for" in request.headers or "forwarded" in request.headers:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _plain(prefix: bytes) -> bytes:
    """The beginning of a body, which may have been given up before it was decompressed."""
    return decompress_prefix(prefix) if prefix.startswith(MAGIC) else prefix


def _receipt(receipt: Receipt) -> Response:
    return json_response({"request_id": receipt.request_id, "model_id": receipt.model_id})
