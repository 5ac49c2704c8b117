"""Which tokens teach refusing: S, or any fifty? The control of the paper's claim, on a model that refuses.

    python analysis/which_tokens.py RUN --data ROWS [--out analysis/results/which_tokens]

Claim (paper, sections 3.3 and 3.4): safety lives in the few tokens that steering lifts, so a student is
taught on them alone. Refuted where tokens drawn at random teach refusing as well, at the same over-refusal.

RUN receives `refusal_tokens.csv` and `direction.safetensors`: the difference of means at the last position
and two thirds of the depth, from the harmful train prompts that pass the published filter. Every arm is a set
of tokens, a loss and an optimizer; all else is the published recipe: harmful prompts alone, answers of the
student, one teacher. After some steps the student answers prompts that nothing trains on, and each prompt is
a row. Beside the arms stands the base's line without training: a constant on the tokens that open refusals.

    published 1e-8      S as published: min_steered_prob 1e-8, reverse partial KL (Eq. 6)
    published 1e-3      the same loss on tokens that occur
    divergence 1e-3     S of 1e-3 with a true divergence (symmetric, generalized)
    random              fifty ids of the vocabulary, Eq. 6
    matched             fifty ids, each of nearly the probability under the base of one of S (1e-8)
    complement          everything but S (1e-8), Eq. 6
    whole               the whole vocabulary: reverse KL

Optimizers: adam (eps 1e-8), adam 1e-5 (a large eps), sgd (at the rate at which the first step of "whole" is
as long as Adam's), and unit sgd (every step is that long, whatever the gradient).
An arm's rows are files in OUT, so an interrupted study continues.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import safesteer as ss
from safesteer._files import write_text
from safesteer.attribution.coverage import Controls, matched_sets, random_sets, sum_by_step
from safesteer.directions.extraction import mean_difference
from safesteer.directions.refusal_tokens import RefusalTokens, filter_by_refusal, learn_refusal_tokens
from safesteer.directions.shifts import shift_along
from safesteer.distillation.loss import LossTerms
from safesteer.distillation.rollouts import StepPrompts, Teacher
from safesteer.distillation.state import DistillState, prepare_student
from safesteer.distillation.step import Reading, accumulate_gradient, read_answers
from safesteer.evaluation.curves import refusal_margins
from safesteer.evaluation.ledger import log_look
from safesteer.judges.wording import refuses
from safesteer.models.precision import in_precision_of
from safesteer.models.templates import control_ids
from safesteer.prompts.benchmarks import load_benchmark
from safesteer.tokens.sampling import sample_answers
from safesteer.tokens.token_set import TokenSet

CHECKS = (1, 2, 4)  # steps after which the student is looked at
EVERY = 16  # one coordinate in so many stands for all where updates are compared
EPS = {"adam": 1e-8, "adam 1e-5": 1e-5}
LR = 1e-5  # the authors' for Qwen
SLOW = 2e-6  # for losses that go all the way in one step at that rate


@dataclass(frozen=True)
class Arm:
    """A set of tokens with its loss, an optimizer, and the seed of prompts, answers and drawn sets."""

    tokens: str
    optimizer: str = "adam"
    seed: int = 0
    draw: int = 0
    lr: float = LR

    @property
    def name(self) -> str:
        rate = "" if self.lr == LR else f" {self.lr:g}"
        return f"{self.tokens}-{self.draw}--{self.optimizer}{rate}--{self.seed}".replace(" ", "_")


@dataclass(frozen=True, eq=False)
class Study:
    """What all arms share; `sets` are the prompts to answer."""

    base: ss.ChatModel
    direction: ss.Direction
    model: str
    out: Path
    sets: dict[str, list[str]]
    val: ss.PromptSet

    def log(self, chat: ss.ChatModel, why: str) -> None:
        for name in ("harmbench", "xstest", "everyday"):
            log_look(
                self.out.parent / "looks.csv", chat, name, len(self.sets[name]), f"study which_tokens: {why}"
            )


def arms() -> Iterator[Arm]:
    """Yield the arms, those that decide first."""
    sets = ("published 1e-8", "random", "whole", "published 1e-3", "divergence 1e-3")
    for seed in (0, 1, 2):
        yield from (Arm(name, seed=seed, draw=seed) for name in (*sets, "matched"))
        yield from (Arm(name, seed=seed, draw=seed, lr=SLOW) for name in ("whole", "divergence 1e-3"))
    yield from (Arm("complement", seed=seed) for seed in (0, 1, 2))
    for optimizer in ("unit sgd", "adam 1e-5", "sgd"):
        yield from (Arm(name, optimizer) for name in (*sets[:3], "divergence 1e-3"))


def settings_of(arm: Arm) -> ss.DistillConfig:
    """Return the published recipe with the arm's loss, at a constant rate and with short answers."""
    true = arm.tokens.startswith("divergence")
    return ss.DistillConfig(
        divergence="symmetric" if true else "reverse",
        normalizer="generalized" if true else "partial",
        support="full" if arm.tokens == "whole" else "safety",
        splits=("distill",),
        train_layers="all",
        n_steps=100,
        warmup=0,
        harmful_per_step=4,
        harmless_per_step=0,
        n_rollouts=4,
        max_new_tokens=24,
        rollouts="student",
        decay=1.0,
        lr=arm.lr,
        precision="bfloat16",
        micro_batch=16,
        seed=arm.seed,
    )


