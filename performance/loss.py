"""Memory and time of the loss and its gradient against full logits, in one run.

    python performance/loss.py [--quick]

Each measurement runs in a process of its own: hidden states and heads are made and touched, then one
forward and backward pass is run, and peak resident memory above that start is read. The head's own
gradient, which every path must hold when the head is trained, is taken off.

    ours    loss.divergence_loss, reverse generalized divergence on |S| = 50
    naive   log_softmax of student and teacher over the vocabulary, float32, then the 50 columns
    liger   fused linear JSD of liger-kernel over the whole vocabulary, if it is installed; uncompiled, and
            one repeat where the others have two: its memory can be compared, its time can not
"""

import argparse
import importlib.util
import json
import sys
import time

import torch
from measure import extra_mb, in_process, machine, start_memory

SIZES = [(8192, 49152, 576), (2048, 151936, 1024)]  # positions, vocabulary, width
N_SET = 50


def ours(hidden, weight, h_teacher, w_teacher, ids):
    from safesteer.distillation.loss import divergence_loss
    from safesteer.models.head import Head
    from safesteer.settings import DistillConfig

    heads = Head(weight), Head(w_teacher)
    w = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
    config = DistillConfig(divergence="reverse", normalizer="generalized")
    return divergence_loss(hidden, h_teacher, w, *heads, ids, config).loss


def naive(hidden, weight, h_teacher, w_teacher, ids):
    with torch.no_grad():
        q = (h_teacher @ w_teacher.T).float().log_softmax(-1)[:, ids]
    p = (hidden @ weight.T).float().log_softmax(-1)[:, ids]
    return (p.exp() * (p - q) - p.exp() + q.exp()).sum(-1).mean()


def liger(hidden, weight, h_teacher, w_teacher, ids):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    compiled = hidden.device.type == "cuda"  # on CPUs it would need a compiler
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compiled)
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    return loss(hidden, weight, h_teacher, w_teacher, labels)


PATHS = {"ours": ours, "naive": naive, "liger": liger}


def child(path: str, n: int, d_vocab: int, d_model: int, trained: bool, repeats: int) -> None:
    import safesteer.distillation.loss  # noqa: F401  (imports are not the loss's memory)

    if path == "liger":
        import liger_kernel.chunked_loss  # noqa: F401
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d_model, generator=generator).requires_grad_(True)
    h_teacher = torch.randn(n, d_model, generator=generator)
    weight = (0.02 * torch.randn(d_vocab, d_model, generator=generator)).requires_grad_(trained)
    w_teacher = weight.detach()  # one tensor, as with an adapter: the same head for every path
    ids = torch.randperm(d_vocab, generator=generator)[:N_SET].sort().values
    small = slice(0, 64)  # threads and code are warm before memory is read
    PATHS[path](
        hidden[small].detach().requires_grad_(), weight.detach(), h_teacher[small], w_teacher, ids
    ).backward()
    before, seconds = start_memory(), []
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        PATHS[path](hidden, weight, h_teacher, w_teacher, ids).backward()
        seconds.append(time.perf_counter() - started)
    head_gradient = weight.numel() * 4 / 2**20 if trained else 0.0
    print(json.dumps({"mb": round(extra_mb(before) - head_gradient), "seconds": round(min(seconds), 2)}))


def measured(path: str, n: int, d_vocab: int, d_model: int, trained: bool, repeats: int = 2) -> dict:
    result = in_process(__file__, path, n, d_vocab, d_model, int(trained), repeats)
    print(f"  {path:6} {n:6} positions: {result['mb']:6} MB, {result['seconds']:6.2f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the first size only, head frozen")
    options = parser.parse_args()
    summary, has_liger = [], importlib.util.find_spec("liger_kernel") is not None
    for n, d_vocab, d_model in SIZES[:1] if options.quick else SIZES:
        for trained in (False,) if options.quick else (False, True):
            print(f"V {d_vocab}, d {d_model}, head {'trained' if trained else 'frozen'}", flush=True)
            size = (d_vocab, d_model, trained)
            localized, full = measured("ours", n, *size), measured("naive", n, *size)
            fused = measured("liger", n, *size, 1) if has_liger else None
            short, long = (measured("ours", k, *size, 1) for k in (2048, 16384))
            hidden = [k * d_model * 4 / 2**20 for k in (2048, 16384)]  # the gradient that is returned
            beyond = [max(1, run["mb"] - h) for run, h in zip((short, long), hidden, strict=True)]
            summary.append(
                {
                    "V": d_vocab,
                    "d": d_model,
                    "positions": n,
                    "head": "trained" if trained else "frozen",
                    "memory_naive_over_ours": round(full["mb"] / max(1, localized["mb"]), 1),
                    "time_naive_over_ours": round(full["seconds"] / localized["seconds"], 2),
                    "memory_liger_over_ours": fused and round(fused["mb"] / max(1, localized["mb"]), 1),
                    "time_liger_over_ours": fused and round(fused["seconds"] / localized["seconds"], 2),
                    "memory_16384_over_2048": round(long["mb"] / max(1, short["mb"]), 2),
                    "the_same_beyond_the_hidden_gradient": round(beyond[1] / beyond[0], 2),
                }
            )
            print(json.dumps(summary[-1]), flush=True)
    print(json.dumps({"ratios": summary, **machine()}))


if __name__ == "__main__":
    if len(sys.argv) == 7:
        child(sys.argv[1], *map(int, sys.argv[2:5]), bool(int(sys.argv[5])), int(sys.argv[6]))
    else:
        main()
