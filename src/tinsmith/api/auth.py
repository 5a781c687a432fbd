"""Tokens in exchange for keys, and what a key may know of itself."""

from __future__ import annotations

from starlette.responses import Response

from .http import Call, credential_of, json_response, time_text


async def token(call: Call) -> Response:
    """A short-lived identity, which is taken in the place of the key."""
    await call.body()
    return json_response({"jwt": await call.service.keys.token(credential_of(call.request))})


async def own_key(call: Call) -> Response:
    row = await call.service.keys.row(call.caller)
    return json_response(
        {
            "key_id": row.number,
            "name": row.name,
            "note": row.note or "",
            "details": {
                "org_details": {"name": row.org_name},
                "user_details": {"email": row.user_email or row.user_name},
            },
            # What the SDK does not ask for, and its user may want to know:
            "role": row.role,
            "scopes": sorted(row.scopes) if row.scopes is not None else None,
            "project_id": row.project_id,
            "expires_at": time_text(row.expires_at),
        }
    )


async def revoke_own_key(call: Call) -> Response:
    """Nobody can use the key any more, nor a token that was made from it."""
    await call.service.keys.revoke_own(call.caller)
    return json_response({})
