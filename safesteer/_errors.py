"""The one error a user should ever read: a clear sentence that names the thing and the way out."""


class SafeSteerError(Exception):
    """A mistake or a limit the user can act on. The command line prints it without a traceback."""


def first_line(error: Exception) -> str:
    """Return the first line with words of what an error of another library says, or its kind."""
    lines = (line.strip() for line in str(error).splitlines() if any(map(str.isalnum, line)))
    return next(lines, type(error).__name__)
