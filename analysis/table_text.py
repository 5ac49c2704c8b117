"""How the tables of the pages write numbers and themselves."""

import re
from collections.abc import Iterable, Sequence

from safesteer._intervals import wilson


def markdown(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a Markdown table."""
    heads = list(titles)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(line)} |") for line in lines)


def percent(value: float) -> str:
    """Write a share as a whole percentage.

    Example:
        >>> percent(0.249)
        '25 %'
    """
    return f"{value:.0%}".replace("%", " %")


def ranged(value: float, low: float, high: float, form: str = ".0f", scale: float = 100) -> str:
    """Write a number with its interval, all in one form; rates as percentages.

    Example:
        >>> ranged(0.5, 0.4, 0.6), ranged(0.5, 0.4, 0.6, "+.1f", 1)
        ('50 (40 to 60)', '+0.5 (+0.4 to +0.6)')
    """
    middle, least, most = (f"{scale * number:{form}}" for number in (value, low, high))
    return f"{middle} ({least} to {most})"


def over_seeds(values: Sequence[float], form: str, scale: float) -> str:
    """Write the mean of the seeds with their range; one value stands alone."""
    if len(values) == 1:
        return f"{scale * values[0]:{form}}"
    return ranged(sum(values) / len(values), min(values), max(values), form, scale)


def rate_ranged(value: float, low: float, high: float) -> str:
    """Write a rate as a whole percentage, with its interval."""
    return ranged(value, low, high).replace(" (", " % (", 1)


def with_interval(value: float, n: int) -> str:
    """Write a rate with its 95 % interval over n prompts or rows."""
    return rate_ranged(value, *wilson(round(value * n), n))
