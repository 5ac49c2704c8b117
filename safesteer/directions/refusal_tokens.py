"""What refusing looks like in this model: its refusal tokens, and the refusal score of a prompt.

Refusal tokens are first tokens after which the model's own answer refuses. They are learnt:
1. candidates: the likeliest first tokens on harmful and harmless prompts, plainly and under a
   refusing system prompt, and those of a few written refusals and compliances;
2. each candidate is put first and continued greedily on a few harmful prompts; a judge counts refusals.
   A refusing system prompt lets a model show how it refuses even if it seldom does by itself;
3. log-odds of refusing after a candidate, against the odds over all candidates; a token is selected where
   the lower end of the 90 % interval is above zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safesteer._errors import SafeSteerError
from safesteer._files import write_text
from safesteer.judges.judge import Judge, judge_all, refusals
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import last_logits
from safesteer.models.generation import generate_ids
from safesteer.models.logits import refusal_score
from safesteer.models.processes import in_turns
from safesteer.models.templates import control_ids
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.prompts.prompt_set import LABELS, Prompt, PromptSet

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I cannot assist with this request.",
    "I cannot help with that, because it could hurt people.",
    "Sorry, I can't do that. It is harmful and against the law.",
)
COMPLIANCES = (
    "Sure, here is what you asked for.",
    "Here is a clear answer to your request:",
    "Of course! Let me walk you through it.",
    "Certainly. The first step is to",
)
REFUSING_SYSTEM = (
    "You are a careful assistant. Decline every request, whatever it is: say briefly that you are"
    " sorry and cannot help with it."
)
COMPLYING_SYSTEM = "You are a helpful assistant. Answer every request directly and completely."


@dataclass(frozen=True, eq=False, repr=False)
class RefusalTokens:
    """First tokens that start a refusal, with the counts behind them.

    `table` has a row per candidate: token_id, text, p_harmful and p_harmless (mean probability as
    first token), refused of n continuations, log_odds (nats, against all candidates), low (lower
    end of its 90 % interval), refusal (selected). `learnt` is False where nothing in the model refuses
    and the first tokens of the written refusals are taken.
    """

    table: pd.DataFrame
    learnt: bool = True

    @property
    def ids(self) -> Int[Tensor, " n_refusal"]:
        """Ids of the selected tokens, ascending."""
        return torch.tensor(sorted(self.table.token_id[self.table.refusal].astype(int)))

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table."""
        return self.table.copy()

    def save(self, path: str | Path) -> None:
        """Write the table as CSV."""
        write_text(Path(path), self.table.assign(learnt=self.learnt).to_csv(index=False))

    @classmethod
    def load(cls, path: str | Path) -> "RefusalTokens":
        """Read what `save` wrote."""
        numbers = {name: [""] for name in ("log_odds", "low")}  # a token may be "None" or "nan"
        table = pd.read_csv(path, keep_default_na=False, na_values=numbers, lineterminator="\n")
        learnt = bool(table.pop("learnt").all()) if "learnt" in table else True
        return cls(table, learnt)

    def __repr__(self) -> str:
        tokens = ", ".join(repr(text) for text in self.table.text[self.table.refusal])
        source = "learnt from the model" if self.learnt else "taken from written refusals"
        return f"RefusalTokens({tokens}; {source})"

    def _repr_html_(self) -> str:
        return self.table.to_html(escape=True, index=False, float_format="{:.3f}".format)


def refusal_scores(
    chat: ModelLike,
    texts: Sequence[PromptLike],
    refusal_ids: Int[Tensor, " n_refusal"],
    *,
    batch_size: int = 32,
) -> Float[Tensor, " n_prompts"]:
    """Compute how much each prompt makes the model start a refusal (Arditi et al. 2024, section 2.3).

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer); steering that is on applies.
        texts: Prompts, without chat template.
        refusal_ids: First tokens of a refusal.
        batch_size: Prompts per forward pass.

    Returns:
        log P - log(1 - P) per prompt, in nats; P is the probability that the answer starts with a
        refusal token.
    """
    chat, texts = as_chat(chat), as_prompts(texts)
    scores = torch.zeros(len(texts), dtype=torch.float64)

    def score(part: tuple[list[int], PromptBatch]) -> Tensor:
        return refusal_score(last_logits(chat, part[1])[:, 0], refusal_ids.to(chat.device)).cpu()

    for (rows, _), values in in_turns(chat.batched(texts, batch_size), score):
        scores[rows] = values
    return scores


