"""Two-way checks of `gpu.py`: the same numbers on the CPU and on a device, and what each makes read by both.

Weights, prompts and random draws are the same, in float32 (TF32 is off unless it was turned on). What is left
is the order of sums. The largest difference is compared with the spread of the CPU's values; students of
several steps may differ more, because Adam gives a gradient that is rounding a whole step.
"""

import copy
from collections.abc import Iterator

import torch

import safesteer as ss
from safesteer.directions.extraction import prefill_contrast
from safesteer.directions.refusal_tokens import refusal_token_ids
from safesteer.directions.scoring import score
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.models.batch import PromptBatch
from safesteer.models.forward import final_hidden, last_logits

N_PROMPTS, LIMIT, TRAINED_LIMIT = 8, 0.01, 0.1  # of the spread
LENGTHS = 63, 64, 65, 192  # cuDNN's attention returned NaN at 64 and 192 (pytorch issue 196678)
STEPS = {
    "n_steps": 3,
    "harmful_per_step": 4,
    "harmless_per_step": 4,
    "max_new_tokens": 8,
    "rollouts": "student",
}


def compared(chat: ss.ChatModel, device: torch.device) -> Iterator[dict]:
    """Compare a model on the CPU with its copy on the device, stage by stage."""
    chats = here, there = chat, on(chat, device)
    prompts = ss.load_prompts()
    direction, tokens = teaching(chat, prompts)
    for name, make in (("logits", logits), ("directions", directions), ("sweep", sweep_scores)):
        yield difference(name, make(here, prompts), make(there, prompts))
    texts = prompts.split("val").harmful[:N_PROMPTS]
    for name, temperature in (("greedy answers", 0.0), ("sampled answers", 1.0)):
        answers = [ss.generate(c, texts, max_new_tokens=16, temperature=temperature) for c in chats]
        same = sum(a == b for a, b in zip(*answers, strict=True))
        yield {"what": name, "note": f"{same} of {len(texts)} are the same"}
    (of_cpu, want), (of_device, got) = (train(c, direction, tokens, prompts) for c in chats)
    yield difference("losses and masses of the first step", want[0], got[0])
    yield difference("losses and masses of all steps", want, got, TRAINED_LIMIT)
    for name, student in (("student of the CPU", of_cpu), ("student of the device", of_device)):
        read = (logits(on(student, place), prompts) for place in (chat.device, device))
        yield difference(f"{name}, read by both", *read)
    read = (logits(on(student, chat.device), prompts) for student in (of_cpu, of_device))
    yield difference("students, both read by the CPU", *read, TRAINED_LIMIT)
    finite = all(has_finite_gradient(there, n) for n in LENGTHS)
    yield {"what": f"finite gradients at {LENGTHS} columns, in bfloat16", "right": finite}
    earned = [c.check().right.tolist() for c in chats]
    yield {"what": "short cuts that the model earns", "right": earned[0] == earned[1]}


def on(chat: ss.ChatModel, device: torch.device) -> ss.ChatModel:
    """Copy a model to a device."""
    return ss.ChatModel(copy.deepcopy(chat.model).to(device), chat.tokenizer, chat.name)


def teaching(chat: ss.ChatModel, prompts: ss.PromptSet) -> tuple[ss.Direction, ss.TokenSet]:
    """Make a direction and S on the CPU, so that both places teach the same."""
    candidates = prefill_contrast(chat, prompts.split("train").first(N_PROMPTS))
    direction = candidates.direction(chat, "mean", chat.n_layers // 3, coeff=2.0)
    config = ss.TokenConfig(k=20, horizon=3, n_samples=1, min_steered_prob=0.0)
    return direction, ss.select_tokens(chat, direction, prompts.split("val").harmless[:N_PROMPTS], config)


@torch.no_grad()
def logits(chat: ss.ChatModel, prompts: ss.PromptSet) -> torch.Tensor:
    texts = prompts.split("val").harmful[:N_PROMPTS]
    return last_logits(chat, PromptBatch.of(chat.tokenizer, texts, device=chat.device))[:, 0]


def directions(chat: ss.ChatModel, prompts: ss.PromptSet) -> torch.Tensor:
    return prefill_contrast(chat, prompts.split("train").first(N_PROMPTS)).vectors


def sweep_scores(chat: ss.ChatModel, prompts: ss.PromptSet) -> torch.Tensor:
    vectors = torch.randn(4, chat.d_model, generator=torch.Generator().manual_seed(0))
    layers = [n * chat.n_layers // 4 for n in range(4)]
    pairs, ids = prompts.split("val").first(4), refusal_token_ids(chat.tokenizer)
    return torch.cat(list(score(chat, vectors, layers, pairs, ids).values()), 1)


def train(
    chat: ss.ChatModel, direction: ss.Direction, tokens: ss.TokenSet, prompts: ss.PromptSet
) -> tuple[ss.ChatModel, torch.Tensor]:
    """Take a few steps from the same weights; return the student, and loss and masses of each step."""
    student, config = on(chat, chat.device), ss.DistillConfig(**STEPS)
    state = prepare_student(student, direction, config)
    records = training_steps(state, Teacher(chat, direction, tokens), prompts.split("distill"))
    rows = [(r.loss, r.mass_on_s_student, r.mass_on_s_teacher) for r in records]
    return student, torch.tensor(rows)


def has_finite_gradient(chat: ss.ChatModel, n_columns: int) -> bool:
    """Say whether a padded batch of so many columns gives every weight a finite gradient."""
    student = on(chat, chat.device)
    student.model.requires_grad_(True)
    ids = chat.encode(" tide" * (2 * n_columns))
    batch = PromptBatch.from_ids(
        [ids[:n_columns], ids[: n_columns // 2]], [[], []], device=chat.device, share=False
    )
    with torch.autocast(chat.device.type, torch.bfloat16):
        final_hidden(student.model, batch).float().pow(2).sum().backward()
    return all(p.grad.isfinite().all() for p in student.model.parameters() if p.grad is not None)


def difference(what: str, want: torch.Tensor, got: torch.Tensor, limit: float = LIMIT) -> dict:
    """Compare with the CPU's values."""
    want, got = want.double().cpu(), got.double().cpu()
    largest = float((got - want).abs().max())
    share = largest / max(float(want.std()), 1e-30)
    return {"what": what, "max_abs_difference": largest, "of_the_spread": share, "right": share < limit}
