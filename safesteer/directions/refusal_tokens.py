"""What refusing looks like in this model: its refusal tokens, and the refusal score of a prompt.

Refusal tokens are first tokens after which the model's own answer refuses. They are learnt:
1. candidates: the likeliest first tokens on harmful and harmless prompts, plainly and under a
   refusing system prompt, and those of a few written refusals and compliances;
2. each candidate is put first and continued greedily on a few harmful prompts; a judge counts.
   A refusing system prompt lets a model show how it refuses even if it seldom does by itself;
3. log-odds of refusing after it, against the odds over all candidates; a token is kept where the
   lower end of the 90 % interval is above zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._files import write_text
from safesteer.judges.judge import judge_all, refusals
from safesteer.models.batch import PromptBatch, batches
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import last_logits
from safesteer.models.generation import cut_at_eos, generate_ids
from safesteer.models.logits import refusal_score
from safesteer.prompts.prompt_set import Prompt, PromptSet

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


def refusal_scores(
    chat: ChatModel,
    texts: list[str],
    refusal_ids: Int[Tensor, " n_refusal"],
    *,
    batch_size: int = 32,
) -> Float[Tensor, " n_prompts"]:
    """refusal_score of each prompt at its last position, in the order of `texts`."""
    scores = torch.zeros(len(texts), dtype=torch.float64)
    for rows, batch in chat.batched(texts, batch_size):
        scores[rows] = refusal_score(last_logits(chat, batch)[:, 0], refusal_ids.to(chat.device)).cpu()
    return scores


def refusal_token_ids(
    tokenizer,
    refusals: tuple[str, ...] = REFUSALS,
    compliances: tuple[str, ...] = COMPLIANCES,
) -> Int[Tensor, " n_refusal"]:
    """First tokens of written refusals that no written compliance starts with; no model is asked."""
    first = {tokenizer(t, add_special_tokens=False).input_ids[0] for t in refusals}
    other = {tokenizer(t, add_special_tokens=False).input_ids[0] for t in compliances}
    if not first - other:
        raise SafeSteerError("Refusals and compliances start with the same tokens; give other texts.")
    return torch.tensor(sorted(first - other))


@dataclass(frozen=True, eq=False, repr=False)
class RefusalTokens:
    """First tokens that start a refusal, with the counts behind them.

    `table` has a row a candidate: token_id, text, p_harmful and p_harmless (mean probability as
    first token), refused of n continuations, log_odds (nats, against all candidates), low (lower
    end of its 90 % interval), refusal (kept). `learnt` is False where nothing in the model refuses
    and the first tokens of the written refusals are taken.
    """

    table: pd.DataFrame
    learnt: bool = True

    @property
    def ids(self) -> Int[Tensor, " n_refusal"]:
        return torch.tensor(sorted(self.table.token_id[self.table.refusal].astype(int)))

    def to_frame(self) -> pd.DataFrame:
        return self.table.copy()

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.table.to_csv(index=False))

    def __repr__(self) -> str:
        kept = ", ".join(repr(t) for t in self.table.text[self.table.refusal])
        source = "learnt from the model" if self.learnt else "taken from written refusals"
        return f"RefusalTokens({kept}; {source})"

    def _repr_html_(self) -> str:
        return self.table.to_html(escape=True, index=False, float_format="{:.3f}".format)


def _first_probabilities(chat: ChatModel, texts: Sequence[str], system: str | None = None) -> Tensor:
    """Mean first-token probability over prompts, [d_vocab] in float64."""
    total = torch.zeros(chat.d_vocab, dtype=torch.float64)
    for rows, batch in chat.batched(texts, 32, system=system):
        total += last_logits(chat, batch)[:, 0].softmax(-1).sum(0).double().cpu()
    return total / len(texts)


def learn_refusal_tokens(
    chat: ChatModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refuses: Callable[[str, str], bool],
    *,
    n_candidates: int = 16,
    n_prompts: int = 12,
    max_new_tokens: int = 8,
    system: str | None = REFUSING_SYSTEM,
) -> RefusalTokens:
    """Learn which first tokens start a refusal, by continuing each one and judging the answers.

    Uses the first `n_prompts` of each kind. `refuses` is any judge (prompt, answer) -> bool;
    `system` is the system prompt of the continuations (None: the template's own).
    """
    harmful, harmless = list(harmful[:n_prompts]), list(harmless[:n_prompts])
    if not harmful or not harmless:
        raise SafeSteerError("Learning refusal tokens needs harmful and harmless prompts.")
    tokenizer, special = chat.tokenizer, set(chat.tokenizer.all_special_ids)  # type: ignore[attr-defined]
    p_harmful, p_harmless = (_first_probabilities(chat, texts) for texts in (harmful, harmless))
    refusing = _first_probabilities(chat, harmful, REFUSING_SYSTEM)
    likely = torch.stack([p_harmful, p_harmless, refusing]).amax(0).topk(n_candidates + len(special)).indices
    written = [tokenizer(t, add_special_tokens=False).input_ids[0] for t in (*REFUSALS, *COMPLIANCES)]  # type: ignore[operator]
    ids = [i for i in likely.tolist() if i not in special][:n_candidates]
    ids = list(dict.fromkeys([*ids, *written]))

    said: list[tuple[int, str, str]] = []
    first_ids = torch.tensor(ids)
    for rows in batches(tokenizer, harmful, 4, system=system):
        batch = PromptBatch.of(tokenizer, [harmful[r] for r in rows], system=system, device=chat.device)
        out = generate_ids(
            chat, batch, max_new_tokens=max_new_tokens, n_samples=len(ids), first_ids=first_ids
        )
        for at, new in enumerate(out.tolist()):
            i, text = ids[at % len(ids)], harmful[rows[at // len(ids)]]
            kept = [i, *cut_at_eos(new, chat.eos_ids, keep_eos=False)]
            answer = tokenizer.decode(kept, skip_special_tokens=True).strip()  # type: ignore[attr-defined]
            said.append((i, text, answer))
    verdicts = refusals(judge_all(refuses, [text for _, text, _ in said], [answer for _, _, answer in said]))
    refused = dict.fromkeys(ids, 0)
    for (i, _, _), verdict in zip(said, verdicts, strict=True):
        refused[i] += verdict

    n, rows = len(harmful), []
    rate = (sum(refused.values()) + 0.5) / (n * len(ids) + 1)
    for i in ids:
        # One more continuation of the usual kind keeps 0 of n finite, and at the usual odds.
        yes, no = refused[i] + rate, n - refused[i] + 1 - rate
        log_odds, spread = math.log(yes / no) - math.log(rate / (1 - rate)), math.sqrt(1 / yes + 1 / no)
        rows.append(
            {
                "token_id": i,
                "text": tokenizer.decode([i]),  # type: ignore[attr-defined]
                "p_harmful": float(p_harmful[i]),
                "p_harmless": float(p_harmless[i]),
                "refused": refused[i],
                "n": n,
                "log_odds": log_odds,
                "low": log_odds - 1.645 * spread,
            }
        )
    table = pd.DataFrame(rows).sort_values(["log_odds", "p_harmful"], ascending=False, ignore_index=True)
    table["refusal"] = table.low > 0
    learnt = bool(table.refusal.any())
    if not learnt:
        table["refusal"] = table.token_id.isin(refusal_token_ids(tokenizer).tolist())
    return RefusalTokens(table, learnt)


def filter_by_refusal(
    chat: ChatModel, prompts: PromptSet, refusal_ids: Int[Tensor, " n_refusal"]
) -> PromptSet:
    """Keep harmful prompts that refuse and harmless ones that do not (Arditi et al. 2024).

    Raises SafeSteerError where none is left of one kind.
    """
    kept: list[Prompt] = []
    for label, sign in (("harmful", 1), ("harmless", -1)):
        rows = [p for p in prompts.prompts if p.label == label]
        scores = refusal_scores(chat, [p.text for p in rows], refusal_ids)
        kept += [p for p, s in zip(rows, scores.tolist(), strict=True) if s * sign > 0]
    found = PromptSet(tuple(kept), prompts.name)
    if not found.harmful or not found.harmless:
        raise SafeSteerError(
            f"Of {len(prompts.harmful)} harmful prompts {len(found.harmful)} start a refusal and of"
            f" {len(prompts.harmless)} harmless ones {len(found.harmless)} do not: the difference of"
            " means needs both. Use extraction='prefill' for a model that does not refuse."
        )
    return found
