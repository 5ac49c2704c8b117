"""Selecting S against a naive full-tensor reference, in one run.

    python performance/selection.py [--prompts 32] [--samples 8] [--horizon 7]

The reference samples every continuation from a prompt of its own, reads teacher and base with logits
at every position, keeps the (rows x horizon x vocabulary) tensors and votes on them. Each of the two
runs in a process of its own, so that peak memory is its own; both must select the same ids with the
same votes from the same samples (the reference is given ours for that comparison).
"""

import argparse
import json
import time

import torch
from measure import extra_mb, in_process, machine, start_memory

import safesteer as ss
from safesteer.directions.extraction import prefill_contrast
from safesteer.models.batch import PromptBatch
from safesteer.tokens.sampling import sample_answers
from safesteer.tokens.selection import banned_ids, select_tokens


@torch.no_grad()
def set_up(options):
    chat, prompts = ss.load_model("smollm2-135m"), ss.load_prompts()
    chat.model(torch.tensor([[1]]))  # weights lie on disk until first read: that is not extra memory
    candidates = prefill_contrast(chat, prompts.split("train").first(16))
    direction = candidates.direction(chat, "mean", 11, coeff=1.8)
    config = ss.TokenConfig(
        horizon=options.horizon, n_samples=options.samples, min_steered_prob=1e-3, k_vote=30, batch_size=2
    )
    return chat, direction, prompts.split("val").harmless[: options.prompts], config


@torch.no_grad()
def naive_rollouts(chat, direction, texts, config):
    """Whole prompts for every sample, padded to the longest, logits everywhere."""
    singles = [PromptBatch.of(chat.tokenizer, [t]).prompt_ids[0].tolist() for t in texts]
    batch = PromptBatch.from_ids(singles, [[] for _ in singles], share=False)
    ids = batch.prompt_ids.repeat_interleave(config.n_samples, 0)
    mask = batch.attention_mask.repeat_interleave(config.n_samples, 0)
    torch.manual_seed(config.seed)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with ss.steer(chat, direction):
        out = chat.model.generate(ids, attention_mask=mask, max_new_tokens=config.horizon, **options)
    return ids, mask, out[:, ids.shape[1] :]


@torch.no_grad()
def naive_select(chat, direction, ids, mask, new, config):
    full = torch.cat([ids, new], 1)
    mask = torch.cat([mask, torch.ones_like(new)], 1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)

    def logps():
        out = chat.model(full, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        return out[:, -new.shape[1] - 1 : -1].log_softmax(-1)

    base = logps()
    with ss.steer(chat, direction):
        teacher = logps()
    eos = torch.tensor(chat.eos_ids)
    ended = torch.isin(new, eos)
    valid = (ended.cumsum(1) - ended.long() == 0) & (torch.isin(base.argmax(-1), eos).cumsum(1) == 0)
    delta, p_steered = teacher - base, teacher.exp()
    mean_p = (p_steered * valid[..., None]).sum((0, 1), dtype=torch.float64) / valid.sum()
    mean_delta = (delta * valid[..., None]).sum((0, 1), dtype=torch.float64) / valid.sum()
    banned = banned_ids(chat) | (mean_p < config.min_steered_prob)
    top = delta.masked_fill(banned, -torch.inf).topk(config.k_vote, -1).indices
    votes = torch.zeros(chat.d_vocab, dtype=torch.long)
    for row, step in valid.nonzero().tolist():
        votes[top[row, step]] += 1
    pool = torch.nonzero(~banned & (votes > 0)).flatten().tolist()
    ranked = sorted(pool, key=lambda v: (-int(votes[v]), -float(mean_delta[v]), v))[: config.k]
    return ranked, votes[ranked].tolist()


def child(options) -> None:
    chat, direction, texts, config = set_up(options)
    before = start_memory()
    started = time.perf_counter()
    if options.which == "ours":
        found = select_tokens(chat, direction, texts, config)
        ids, votes = found.ids.tolist(), [t.votes for t in found.tokens]
    else:
        ids, votes = naive_select(chat, direction, *naive_rollouts(chat, direction, texts, config), config)
    seconds, extra = time.perf_counter() - started, round(extra_mb(before))
    result = {"seconds": round(seconds, 2), "extra_mb": extra, "n": len(ids)}
    if options.which == "ours":  # afterwards, so that it does not count: the same samples, naively
        sampled = sample_answers(chat, direction, texts, config)
        owners = list(dict.fromkeys(sampled.prompts))
        singles = [PromptBatch.of(chat.tokenizer, [t]).prompt_ids[0].tolist() for t in owners]
        batch = PromptBatch.from_ids(singles, [[] for _ in singles], share=False)
        ids_ = batch.prompt_ids.repeat_interleave(config.n_samples, 0)
        mask = batch.attention_mask.repeat_interleave(config.n_samples, 0)
        want, want_votes = naive_select(chat, direction, ids_, mask, sampled.completion_ids, config)
        result |= {"same_ids": want == ids, "same_set": set(want) == set(ids)}
        naive = dict(zip(want, want_votes, strict=True))
        differences = [abs(n - naive.get(i, 0)) for i, n in zip(ids, votes, strict=True)]
        result["largest_vote_difference"] = max(differences)
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=7)
    parser.add_argument("--which", choices=["both", "ours", "naive"], default="both")
    options = parser.parse_args()
    if options.which != "both":
        child(options)
        return
    results = {}
    for which in ("ours", "naive"):
        sizes = [f"--{name}={getattr(options, name)}" for name in ("prompts", "samples", "horizon")]
        results[which] = in_process(__file__, "--which", which, *sizes)
        print(which, results[which], flush=True)
    ratio = {
        "speed_ratio": round(results["naive"]["seconds"] / results["ours"]["seconds"], 2),
        "memory_ratio": round(results["naive"]["extra_mb"] / max(1, results["ours"]["extra_mb"]), 1),
        **{f"{k}_{name}": v for name, r in results.items() for k, v in r.items()},
        **machine(),
    }
    print(json.dumps(ratio))


if __name__ == "__main__":
    main()
