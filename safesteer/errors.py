"""The one error a user should ever read: a clear sentence that names the thing and the way out."""


class SafeSteerError(Exception):
    """A mistake or a limit the user can act on. The command line prints it without a traceback."""