def token_sets(chat: ss.ChatModel, direction: ss.Direction, out: Path) -> dict[str, list[TokenSet]]:
    """Select S twice, by the threshold as published and by one that frequent tokens pass; draw the others."""
    prompts = ss.load_prompts().split("val").harmless
    sets: dict[str, list[TokenSet]] = {}
    config = ss.TokenConfig(k_vote=200, n_samples=8, min_steered_prob=1e-8, batch_size=8)
    for threshold in (1e-8, 1e-3):
        path = out / f"tokens-{threshold:g}.json"
        if not path.exists():
            selected = ss.select_tokens(chat, direction, prompts, replace(config, min_steered_prob=threshold))
            selected.save(path)
        sets[f"{threshold:g}"] = [TokenSet.load(path)]
    published = sets["1e-08"][0]
    drawn = drawn_sets(chat, direction, published, out / "drawn.json")
    others = ordinary_ids(chat)
    others[published.ids] = False
    drawn["complement"] = [others.nonzero()[:, 0]]
    sets |= {name: [with_ids(published, ids) for ids in found] for name, found in drawn.items()}
    return sets | {"whole": [published]}


def ordinary_ids(chat: ss.ChatModel) -> torch.Tensor:
    """Mark the ids that stand for text."""
    ordinary = torch.ones(chat.d_vocab, dtype=torch.bool)
    ordinary[control_ids(chat.tokenizer)] = False
    ordinary[len(chat.tokenizer) :] = False
    return ordinary


def drawn_sets(
    chat: ss.ChatModel, direction: ss.Direction, tokens: TokenSet, path: Path
) -> dict[str, list[torch.Tensor]]:
    """Draw three sets of any ids, and three of ids that the base makes as probable as those of S.

    What was drawn is written to a file, and read from it the next time.
    """
    if not path.exists():
        prompts, config = ss.load_prompts().split("val").harmless[:16], ss.TokenConfig(n_samples=2)
        sums = sum_by_step(chat, sample_answers(chat, direction, prompts, replace(config, batch_size=8)))
        p_base = (sums.base.sum(0) / sums.n.sum()).float()
        ordinary, n = ordinary_ids(chat), len(tokens.tokens)
        drawn = {
            "random": random_sets(ordinary, n, 3, seed=0),
            "matched": matched_sets(tokens.ids, n, p_base, Controls(ordinary, ordinary, n_sets=3)),
        }
        write_text(path, json.dumps({kind: [ids.tolist() for ids in sets] for kind, sets in drawn.items()}))
    read = json.loads(path.read_text(encoding="utf-8"))
    return {kind: [torch.tensor(ids) for ids in sets] for kind, sets in read.items()}


def with_ids(tokens: TokenSet, ids: torch.Tensor) -> TokenSet:
    """Put other ids in the place of a set's tokens; all that is known of them is their number."""
    some = tokens.tokens[0]
    return replace(tokens, tokens=tuple(replace(some, id=i, text="", contexts=()) for i in ids.tolist()))


def tokens_of(sets: dict[str, list[TokenSet]], arm: Arm) -> TokenSet:
    kind = {"published 1e-8": "1e-08", "published 1e-3": "0.001", "divergence 1e-3": "0.001"}
    drawn = sets[kind.get(arm.tokens, arm.tokens)]
    return drawn[arm.draw % len(drawn)]


