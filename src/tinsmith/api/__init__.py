"""HTTP: parse, authenticate, call the service, encode. No torch, no SQL."""

from .app import make_app

__all__ = ["make_app"]