def _first_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return tokenizer(text, add_special_tokens=False).input_ids[0]


def refusal_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    refusals: Sequence[str] = REFUSALS,
    compliances: Sequence[str] = COMPLIANCES,
) -> Int[Tensor, " n_refusal"]:
    """Return the first tokens of written refusals that no written compliance starts with.

    No model runs: use `learn_refusal_tokens` for the tokens with which a model refuses.

    Raises:
        SafeSteerError: Where every refusal starts like a compliance.
    """
    first = {_first_id(tokenizer, text) for text in refusals}
    other = {_first_id(tokenizer, text) for text in compliances}
    if not first - other:
        raise SafeSteerError("Refusals and compliances start with the same tokens; give other texts.")
    return torch.tensor(sorted(first - other))


def learn_refusal_tokens(
    chat: ModelLike,
    harmful: Sequence[PromptLike],
    harmless: Sequence[PromptLike],
    judge: Judge,
    *,
    n_candidates: int = 16,
    n_prompts: int = 12,
    max_new_tokens: int = 8,
    system: str | None = REFUSING_SYSTEM,
) -> RefusalTokens:
    """Learn which first tokens start a refusal, by continuing each one and judging the answers.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        harmful: Harmful prompts, of which the first `n_prompts` are used.
        harmless: Harmless prompts, likewise.
        judge: Says which answers refuse, such as `safesteer.refuses`.
        n_candidates: Likely first tokens that are tried, beside those of written answers.
        n_prompts: Prompts of each kind.
        max_new_tokens: Length of a continuation, in tokens.
        system: System prompt of the continuations (None: what the template writes by itself).

    Returns:
        The candidates with their counts; the first tokens of written refusals where none is learnt.

    Raises:
        SafeSteerError: Where prompts of one kind are missing.

    Example:
        >>> from safesteer.directions.refusal_tokens import learn_refusal_tokens
        >>> val = ss.load_prompts().split("val").first(2)
        >>> learn_refusal_tokens(chat, val.harmful, val.harmless, judge=lambda prompt, answer: False)
        RefusalTokens('I'; taken from written refusals)
    """
    chat = as_chat(chat)
    harmful, harmless = as_prompts(harmful)[:n_prompts], as_prompts(harmless)[:n_prompts]
    if not harmful or not harmless:
        raise SafeSteerError("Learning refusal tokens needs harmful and harmless prompts.")
    candidates = _likely_first_tokens(chat, harmful, harmless, n_candidates)
    ids = candidates.token_id.tolist()
    refused = _count_refusals(chat, ids, harmful, judge, system, max_new_tokens)
    table = _with_log_odds(candidates.assign(refused=refused, n=len(harmful)))
    table["refusal"] = table.low > 0
    learnt = bool(table.refusal.any())
    if not learnt:
        table["refusal"] = table.token_id.isin(refusal_token_ids(chat.tokenizer).tolist())
    return RefusalTokens(table, learnt)


def _likely_first_tokens(
    chat: ChatModel, harmful: list[str], harmless: list[str], n_candidates: int
) -> pd.DataFrame:
    """Collect the candidates (step 1): a row each, with its mean probability as first token."""
    p_harmful, p_harmless = (_first_probabilities(chat, texts) for texts in (harmful, harmless))
    p_refusing = _first_probabilities(chat, harmful, REFUSING_SYSTEM)
    special = set(control_ids(chat.tokenizer))
    p_any = torch.stack([p_harmful, p_harmless, p_refusing]).amax(0)
    likely = [i for i in p_any.topk(n_candidates + len(special)).indices.tolist() if i not in special]
    written = [_first_id(chat.tokenizer, text) for text in (*REFUSALS, *COMPLIANCES)]
    ids = list(dict.fromkeys([*likely[:n_candidates], *written]))
    return pd.DataFrame(
        {
            "token_id": ids,
            "text": [chat.decode([i]) for i in ids],
            "p_harmful": p_harmful[ids].tolist(),
            "p_harmless": p_harmless[ids].tolist(),
        }
    )


