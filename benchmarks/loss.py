"""Memory and time of the loss and its gradient against full logits, in one run.

    python benchmarks/loss.py [--quick]

Each measurement runs in a process of its own: hidden states and heads are made and touched, then one
forward and backward pass is run, and peak resident memory above that start is read. The head's own
gradient, which every path must hold when the head is trained, is taken off.

    ours    logps_on for student and teacher, reverse generalized divergence on |S| = 50
    naive   log_softmax of student and teacher over the vocabulary, float32, then the 50 columns
    liger   fused linear JSD of liger-kernel over the whole vocabulary, if it is installed
"""

import argparse
import gc
import json
import platform
import resource
import subprocess
import sys
import time

import torch

SIZES = [(8192, 49152, 576), (2048, 151936, 1024)]
N_SET = 50


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(hidden, weight, h_teacher, w_teacher, ids):
    from safesteer.divergence import localized_divergence, logps_on

    with torch.no_grad():
        q = logps_on(h_teacher, w_teacher, ids)
    p = logps_on(hidden, weight, ids)
    return localized_divergence(p, q, "reverse", "generalized").mean()


def naive(hidden, weight, h_teacher, w_teacher, ids):
    with torch.no_grad():
        q = (h_teacher @ w_teacher.T).float().log_softmax(-1)[:, ids]
    p = (hidden @ weight.T).float().log_softmax(-1)[:, ids]
    return (p.exp() * (p - q) - p.exp() + q.exp()).sum(-1).mean()


def liger(hidden, weight, h_teacher, w_teacher, ids):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    labels = torch.zeros(len(hidden), dtype=torch.long)
    return loss(hidden, weight, h_teacher, w_teacher, labels)


PATHS = {"ours": ours, "naive": naive, "liger": liger}


def child(path: str, n: int, d_vocab: int, d_model: int, trained: bool, repeats: int) -> None:
    import safesteer.divergence  # noqa: F401  (imports are not the loss's memory)

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
    gc.collect()
    before, seconds = peak_mb(), []
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        PATHS[path](hidden, weight, h_teacher, w_teacher, ids).backward()
        seconds.append(time.perf_counter() - started)
    own = weight.numel() * 4 / 2**20 if trained else 0.0
    print(json.dumps({"mb": round(peak_mb() - before - own), "seconds": round(min(seconds), 2)}))


def measured(path: str, n: int, d_vocab: int, d_model: int, trained: bool, repeats: int = 2) -> dict | None:
    arguments = [path, str(n), str(d_vocab), str(d_model), str(int(trained)), str(repeats)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        print(f"  {path}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'failed'}", flush=True)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {path:6} {n:6} positions: {found['mb']:6} MB, {found['seconds']:6.2f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the first size only, head frozen")
    options = parser.parse_args()
    summary = []
    for n, d_vocab, d_model in SIZES[:1] if options.quick else SIZES:
        for trained in (False,) if options.quick else (False, True):
            print(f"V {d_vocab}, d {d_model}, head {'trained' if trained else 'frozen'}", flush=True)
            mine = measured("ours", n, d_vocab, d_model, trained)
            theirs = measured("naive", n, d_vocab, d_model, trained)
            fused = measured("liger", n, d_vocab, d_model, trained, 1)
            short, long = (measured("ours", k, d_vocab, d_model, trained, 1) for k in (2048, 16384))
            if not (mine and theirs and short and long):
                raise SystemExit("a measurement failed")
            summary.append(
                {
                    "V": d_vocab,
                    "d": d_model,
                    "positions": n,
                    "head": "trained" if trained else "frozen",
                    "memory_naive_over_ours": round(theirs["mb"] / max(1, mine["mb"]), 1),
                    "time_naive_over_ours": round(theirs["seconds"] / mine["seconds"], 2),
                    "memory_liger_over_ours": round(fused["mb"] / max(1, mine["mb"]), 1) if fused else None,
                    "memory_16384_over_2048": round(long["mb"] / max(1, short["mb"]), 2),
                }
            )
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"ratios": summary, **machine}))


if __name__ == "__main__":
    if len(sys.argv) == 7:
        child(sys.argv[1], *map(int, sys.argv[2:5]), bool(int(sys.argv[5])), int(sys.argv[6]))
    else:
        main()
