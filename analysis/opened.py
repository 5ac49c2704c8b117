"""Where does a refusal end once an answer has been opened? The teacher and students, token by token.

    python analysis/opened.py RUN [--model smollm2-135m] [--students NAME=FOLDER ...]

Question (not of the paper): do students refuse less in opened answers because they have not learnt to, or
because their teacher does not refuse there either?

1. The steered base answers the val prompts. The answers that refuse are cut to 8 tokens.
2. Base, steered base and students read them after 0, 2 and 10 tokens of the openings that train. A row per
   model, opening and token: its mean probability. The steered base after 0 tokens is the teacher of
   `distillation.disguises`.
3. Base, steered base at one to two and a half times its coefficient, and students write on from the openings
   themselves (48 tokens, `declines`). A row per model and opening: the share that refuses, and that repeats
   four words.
RUN holds a direction (of deeper.py); students are folders that it has kept. No test prompt is read. Rows:
analysis/results/opened/probabilities.csv and refused.csv.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from deeper import TOKENS, opened_answers, openings, refuses
from jaxtyping import Float
from methods import answer_logits, logp_of
from torch import Tensor

import safesteer as ss
from safesteer.evaluation.quality import repeats_itself
from safesteer.models.chat_model import ChatModel

OPENED = (0, 2, 10)  # tokens of an opening
N_READ = 8  # tokens of a refusal
TIMES = (1.0, 1.5, 2.0, 2.5)  # the coefficient


@torch.no_grad()
def probabilities(
    chat: ChatModel, prompts: Sequence[str], starts: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
) -> Float[Tensor, " new_pos"]:
    """Return the mean probability of each token of the refusals, where `starts` stand before them."""
    tails = [[*start, *answer] for start, answer in zip(starts, ids, strict=True)]
    logits = answer_logits(chat, prompts, tails)
    logps = [logp_of(z.float(), tail)[-N_READ:] for z, tail in zip(logits, tails, strict=True)]
    return torch.stack(logps).exp().mean(0)


def refused(chat: ChatModel, prompts: Sequence[str], k: int) -> dict[str, float]:
    """Let a model write on from k tokens of an opening."""
    answers = opened_answers(chat, prompts, "train", k)
    verdicts = [refuses(prompt, opened) for prompt, opened in zip(prompts, answers, strict=True)]
    return {
        "refused": sum(verdicts) / len(verdicts),
        "repeats": sum(repeats_itself(opened.written) for opened in answers) / len(answers),
        "n": len(prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--students", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("analysis/results/opened"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = ss.load_model(args.model, dtype="auto")
    direction = ss.Direction.load(args.run / "direction.safetensors", base)
    prompts = ss.load_prompts().split("val").harmful
    with ss.steer(base, direction):
        texts = ss.generate(base, prompts, max_new_tokens=TOKENS)
    taught = [(p, base.encode(t)[:N_READ]) for p, t in zip(prompts, texts, strict=True) if ss.declines(p, t)]
    asked, ids = [p for p, i in taught if len(i) == N_READ], [i for _, i in taught if len(i) == N_READ]

    models = {"base": base, "steered base": base}
    for pair in args.students:
        name, _, folder = pair.partition("=")
        models[name] = ss.load_model(folder, dtype="auto")
    read, written = [], []
    for name, chat in models.items():
        for k in OPENED:
            with ss.steer(chat, direction) if name == "steered base" else nullcontext():
                values = probabilities(chat, asked, openings(chat, "train", k, len(asked)), ids).tolist()
            read += [
                {"model": name, "opened_by": k, "token": i + 1, "probability": p, "n": len(ids)}
                for i, p in enumerate(values)
            ]
            for times in TIMES if name == "steered base" else (1.0,):
                strong = direction.with_coeff(direction.coeff * times)
                with ss.steer(chat, strong) if name == "steered base" else nullcontext():
                    made = refused(chat, prompts, k)
                written.append({"model": name, "coefficient": times, "opened_by": k, **made})
                print(written[-1], flush=True)
    pd.DataFrame(read).to_csv(args.out / "probabilities.csv", index=False, float_format="%.4f")
    pd.DataFrame(written).to_csv(args.out / "refused.csv", index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