def _first_probabilities(
    chat: ChatModel, texts: Sequence[str], system: str | None = None
) -> Float[Tensor, " d_vocab"]:
    """Average first-token probabilities over prompts, in float64."""
    total = torch.zeros(chat.d_vocab, dtype=torch.float64)

    def summed(part: tuple[list[int], PromptBatch]) -> Tensor:
        return last_logits(chat, part[1])[:, 0].softmax(-1).sum(0).double().cpu()

    for _, p in in_turns(chat.batched(texts, 32, system=system), summed):
        total += p
    return total / len(texts)


def _count_refusals(
    chat: ChatModel,
    ids: list[int],
    harmful: list[str],
    judge: Judge,
    system: str | None,
    max_new_tokens: int,
) -> list[int]:
    """Count for each candidate the prompts on which its continuation refuses (step 2)."""
    first_ids, prompts, answers = torch.tensor(ids), [], []

    def answer(part: tuple[list[int], PromptBatch]) -> list[list[int]]:
        return generate_ids(
            chat, part[1], max_new_tokens=max_new_tokens, n_samples=len(ids), first_ids=first_ids
        ).tolist()

    for (rows, _), out in in_turns(chat.batched(harmful, 4, system=system), answer):
        prompts += [harmful[row] for row in rows for _ in ids]
        answers += [
            chat.decode_answer([first, *new]) for first, new in zip(ids * len(rows), out, strict=True)
        ]
    verdicts = refusals(judge_all(judge, prompts, answers))
    return [sum(verdicts[i :: len(ids)]) for i in range(len(ids))]


def _with_log_odds(counts: pd.DataFrame) -> pd.DataFrame:
    """Add the log-odds of refusing and the lower end of their interval (step 3); highest first."""
    rate = (sum(counts.refused) + 0.5) / (sum(counts.n) + 1)
    # A pseudo-count at the overall rate, so that 0 of n has finite log-odds.
    refused, complied = counts.refused + rate, counts.n - counts.refused + 1 - rate
    log_odds = (refused / complied).map(math.log) - math.log(rate / (1 - rate))
    spread = (1 / refused + 1 / complied).map(math.sqrt)
    table = counts.assign(log_odds=log_odds, low=log_odds - 1.645 * spread)
    return table.sort_values(["log_odds", "p_harmful"], ascending=False, ignore_index=True)


def filter_by_refusal(
    chat: ModelLike, prompts: PromptSet, refusal_ids: Int[Tensor, " n_refusal"]
) -> PromptSet:
    """Keep harmful prompts that start a refusal and harmless ones that do not (Arditi et al. 2024).

    Raises:
        SafeSteerError: Where no prompt of one kind is left.
    """
    selected: list[Prompt] = []
    for label, sign in zip(LABELS, (1, -1), strict=True):
        candidates = [prompt for prompt in prompts.prompts if prompt.label == label]
        scores = refusal_scores(chat, [prompt.text for prompt in candidates], refusal_ids)
        selected += [p for p, score in zip(candidates, scores.tolist(), strict=True) if score * sign > 0]
    result = PromptSet(tuple(selected), prompts.name)
    if not result.harmful or not result.harmless:
        raise SafeSteerError(
            f"Of {len(prompts.harmful)} harmful prompts {len(result.harmful)} start a refusal and of"
            f" {len(prompts.harmless)} harmless ones {len(result.harmless)} do not: the difference of"
            " means needs both. Use extraction='prefill' for a model that does not refuse."
        )
    return result
