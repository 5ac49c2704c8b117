"""The position x layer sweep against a naive one-candidate-at-a-time reference, in one run.

    python performance/sweep.py [--pairs 32] [--every 6] [--timed 8] [--only-ours]

The reference is what a script with hooks does: for each candidate three whole passes of all prompts,
padded to the longest, logits at every position, all layers run and the last fifth dropped
afterwards. Both sweep all positions of every `every`-th layer (1: all layers); the reference is timed
on `timed` of those candidates, spread evenly, and its time multiplied. Half of them are timed before
and half after ours, because a shared machine's speed drifts. Scores that both computed are compared.
"""

import argparse
import json
import time

import torch
from measure import extra_mb, machine, start_memory

import safesteer as ss
from safesteer.directions.extraction import mean_difference
from safesteer.directions.refusal_tokens import refusal_token_ids
from safesteer.directions.scoring import SCORES, score
from safesteer.models.batch import PromptBatch
from safesteer.models.generation import generate_ids
from safesteer.models.logits import kl_divergence, refusal_score


def padded(chat, texts):
    singles = [PromptBatch.of(chat.tokenizer, [t]).prompt_ids[0].tolist() for t in texts]
    return PromptBatch.from_ids(singles, [[] for _ in singles], share=False)


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--timed", type=int, default=8)
    parser.add_argument("--only-ours", action="store_true", help="peak memory, without the reference")
    options = parser.parse_args()
    chat, prompts = ss.load_model("smollm2-135m"), ss.load_prompts()
    val = prompts.split("val").first(options.pairs)
    candidates = mean_difference(chat, prompts.split("train").first(32))
    refusal_ids = refusal_token_ids(chat.tokenizer)
    n_pos, n_layers, _ = candidates.vectors.shape

    layers = list(range(options.every // 2, n_layers, options.every))
    run = [(i, layer) for layer in layers if layer < 0.8 * n_layers for i in range(n_pos)]
    vectors = torch.stack([candidates.vectors[at] for at in run])

    def time_ours():
        started = time.perf_counter()
        scores = score(chat, vectors, [layer for _, layer in run], val, refusal_ids)
        return scores, time.perf_counter() - started

    if options.only_ours:
        before = start_memory()
        _, ours = time_ours()
        print(f"ours: {ours:.1f} s, {extra_mb(before):.0f} MB above the model with {options.pairs} pairs")
        return

    harmful, harmless = padded(chat, val.harmful), padded(chat, val.harmless)
    answered = harmless.extended(generate_ids(chat, harmless, max_new_tokens=2))
    inputs = {"attention_mask": answered.attention_mask, "position_ids": answered.position_ids}
    with torch.no_grad():
        base = chat.model(answered.prompt_ids, use_cache=False, **inputs).logits[:, -3:]
    cells = [(i, layer) for layer in layers for i in range(n_pos)]
    timed = [cells[n * len(cells) // options.timed] for n in range(options.timed)]
    wanted, seconds = {}, 0.0

    def time_naive(candidates_at):
        nonlocal seconds
        for at in candidates_at:
            started = time.perf_counter()
            vector = candidates.vectors[at]
            wanted[at] = naive_scores(chat, vector, at[1], harmful, harmless, answered, base, refusal_ids)
            seconds += time.perf_counter() - started

    time_naive(timed[::2])
    measured, ours = time_ours()
    time_naive(timed[1::2])
    print(f"ours: {n_pos} positions x layers {layers}, {options.pairs} pairs: {ours:.1f} s")
    naive = seconds / len(timed) * len(cells)
    print(f"naive: {len(timed)} candidates in {seconds:.1f} s, so {naive:.1f} s for {len(cells)}")
    worst = 0.0
    for at, want in wanted.items():
        if at in run and candidates.vectors[at].norm() > 1e-3:
            scores = [float(measured[name][run.index(at)].mean()) for name in SCORES]
            worst = max(worst, *(abs(a - b) for a, b in zip(scores, want, strict=True)))
    result = {
        "ratio": round(naive / ours, 2),
        "ours_s": round(ours, 1),
        "naive_s": round(naive, 1),
        "naive_timed": len(timed),
        "candidates": len(cells),
        "pairs": options.pairs,
        "max_abs_difference": float(f"{worst:.2g}"),
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
