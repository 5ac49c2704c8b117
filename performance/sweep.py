"""The position x layer sweep against a naive one-candidate-at-a-time reference, in one run.

    python performance/sweep.py [--pairs 32] [--every 6] [--timed 8] [--dtype float32] [--only-ours]

The reference is what a script with hooks does: for each candidate three whole passes of all prompts,
padded to the longest, logits at every position, all layers run and the last fifth dropped
afterwards. Both sweep all positions of every `every`-th layer (1: all layers); the reference is timed
on `timed` of those candidates, spread evenly, and its time multiplied. Half of them are timed before
and half after ours, because a shared machine's speed drifts. Scores that both computed are compared.

Ours is timed twice: every candidate on every pair, and by successive halving (8 pairs first), as `sweep` does
by default; `same_best` says whether both rank the same candidate first by ablation.
"""

import argparse
import json
import time
from dataclasses import dataclass

import torch
from measure import extra_mb, machine, start_memory

import safesteer as ss
from safesteer.directions.extraction import mean_difference
from safesteer.directions.halving import Scored, score_by_halving
from safesteer.directions.refusal_tokens import refusal_token_ids
from safesteer.directions.scoring import SCORES, score
from safesteer.models.batch import PromptBatch
from safesteer.models.generation import generate_ids
from safesteer.models.logits import kl_divergence, refusal_score

N_FIRST = 8  # pairs that every candidate is scored on by halving


def padded(chat, texts):
    singles = [PromptBatch.of(chat.tokenizer, [t]).prompt_ids[0].tolist() for t in texts]
    return PromptBatch.from_ids(singles, [[] for _ in singles], share=False, device=chat.device)


def naive_hooks(model, layer, add=None, ablate=None):
    handles = []
    if add is not None:
        block = model.model.layers[layer]
        handles.append(block.register_forward_pre_hook(lambda m, a: (a[0] + add, *a[1:])))
    if ablate is not None:
        unit = ablate / ablate.norm()

        def project(x):
            return x - (x @ unit)[..., None] * unit

        def after(module, args, out):
            return (project(out[0]), *out[1:]) if isinstance(out, tuple) else project(out)

        handles.append(model.model.embed_tokens.register_forward_hook(after))
        for block in model.model.layers:
            handles += [block.self_attn.register_forward_hook(after), block.mlp.register_forward_hook(after)]
    return handles


@torch.no_grad()
def naive_scores(chat, vector, layer, harmful, harmless, answered, base, refusal_ids):
    def logits(batch, **vectors):
        handles = naive_hooks(chat.model, layer, **vectors)
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        out = chat.model(batch.prompt_ids, use_cache=False, **inputs).logits
        for handle in handles:
            handle.remove()
        return out

    ablated = refusal_score(logits(harmful, ablate=vector)[:, -1], refusal_ids).mean()
    steered = refusal_score(logits(harmless, add=vector)[:, -1], refusal_ids).mean()
    kl = kl_divergence(base, logits(answered, ablate=vector)[:, -3:]).mean()
    return [float(ablated), float(steered), float(kl)]


