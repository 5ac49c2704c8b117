"""The one error a user should ever read: a clear sentence that names the thing and the way out."""


class SafeSteerError(Exception):
    """A mistake or a limit the user can act on. The command line prints it without a traceback."""


WAYS_OUT = {  # how to get a value of a kind that is easily mistaken for another; for all others: write one
    "Direction": "load one with ss.Direction.load(path), or make one of a vector with"
    " safesteer.directions.extraction.from_vector(chat, vector) and .direction(chat, 'given', layer)",
    "Tensor": "give a vector, such as direction.vector, or apply a direction with ss.steer(chat, direction)",
    "TokenSet": "select one with ss.select_tokens, or load one with ss.TokenSet.load(path)",
    "PromptSet": "make one with ss.PromptSet.from_texts(harmful, harmless) or .from_jsonl(path)",
}


def expect(kind: type, value: object) -> None:
    """Refuse an argument of another kind, in a sentence that says how to get one of this kind."""
    if not isinstance(value, kind):
        name = kind.__name__
        way_out = WAYS_OUT.get(name, f"write ss.{name}(...)")
        raise SafeSteerError(f"A {name} belongs here, and a {type(value).__name__} was given: {way_out}.")


def first_line(error: Exception, most: int = 300) -> str:
    """Return the first line with words of what an error of another library says, or its kind.

    A line of more than `most` characters ends after a word, in three dots.
    """
    lines = (line.strip() for line in str(error).splitlines() if any(map(str.isalnum, line)))
    line = next(lines, type(error).__name__)
    return line if len(line) <= most else f"{line[: most + 1].rsplit(' ', 1)[0][:most].rstrip(' ,;:')} ..."


def is_out_of_memory(error: Exception) -> bool:
    """Recognise it: torch's CPU allocator raises a RuntimeError, a library without memory an ImportError."""
    signs = ("out of memory", "allocate memory", "failed to map segment")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)
