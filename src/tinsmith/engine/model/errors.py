"""What is raised when a model cannot be served."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be served; the message names the folder or file and the cause."""

    def of(self, name: str) -> ModelError:
        """The same about the model that is served as `name`."""
        return self if str(self).startswith(name) else ModelError(f"{name}: {self}")


def short(error: Exception) -> str:
    """What an error of somebody else's code says, in one line."""
    said = " ".join(str(error).split())[:500]
    # A KeyError says the key and nothing else.
    return said if said and not isinstance(error, KeyError) else f"{type(error).__name__} {said}".rstrip()