@dataclass(frozen=True, eq=False)
class Task:
    """The candidates: `cells` by position and layer, of which `run` can be chosen, below 0.8 of the depth."""

    chat: ss.ChatModel
    prompts: ss.PromptSet
    vectors: torch.Tensor
    cells: list[tuple[int, int]]
    run: list[tuple[int, int]]
    refusal_ids: torch.Tensor

    @classmethod
    def of(cls, chat: ss.ChatModel, pairs: int, every: int) -> "Task":
        prompts = ss.load_prompts()
        vectors = mean_difference(chat, prompts.split("train").first(32)).vectors
        n_pos, n_layers, _ = vectors.shape
        cells = [(i, layer) for layer in range(every // 2, n_layers, every) for i in range(n_pos)]
        run = [(i, layer) for i, layer in cells if layer < 0.8 * n_layers]
        refusal_ids = refusal_token_ids(chat.tokenizer).to(chat.device)
        return cls(chat, prompts.split("val").first(pairs), vectors, cells, run, refusal_ids)

    def ours(self) -> tuple[dict[str, torch.Tensor], float]:
        started, vectors = time.perf_counter(), torch.stack([self.vectors[at] for at in self.run])
        scores = score(self.chat, vectors, [layer for _, layer in self.run], self.prompts, self.refusal_ids)
        return scores, time.perf_counter() - started

    def halved(self) -> tuple[Scored, float]:
        started, layers = time.perf_counter(), [layer for _, layer in self.run]
        vectors = torch.stack([self.vectors[at] for at in self.run])

        def score_some(at, prompts, progress):
            return score(self.chat, vectors[at], [layers[i] for i in at], prompts, self.refusal_ids)

        scored = score_by_halving(score_some, len(layers), self.prompts, N_FIRST, best_first)
        return scored, time.perf_counter() - started


def best_first(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    return scores["ablation_refusal"].mean(1).argsort()


@torch.no_grad()
def compare(task: Task, n_timed: int) -> tuple[dict, list[float]]:
    """Time both sweeps and compare the scores of both; return the naive seconds per candidate too."""
    chat, cells = task.chat, task.cells
    harmful, harmless = padded(chat, task.prompts.harmful), padded(chat, task.prompts.harmless)
    answered = harmless.extended(generate_ids(chat, harmless, max_new_tokens=2))
    inputs = {"attention_mask": answered.attention_mask, "position_ids": answered.position_ids}
    base = chat.model(answered.prompt_ids, use_cache=False, **inputs).logits[:, -3:]
    timed = [cells[n * len(cells) // n_timed] for n in range(n_timed)]
    wanted, seconds = {}, {}

    def time_naive(candidates_at):
        for at in candidates_at:
            started, texts = time.perf_counter(), (harmful, harmless, answered)
            wanted[at] = naive_scores(chat, task.vectors[at].to(base), at[1], *texts, base, task.refusal_ids)
            seconds[at] = time.perf_counter() - started

    time_naive(timed[:1])  # to warm up: it is timed again
    time_naive(timed[::2])
    measured, ours = task.ours()
    scored, halved = task.halved()
    time_naive(timed[1::2])
    worst = 0.0
    for at, want in wanted.items():
        if at in task.run and task.vectors[at].norm() > 1e-3:
            scores = [float(measured[name][task.run.index(at)].mean()) for name in SCORES]
            worst = max(worst, *(abs(a - b) for a, b in zip(scores, want, strict=True)))
    went_through = (scored.n_pairs == scored.n_pairs.max()).nonzero()[:, 0]
    last = {name: values[went_through] for name, values in scored.scores.items()}
    best = int(went_through[best_first(last)[0]])
    naive = sum(seconds.values()) / len(timed) * len(cells)
    result = {
        "ratio": round(naive / ours, 2),
        "ratio_halved": round(naive / halved, 2),
        "ours_s": round(ours, 1),
        "halved_s": round(halved, 1),
        "same_best": best == int(best_first(measured)[0]),
        "naive_s": round(naive, 1),
        "naive_timed": len(timed),
        "candidates": len(cells),
        "pairs": len(task.prompts.harmful),
        "max_abs_difference": float(f"{worst:.2g}"),
    }
    return result, list(seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--timed", type=int, default=8)
    parser.add_argument("--dtype", default="float32", help="of both: the reference has the same")
    parser.add_argument("--only-ours", action="store_true", help="peak memory, without the reference")
    options = parser.parse_args()
    chat = ss.load_model("smollm2-135m", dtype=options.dtype)
    task = Task.of(chat, options.pairs, options.every)
    if options.only_ours:
        before = start_memory()
        _, ours = task.ours()
        print(f"ours: {ours:.1f} s, {extra_mb(before):.0f} MB above the model with {options.pairs} pairs")
        return
    print(json.dumps({**compare(task, options.timed)[0], "dtype": options.dtype, **machine()}))


if __name__ == "__main__":
    main()
