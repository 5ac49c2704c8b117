"""Other ways to teach refusing, from the same prompts and at the same budget, as curves.

    python analysis/methods.py RUN --data ROWS [--seed 0] [--methods ...] [--factors ...]

Claim (paper, Tables 1 and 2): distilling a steered teacher on fifty tokens gives the safety of other methods
at less over-refusal. Refuted where another curve lies above it on prompts that nothing trains on.

RUN is that of which_tokens.py. Every method takes 24 steps of 24 prompts, the same ones in the same order,
all weights, AdamW with warm-up and cosine, bfloat16 passes, and three rates: a third of its own, its own,
three times its own. After some steps the student answers the prompts of two_sided.py that are there for
choosing, and each is a row.

    two-sided on S     the preset: on harmless prompts the direction is ablated
    one-sided on S     the same, but there the teacher is the base
    published          Eq. 6 on S (minimum probability 1e-8), harmful prompts alone
    whole vocabulary   one-sided, over all tokens: on-policy distillation as it is usual
    top-k              one-sided, on the teacher's fifty likeliest tokens
    sft                the steered teacher's refusals, the base's own answers, as hard targets
    kl and margin      the refusals as targets; on harmless prompts KL to the base, and the tokens that open
                       refusals are kept below the best other first token
    dpo                the refusal before the base's answer where that complies, on harmless prompts the
                       base's answer before the teacher's
    sft early          sft, positions weighed as in the first rows: most on the first token, eight in all
    null space         sft, with each update kept out of what harmless prompts write to a layer's input; only
                       the maps that read the residual stream train
Without training stand gated steering and a constant on the openers (two_sided.py, its rows).
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus
from two_sided import COEFF, choosing_sets, look_while_training, opening_ids, training_prompts

import safesteer as ss
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import StepPrompts, Teacher
from safesteer.distillation.state import DistillState, prepare_student
from safesteer.distillation.step import learning_rate
from safesteer.models.batch import PromptBatch
from safesteer.models.forward import final_hidden
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.models.parts import blocks
from safesteer.tokens.token_set import TokenSet

CHECKS = (6, 12, 24)
N_TOKENS = 16  # of an answer that is a target
ROWS_PER_PASS = 4  # dpo keeps the logits of a better and a worse answer for each until it has the gradient
BETA = 0.1  # of dpo
MARGIN_WEIGHT = 6.0  # of the margin, in nats of KL; found on SmolLM2 (docs/log.md)
VARIANCE = 0.99  # of a layer's inputs that the null space leaves out
OURS = replace(ss.recipe("two-sided").distill, precision="bfloat16")
ONE_SIDED = replace(OURS, harmless_teacher="base")
RATES = {"sft": 1e-5, "sft early": 1e-5, "kl and margin": 1e-5, "dpo": 5e-6, "null space": 1e-5}
DISTILLED = {
    "two-sided on S": OURS,
    "one-sided on S": ONE_SIDED,
    "published": replace(
        OURS,
        divergence="reverse",
        normalizer="partial",
        rollouts="student",
        harmful_per_step=24,
        harmless_per_step=0,
        decay=1.0,
        on_fall="warn",
    ),
    "whole vocabulary": replace(ONE_SIDED, support="full", anchor_support="full"),
    "top-k": replace(ONE_SIDED, support="topk"),
}
METHODS = (*DISTILLED, *RATES)
FACTORS = (1.0, 1 / 3, 3.0)


@dataclass(frozen=True)
class Targets:
    """Answers by prompt, as ids: what the steered teacher and what the base says."""

    refusals: dict[str, list[int]]
    answers: dict[str, list[int]]
    steered: dict[str, list[int]]  # the teacher's to harmless prompts, which dpo rejects
    by_itself: frozenset[str] = frozenset()  # harmful prompts that the base refuses


@cache
def targets_of(base: ss.ChatModel, direction: ss.Direction, prompts: ss.PromptSet) -> Targets:
    """Let base and teacher answer what trains, once; what is no refusal is not taught as one."""

    def answered(texts: Sequence[str]) -> dict[str, list[int]]:
        answers = ss.generate(base, texts, max_new_tokens=N_TOKENS, batch_size=48)
        return {t: base.encode(a)[:N_TOKENS] for t, a in zip(texts, answers, strict=True) if a}

    answers = answered([*prompts.harmful, *prompts.harmless])
    with ss.steer(base, direction):
        steered = answered([*prompts.harmful, *prompts.harmless])
    harmful = set(prompts.harmful)

    def refused(texts: dict[str, list[int]]) -> set[str]:
        return {
            t
            for t, ids in texts.items()
            if t in harmful and ss.refuses(t, base.tokenizer.decode(ids, skip_special_tokens=True))
        }

    return Targets(
        {t: steered[t] for t in refused(steered)},
        answers,
        {t: ids for t, ids in steered.items() if t not in harmful},
        frozenset(refused(answers)),
    )


def answer_logits(
    chat: ss.ChatModel, prompts: Sequence[str], answers: Sequence[Sequence[int]]
) -> list[Float[Tensor, "new_pos d_vocab"]]:
    """Return the logits that predict each answer's tokens."""
    batch = PromptBatch.of(chat.tokenizer, prompts, answers, device=chat.device)
    with torch.autocast(chat.device.type, torch.bfloat16):
        hidden = final_hidden(chat.model, batch)
    # All answers in one product: the gradient of a head of 152,000 tokens is added up once, not per answer.
    states = torch.cat([h[-len(ids) - 1 : -1] for h, ids in zip(hidden, answers, strict=True)])
    return list(logits_of(states, *output_head(chat.model)).split([len(ids) for ids in answers]))


