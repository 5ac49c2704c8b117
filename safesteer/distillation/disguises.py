"""What the student reads in a prompt's place, so that its refusals go deeper than a plain first word.

1. `disguise` puts a share of a step's prompts into a wrapper (families of the split "val"), and opens a share
   of the answers with the first tokens of a compliant text (openings of the split "train").
2. The student answers what it reads. The teacher of harmful answers reads the plain prompt and the tokens
   that follow the opening: it says what it would say had nobody tried. The teacher of harmless answers reads
   what the student reads, so that a wrapper or an opening alone is nothing to refuse.

Opened answers are those of Qi et al. (2024, arXiv 2406.05946), here on S and with a teacher's probabilities
in place of written refusals. Nothing here is what the suite "robust" measures with: families of the split
"test", and other openings.
"""

import random
from dataclasses import dataclass

from safesteer.models.chat_model import ChatModel
from safesteer.prompts.conversation import PromptLike
from safesteer.prompts.wrappers import load_openings, load_wrappers
from safesteer.settings import DistillConfig


@dataclass(frozen=True)
class Disguise:
    """A prompt as the student reads it, and the ids that its answer has been opened with."""

    prompt: PromptLike
    opening: tuple[int, ...] = ()


def disguises_any(config: DistillConfig) -> bool:
    """Say whether the student may read anything but the prompts."""
    return config.wrapped_share > 0 or config.opened_share > 0


def disguise(
    student: ChatModel, prompt: PromptLike, config: DistillConfig, key: tuple[int, ...] = ()
) -> Disguise:
    """Draw what the student reads in a prompt's place.

    Args:
        student: Its tokenizer cuts the opening.
        prompt: The plain prompt.
        config: The shares of wrapped prompts and of opened answers, and the longest opening.
        key: Of the random draw: the same key and prompt give the same disguise.

    Example:
        >>> from safesteer.distillation.disguises import disguise
        >>> disguise(chat, "Name a river.", ss.DistillConfig()).prompt
        'Name a river.'
        >>> len(disguise(chat, "Name a river.", ss.DistillConfig(opened_share=1, max_opening=1)).opening)
        1
    """
    draw, opening = random.Random(repr((key, prompt))), ()
    wrapped, opened = draw.random() < config.wrapped_share, draw.random() < config.opened_share
    if opened:
        ids = student.encode(draw.choice(load_openings("train")))
        opening = tuple(ids[: draw.randint(1, config.max_opening)])
    if wrapped:
        prompt = draw.choice(draw.choice(load_wrappers("val")).wrap(prompt, draw.randrange(2**31)))
    return Disguise(prompt, opening)
