"""The one error a user should ever read: a clear sentence that names the thing and the way out."""


class SafeSteerError(Exception):
    """A mistake or a limit the user can act on. The command line prints it without a traceback."""


def first_line(error: Exception) -> str:
    """The first line of what an error of another library says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