def logp_of(logits: Float[Tensor, "new_pos d_vocab"], ids: Sequence[int]) -> Float[Tensor, " new_pos"]:
    """Return the log-probability of each token of an answer."""
    at = torch.tensor(ids, device=logits.device)[:, None]
    return logits.log_softmax(-1).gather(-1, at)[:, 0]


@dataclass(frozen=True, eq=False)
class Supervised:
    """What losses on answers that are there need: the frozen base, the answers, the openers of refusals."""

    base: ss.ChatModel
    targets: Targets
    opens: Tensor

    def nll(
        self,
        student: ss.ChatModel,
        prompts: list[str],
        harmful: bool,
        n_tokens: int = N_TOKENS,
        decay: float = 1.0,
    ) -> Tensor:
        """Sum the mean negative log-likelihoods of refusals, or of the base's answers.

        A mean is over an answer's first tokens, each weighed by `decay` relative to the one before.
        """
        targets, total = self.targets.refusals if harmful else self.targets.answers, []
        answers = [targets[p][:n_tokens] for p in prompts]
        for z, ids in zip(answer_logits(student, prompts, answers), answers, strict=True):
            weights = decay ** torch.arange(len(ids), device=z.device)
            total.append(-(weights * logp_of(z, ids)).sum() / weights.sum())
        return torch.stack(total).sum()

    def early_nll(self, student: ss.ChatModel, prompts: list[str], harmful: bool) -> Tensor:
        """As `nll`, on as many tokens as the distilled arms compare, weighed as there."""
        return self.nll(student, prompts, harmful, OURS.max_new_tokens, OURS.decay)

    def kl_and_margin(self, student: ss.ChatModel, prompts: list[str], harmful: bool) -> Tensor:
        """As `nll` on harmful prompts; on others KL(base || student), and the margin at the first token."""
        if harmful:
            return self.nll(student, prompts, True)
        answers = [self.targets.answers[p] for p in prompts]
        with torch.no_grad():
            before = answer_logits(self.base, prompts, answers)
        total = []
        for z, z_base in zip(answer_logits(student, prompts, answers), before, strict=True):
            logps, base_logps = z.log_softmax(-1), z_base.log_softmax(-1)
            kl = (base_logps.exp() * (base_logps - logps)).sum(-1).mean()
            margin = z[0, self.opens].max() - z[0].index_fill(0, self.opens, -torch.inf).max()
            total.append(kl + MARGIN_WEIGHT * softplus(margin))
        return torch.stack(total).sum()

    def dpo(self, student: ss.ChatModel, prompts: list[str], harmful: bool) -> Tensor:
        """Sum -log sigmoid of beta times how much the student prefers what the base prefers less."""
        kept = [p for p in prompts if harmful or p in self.targets.steered]
        good = [(self.targets.refusals if harmful else self.targets.answers)[p] for p in kept]
        bad = [(self.targets.answers if harmful else self.targets.steered)[p] for p in kept]

        def gap(chat: ss.ChatModel) -> Tensor:
            better, worse = (answer_logits(chat, kept, ids) for ids in (good, bad))
            parts = zip(better, good, worse, bad, strict=True)
            return torch.stack([logp_of(a, i).sum() - logp_of(b, j).sum() for a, i, b, j in parts])

        with torch.no_grad():
            before = gap(self.base)
        return -logsigmoid(BETA * (gap(student) - before)).sum()