def optimizer_of(arm: Arm, state: DistillState) -> torch.optim.Optimizer:
    params = list(state.trained.values())
    if arm.optimizer in EPS:
        return torch.optim.AdamW(
            params, lr=arm.lr, betas=(0.9, 0.95), eps=EPS[arm.optimizer], weight_decay=0, foreach=False
        )
    return torch.optim.SGD(params, lr=1.0, foreach=False)


def sampled(params: list[torch.nn.Parameter]) -> torch.Tensor:
    """Take one coordinate of a gradient in EVERY."""
    return torch.cat([p.grad.flatten()[::EVERY].float() for p in params if p.grad is not None])


class AdamOf:
    """Adam's update on some coordinates: what it would do, had it seen these gradients."""

    def __init__(self, eps: float) -> None:
        self.eps, self.step, self.mean, self.square = eps, 0, 0.0, 0.0

    def update(self, grad: torch.Tensor) -> torch.Tensor:
        self.step += 1
        self.mean = 0.9 * self.mean + 0.1 * grad
        self.square = 0.95 * self.square + 0.05 * grad**2
        return (self.mean / (1 - 0.9**self.step)) / ((self.square / (1 - 0.95**self.step)).sqrt() + self.eps)


def norm_of(params: list[torch.nn.Parameter]) -> float:
    return float(torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm())


def gradient(
    state: DistillState, teacher: Teacher, reading: Reading, config: ss.DistillConfig
) -> tuple[LossTerms, float]:
    """Compute the gradient of a loss on answers that are there, clipped to length 1 as published."""
    for p in state.trained.values():
        p.grad = None
    terms, _ = accumulate_gradient(replace(state, config=config), teacher, reading)
    params = list(state.trained.values())
    norm = norm_of(params)
    for p in params:
        if p.grad is not None:
            p.grad.mul_(min(1.0, 1.0 / (norm + 1e-12)))
    return terms, norm


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()  # sums of 30 million products
    return float(a @ b / (a.norm() * b.norm()))


def run(arm: Arm, study: Study, tokens: TokenSet) -> None:
    """Train an arm, look at the student after the steps of CHECKS, and write the rows of both."""
    config, prompts = settings_of(arm), ss.load_prompts().split("distill")
    teacher = Teacher(study.base, study.direction, tokens)
    state = prepare_student(ss.load_model(study.model), study.direction, config)
    optimizer, params = optimizer_of(arm, state), list(state.trained.values())
    length = arm.lr * sum(p.numel() for p in params) ** 0.5  # of Adam's first step
    whole = replace(config, support="full", divergence="reverse", normalizer="partial")
    by_whole, by_arm = AdamOf(EPS.get(arm.optimizer, 1e-8)), AdamOf(EPS.get(arm.optimizer, 1e-8))
    rows, looks, rate = [], [], None
    while state.step < max(CHECKS):
        reading, _ = read_answers(state, teacher, StepPrompts.of(prompts.harmful, [], config, state.step))
        _, whole_norm = gradient(state, teacher, reading, whole)
        of_whole = sampled(params)
        rate = rate or length / min(whole_norm, 1.0)
        terms, norm = gradient(state, teacher, reading, config)
        own = sampled(params)
        if arm.optimizer == "unit sgd":
            optimizer.param_groups[0]["lr"] = length / max(min(norm, 1.0), 1e-12)
        elif arm.optimizer == "sgd":
            optimizer.param_groups[0]["lr"] = rate
        adam = arm.optimizer in EPS
        updates = (by_arm.update(own), by_whole.update(of_whole)) if adam else (own, of_whole)
        optimizer.step()
        state.step += 1
        rows.append(
            {
                "step": state.step,
                "loss": float(terms.loss),
                "gradient_norm": norm,
                "whole_gradient_norm": whole_norm,
                "gradient_cosine": cosine(own, of_whole),
                "update_cosine": cosine(*updates),
                "mass_student": float(terms.student_mass.mean()),
                "mass_teacher": float(terms.teacher_mass.mean()),
            }
        )
        print(arm.name, {k: f"{v:.3g}" for k, v in rows[-1].items()}, flush=True)
        if state.step in CHECKS:
            for p in params:
                p.grad = None
            looks.append(look(study, state.student, arm, state.step))
    for name, tables in zip(("rows", "shift"), zip(*looks, strict=True), strict=True):
        pd.concat(tables).to_csv(study.out / f"{arm.name}.{name}.csv", index=False)
    pd.DataFrame(rows).to_csv(study.out / f"{arm.name}.steps.csv", index=False)


