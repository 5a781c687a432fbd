"""What is raised when a model cannot be served."""


class ModelError(Exception):
    """A model cannot be served; the message names the folder or file and the cause."""


def short(error: Exception) -> str:
    """What an error of somebody else's code says, in one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__