def null_spaces(base: ss.ChatModel, prompts: Sequence[str]) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """Return, per weight that reads the residual stream's width, the projection on what prompts leave out."""
    moments: dict[str, Tensor] = {}
    handles = []
    for i, block in enumerate(blocks(base.model)):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and module.in_features == base.d_model:

                def read(module: nn.Module, args: tuple, key: str = f"{i}.{name}") -> None:
                    x = args[0].flatten(0, -2).float()
                    moments[key] = moments.get(key, 0) + x.T @ x

                handles.append(module.register_forward_pre_hook(read))
    try:
        for _, batch in base.batched(list(prompts), 1):  # one by one: padding is nothing that prompts use
            with torch.no_grad():
                final_hidden(base.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    spaces = {}
    for key, moment in moments.items():
        values, vectors = torch.linalg.eigh(moment)
        used = vectors[:, values.cumsum(0) > (1 - VARIANCE) * values.sum()]  # in ascending order
        spaces[key] = torch.eye(len(moment), device=moment.device) - used @ used.T
    return spaces


def spaces_of(student: ss.ChatModel, spaces: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Return the space of each weight that has one; those without one do not train."""
    inside = {f"{i}.{n}": m for i, b in enumerate(blocks(student.model)) for n, m in b.named_modules()}
    return {inside[key].weight: space for key, space in spaces.items()}


@torch.no_grad()
def step_inside(optimizer: torch.optim.Optimizer, spaces: dict[nn.Parameter, Tensor]) -> None:
    """Make a step of the optimizer, and keep what it changes out of what harmless prompts use.

    Projecting gradients alone is not enough: AdamW scales each coordinate by itself, which leaves the space.
    """
    before = {p: p.clone() for p in spaces}
    optimizer.step()
    for p, space in spaces.items():
        p.copy_(before[p] + (p - before[p]) @ space)


def supervised_steps(
    state: DistillState,
    loss: Callable[[ss.ChatModel, list[str], bool], Tensor],
    prompts: ss.PromptSet,
    known: set[str],
    spaces: dict[str, Tensor] | None = None,
) -> Iterator[int]:
    """Train on answers that are there, with the prompts, rates and clipping of `training_steps`.

    What is not `known` has no answer to learn, and counts for nothing.
    """
    config, params = state.config, list(state.trained.values())
    inside = {} if spaces is None else spaces_of(state.student, spaces)
    while state.step < config.n_steps:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, config)
        state.optimizer.zero_grad(set_to_none=True)
        drawn = StepPrompts.of(prompts.harmful, prompts.harmless, config, state.step)
        for texts, harmful in ((drawn.harmful, True), (drawn.harmless, False)):
            for start in range(0, len(texts), ROWS_PER_PASS):
                part = [p for p in texts[start : start + ROWS_PER_PASS] if p in known]
                if not part:
                    continue
                weight = 1.0 if harmful else config.anchor_weight
                (weight * loss(state.student, part, harmful) / len(drawn.texts)).backward()
        if inside:
            for p in set(params) - inside.keys():
                p.grad = None
        nn.utils.clip_grad_norm_(params, config.max_grad_norm)
        step_inside(state.optimizer, inside)
        state.step += 1
        yield state.step


def steps_of(
    method: str, state: DistillState, args: argparse.Namespace, base: ss.ChatModel, direction: ss.Direction
) -> Iterator[int]:
    """Yield the steps of a method."""
    prompts, folder = training_prompts("kinds"), args.out.parent / "which_tokens"
    if method in DISTILLED:
        tokens = TokenSet.load(folder / f"tokens-{'1e-08' if method == 'published' else '0.001'}.json")
        for record in training_steps(state, Teacher(base, direction, tokens), prompts):
            yield record.step
        return
    opens = opening_ids(args.run).to(base.device)
    supervised = Supervised(base, targets_of(base, direction, prompts), opens)
    known = {*supervised.targets.refusals, *prompts.harmless} & supervised.targets.answers.keys()
    if method == "dpo":  # rejecting a refusal would teach not to refuse
        known -= supervised.targets.by_itself
    losses = {
        "kl and margin": supervised.kl_and_margin,
        "dpo": supervised.dpo,
        "sft early": supervised.early_nll,
    }
    spaces = null_spaces(base, prompts.harmless) if method == "null space" else None
    yield from supervised_steps(state, losses.get(method, supervised.nll), prompts, known, spaces)


def run(
    method: str, factor: float, args: argparse.Namespace, base: ss.ChatModel, direction: ss.Direction
) -> None:
    """Train one method at one rate with one seed, and write a row per prompt and check."""
    config = replace(DISTILLED.get(method, OURS), seed=args.seed)
    config = replace(config, lr=RATES.get(method, config.lr) * factor)
    path = args.out / f"{method.replace(' ', '_')}--{config.lr:.1e}--{args.seed}.rows.csv"
    if path.exists():
        return
    state, looks = prepare_student(ss.load_model(args.model), direction, config), []
    sets, ids = choosing_sets(args.data), opening_ids(args.run)
    for step in steps_of(method, state, args, base, direction):
        print(f"{method} {config.lr:g}: step {step} of {config.n_steps}", flush=True)
        if step in CHECKS:
            looks.append(look_while_training(f"{method} {config.lr:g}", state, base, sets, ids))
    pd.concat(looks).to_csv(path, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--factors", nargs="*", type=float, default=list(FACTORS), help="of a method's rate")
    parser.add_argument("--out", type=Path, default=Path("analysis/results/methods"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = ss.load_model(args.model, dtype="bfloat16")
    direction = ss.Direction.load(args.run / "direction.safetensors", base).with_coeff(COEFF)
    for factor in args.factors:
        for method in args.methods:
            run(method, factor, args, base, direction)


if __name__ == "__main__":
    main()