def look(study: Study, student: ss.ChatModel, arm: Arm, step: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answer every prompt, and measure how far the residual stream has moved along the direction."""
    with in_precision_of(study.base, student):
        rows = answer_rows(student, study.sets).assign(step=step)
        shift = shift_table(study, "student", student).assign(step=step)
    if step == max(CHECKS):
        study.log(student, arm.name)
    print(arm.name, step, rows.groupby("set", sort=False).refused.mean().round(2).to_dict(), flush=True)
    return rows, shift


def prompt_sets(data: Path) -> dict[str, list[str]]:
    val = ss.load_prompts().split("val")
    return {
        "own-val-harmful": val.harmful,
        "own-val-harmless": val.harmless,
        "harmbench": load_benchmark("harmbench", data=data, limit=40),
        "xstest": load_benchmark("xstest", data=data, limit=60),
        "everyday": load_benchmark("everyday", data=data, limit=60),
    }


def answer_rows(chat: ss.ChatModel, sets: dict[str, list[str]]) -> pd.DataFrame:
    """Say of each prompt whether its answer of 16 tokens opens with a refusal."""
    texts = [text for texts in sets.values() for text in texts]
    answers = ss.generate(chat, texts, max_new_tokens=16, batch_size=56)
    names = [(name, i) for name, texts in sets.items() for i in range(len(texts))]
    return pd.DataFrame(
        {"set": name, "row": i, "refused": int(refuses(p, a))}
        for (name, i), p, a in zip(names, texts, answers, strict=True)
    )


def shift_table(study: Study, model: str, student: ss.ChatModel | None = None) -> pd.DataFrame:
    """Project the shift of the teacher or of a student on the steering direction."""
    table = shift_along(study.base, study.direction, study.val, student)
    return table.loc[table.model == model].drop(columns="model").round(5)


def write_base(study: Study, run: Path) -> None:
    """Write what stands without training: base and teacher, and the margins that a constant would move."""
    with ss.steer(study.base, study.direction):
        teacher = answer_rows(study.base, study.sets)
    shift_table(study, "teacher").to_csv(study.out / "teacher.shift.csv", index=False)
    ids = RefusalTokens.load(run / "refusal_tokens.csv").ids
    margins = np.concatenate([refusal_margins(study.base, ids, texts) for texts in study.sets.values()])
    table = answer_rows(study.base, study.sets).assign(margin=margins.round(4), teacher=teacher.refused)
    table.to_csv(study.out / "base.csv", index=False)
    study.log(study.base, "base and teacher")


def write_direction(base: ss.ChatModel, run: Path) -> None:
    """Write the direction of this study; few val prompts pass the published filter, so none is selected."""
    prompts = ss.load_prompts()
    val = prompts.split("val")
    refusal = learn_refusal_tokens(base, val.harmful, val.harmless, refuses)
    read = filter_by_refusal(base, prompts.split("train"), refusal.ids)
    candidates = mean_difference(base, read, seed=0)
    run.mkdir(parents=True, exist_ok=True)
    refusal.save(run / "refusal_tokens.csv")
    direction = candidates.direction(base, "-1", base.n_layers * 2 // 3, prompts=read)
    direction.save(run / "direction.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("analysis/results/which_tokens"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base, val = ss.load_model(args.model, dtype="bfloat16"), ss.load_prompts().split("val")
    if not (args.run / "direction.safetensors").exists():
        write_direction(base, args.run)
    direction = ss.Direction.load(args.run / "direction.safetensors", base)
    study = Study(base, direction, args.model, args.out, prompt_sets(args.data), val)
    if not (args.out / "base.csv").exists():
        write_base(study, args.run)
    chosen = token_sets(base, direction, args.out)
    for arm in arms():
        if not (args.out / f"{arm.name}.steps.csv").exists():
            run(arm, study, tokens_of(chosen, arm))


if __name__ == "__main__":
    main()
