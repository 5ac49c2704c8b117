"""What each function must give, against the model's own forward pass on one prompt: no padding, no cache.

A check takes a `Case` and raises AssertionError for a wrong number. Edits of the residual stream are plain
hooks on the blocks; divergences and losses are written out in float64. A function that refuses in a sentence
(SafeSteerError) is not wrong.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from conftest import PROMPTS, random_vector
from safesteer._errors import SafeSteerError
from safesteer.directions.extraction import (
    logistic_probe,
    mean_difference,
    pca_difference,
    prefill_contrast,
    system_contrast,
)
from safesteer.directions.refusal_tokens import COMPLIANCES, COMPLYING_SYSTEM, REFUSALS, REFUSING_SYSTEM
from safesteer.directions.scoring import SCORES, score
from safesteer.distillation.rollouts import StepPrompts, Teacher, sample_rollouts
from safesteer.distillation.state import prepare_student
from safesteer.distillation.step import take_step
from safesteer.exporting import export
from safesteer.models.batch import PromptBatch
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import ChatModel, as_chat
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate_ids
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.models.parts import blocks, final_norm
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.settings import DistillConfig, TokenConfig
from safesteer.steering.direction import Direction
from safesteer.steering.hooks import record_resid_pre
from safesteer.steering.interventions import ablate, add, clamp, gate
from safesteer.tokens.sampling import sample_answers
from safesteer.tokens.selection import banned_ids, select_tokens
from safesteer.tokens.token_set import SafetyToken, TokenSet

Edit = Callable[[Tensor], Tensor]  # of one prompt's residual stream, [1, pos, d_model]
LAYER, COEFF, N_NEW = 1, 4.0, 4


@dataclass(frozen=True, eq=False)
class Case:
    """A model with what the checks share: prompts as ids, a vector, and how much rounding is allowed."""

    chat: ChatModel

    def __post_init__(self) -> None:
        _ = self.vector  # read now: inside a hook it would be read by an edited model

    @cached_property
    def half(self) -> bool:
        return next(self.chat.model.parameters()).dtype == torch.bfloat16

    @cached_property
    def vector(self) -> Tensor:
        vector = random_vector(self.chat.d_model, seed=3)
        try:
            scale = self.residual(self.ids("Hello"))[LAYER].norm(dim=-1).median()
        except SafeSteerError:  # several streams: logits can be read, nothing can be steered
            return vector
        return vector / vector.norm() * scale / 4

    @cached_property
    def pairs(self) -> PromptSet:
        return load_prompts().split("val").first(3)

    @cached_property
    def tokens(self) -> TokenSet:
        allowed = (~banned_ids(self.chat)).nonzero().flatten()[100::20][:12].tolist()
        return TokenSet(tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in allowed), {}, {}, 1)

    @cached_property
    def direction(self) -> Direction:
        made = mean_difference(self.chat, self.pairs).direction(self.chat, "-1", LAYER, prompts=self.pairs)
        return Direction(**{**vars(made), "vector": self.vector, "coeff": COEFF})

    def ids(self, prompt: str, answer: str = "", system: str | None = None) -> list[int]:
        """Render with the tokenizer's own template."""
        messages = [{"role": "user", "content": prompt}]
        messages = messages if system is None else [{"role": "system", "content": system}, *messages]
        text = self.chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tails = self.chat.tokenizer(answer, add_special_tokens=False).input_ids if answer else []
        return [*self.chat.tokenizer(text, add_special_tokens=False).input_ids, *tails]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], edits: dict[int, Edit] | None = None) -> Tensor:
        """The model's own logits on one prompt, [pos, d_vocab], with edits before blocks."""
        return own_logits(self.chat, self.chat.model, ids, edits).float()

    @torch.no_grad()
    def residual(self, ids: Sequence[int]) -> list[Tensor]:
        """What each block reads, by hooks of its own, [pos, d_model] in float64."""
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for block in blocks(self.chat.model):
                stack.callback(block.register_forward_pre_hook(_keep(seen), with_kwargs=True).remove)
            self.chat.model(torch.tensor([ids]), use_cache=False)
        return seen

    def near(
        self, got: Tensor, want: Tensor, name: str, tolerance: float = 1e-3, of: Tensor | None = None
    ) -> None:
        """Equal up to rounding, in units of the spread of what is wanted (or of `of`: its terms)."""
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)} for {tuple(want.shape)}"
        got, want, terms = got.double(), want.double(), (want if of is None else of).double()
        off = float((got - want).abs().max() / terms.std().clamp(min=1e-9))
        limit = 0.25 if self.half else tolerance
        assert off <= limit, f"{name}: off by {off:.2g} of the spread"


def _keep(seen: list[Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        if h.dim() != 3:
            raise SafeSteerError("The residual stream is not one vector per position.")
        seen.append(h[0].double())

    return keep


def own_logits(
    chat: ChatModel, model: nn.Module, ids: Sequence[int], edits: dict[int, Edit] | None = None
) -> Tensor:
    """One forward pass of the model itself, without a cache."""

    def before(edit: Edit) -> Callable[..., tuple[tuple, dict]]:
        def edited(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return edited

    with ExitStack() as stack:
        for layer, edit in (edits or {}).items():
            hook = blocks(model)[layer].register_forward_pre_hook(before(edit), with_kwargs=True)
            stack.callback(hook.remove)
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0][:, : chat.d_vocab]


@torch.no_grad()
def _logits_in_batch(case: Case, n_last: int, answers: Sequence[list[int]] | None = None) -> Tensor:
    """Logits of all prompts at the last positions, in the batches that the model can read."""
    logits: dict[int, Tensor] = {}
    for rows, batch in case.chat.batched(PROMPTS, len(PROMPTS), continuations=answers):
        hidden = final_hidden(case.chat.model, batch)[:, -n_last:]
        logits |= dict(zip(rows, logits_of(hidden, *output_head(case.chat.model)), strict=True))
    return torch.stack([logits[row] for row in range(len(PROMPTS))])


# --- reading ---


def check_logits(case: Case) -> None:
    for prompt in PROMPTS:
        ids = case.ids(prompt)
        with torch.no_grad():
            hidden = final_hidden(case.chat.model, PromptBatch.from_ids([ids], [[]]))[0]
        case.near(logits_of(hidden, *output_head(case.chat.model)), case.logits(ids), "logits")


def check_batches(case: Case) -> None:
    want = torch.stack([case.logits(case.ids(p))[-2:] for p in PROMPTS])
    case.near(_logits_in_batch(case, 2), want, "logits in a batch")


def _greedy(case: Case, prompt: str, edits: Callable[[int], dict[int, Edit]] | None = None) -> list[int]:
    ids, new = case.ids(prompt), []
    while len(new) < N_NEW and not (new and new[-1] in case.chat.eos_ids):
        logits = case.logits([*ids, *new], edits(len(ids)) if edits else None)[-1]
        top = logits.topk(2)
        if float(top.values[0] - top.values[1]) < (0.5 if case.half else 2e-3) * float(logits.std()):
            return new  # a tie: either is right
        new.append(int(top.indices[0]))
    return new


def _answers(case: Case) -> list[list[int]]:
    answers: dict[int, list[int]] = {}
    for rows, batch in case.chat.batched(PROMPTS, len(PROMPTS)):
        new = generate_ids(case.chat, batch, max_new_tokens=N_NEW).tolist()
        answers |= dict(zip(rows, new, strict=True))
    return [answers[row] for row in range(len(PROMPTS))]


def _same_answers(
    case: Case,
    together: list[list[int]],
    name: str,
    edits: Callable[[int], dict[int, Edit]] | None = None,
) -> None:
    for prompt, got in zip(PROMPTS, together, strict=True):
        want = _greedy(case, prompt, edits)
        assert got[: len(want)] == want, f"{name}: {got} for {want} after {prompt!r}"


def check_answers(case: Case) -> None:
    _same_answers(case, _answers(case), "greedy answers")


# --- extraction ---


def check_extraction(case: Case) -> None:
    harmful, harmless = case.pairs.harmful, case.pairs.harmless
    n_pos = len(mean_difference(case.chat, case.pairs).positions)

    def ends(texts: Sequence[str], system: str | None = None) -> Tensor:
        rows = [torch.stack(case.residual(case.ids(t, system=system)))[:, -n_pos:] for t in texts]
        return torch.stack(rows).transpose(1, 2)  # [prompt, pos, layer, d_model]

    def over(continuations: Sequence[str]) -> Tensor:
        rows = []
        for i, text in enumerate(harmful):
            whole = case.ids(text, continuations[i % len(continuations)])
            start = len(case.ids(text))
            rows.append(torch.stack(case.residual(whole))[:, start:].mean(1)[None])
        return torch.stack(rows)

    a, b = ends(harmful), ends(harmless)
    mean = a.mean(0) - b.mean(0)
    case.near(mean_difference(case.chat, case.pairs).vectors, mean, "difference of means", of=a)
    want = (over(REFUSALS) - over(COMPLIANCES)).mean(0)
    case.near(prefill_contrast(case.chat, case.pairs).vectors, want, "prefill contrast", of=a)
    want = (ends(harmful, REFUSING_SYSTEM) - ends(harmful, COMPLYING_SYSTEM)).mean(0)
    case.near(system_contrast(case.chat, case.pairs).vectors, want, "system contrast", of=a)
    pca, probe = pca_difference(case.chat, case.pairs).vectors, logistic_probe(case.chat, case.pairs).vectors
    assert bool(torch.stack([pca, probe]).isfinite().all()), "components that are not finite"
    # A first principal component explains at least as much as the mean does, and probes separate.
    differences = (a - b).float()
    for pos in range(n_pos):
        for layer in range(case.chat.n_layers):
            x, axis = differences[:, pos, layer], pca[pos, layer]
            top = torch.linalg.svdvals(x)[0]
            if float(top) > 1e-3 * float(a.std()) and float(axis.norm()) > 1e-6 and not case.half:
                share = float((x @ (axis / axis.norm())).norm() / top.clamp(min=1e-9))
                assert share > 0.99, f"first component explains {share:.2f} of its variance"


# --- steering ---


def _edit(
    case: Case, at: Callable[[int, int], Tensor], layer: int = LAYER
) -> Callable[[int], dict[int, Edit]]:
    """Add the vector at the positions that `at` marks, given the prompt's length and the text's."""

    def edits(n_prompt: int) -> dict[int, Edit]:
        def edit(h: Tensor) -> Tensor:
            inside = at(n_prompt, h.shape[1]).to(h)[:, None]
            return h + inside * (COEFF * case.vector.to(h))

        return {layer: edit}

    return edits


def check_add(case: Case) -> None:
    column = torch.arange
    scopes: dict[str, Callable[[int, int], Tensor]] = {
        "all": lambda n, total: torch.ones(total),
        "prompt": lambda n, total: column(total) < n,
        "answer": lambda n, total: column(total) >= n,
        "last": lambda n, total: (column(total) < n) & (column(total) >= n - 2),
    }
    answers = [[7 + i, 60 + i, 90 + i] for i in range(len(PROMPTS))]
    for scope, at in scopes.items():
        edits = _edit(case, at)
        with add(case.chat, case.vector, LAYER, COEFF, scope=scope, n_last=2):
            got, together = _logits_in_batch(case, 3, answers), _answers(case)
        _same_answers(case, together, f"answers with add, scope {scope}", edits)
        for i, prompt in enumerate(PROMPTS):
            ids = case.ids(prompt)
            want = case.logits([*ids, *answers[i]], edits(len(ids)))[-3:]
            case.near(got[i], want, f"add, scope {scope}")
    case.near(_logits_in_batch(case, 1)[0], case.logits(case.ids(PROMPTS[0]))[-1:], "after the block")


def check_clamp(case: Case) -> None:
    unit, value = case.vector / case.vector.norm(), float(case.vector.norm())

    def edits(n_prompt: int) -> dict[int, Edit]:
        def edit(h: Tensor) -> Tensor:
            u = unit.to(h)
            return h + (value - (h @ u))[..., None] * u

        return {LAYER: edit}

    with clamp(case.chat, case.vector, LAYER, value):
        got, together = _logits_in_batch(case, 2), _answers(case)
    _same_answers(case, together, "answers with clamp", edits)
    want = torch.stack([case.logits(case.ids(p), edits(0))[-2:] for p in PROMPTS])
    case.near(got, want, "clamp")


def check_gate(case: Case) -> None:
    unit, layer = case.vector / case.vector.norm(), case.chat.n_layers - 1
    at_end = [float(case.residual(case.ids(p))[layer][-1] @ unit.double()) for p in PROMPTS]
    ordered = sorted(at_end)
    # In the widest gap: with a window, prompts that end alike project alike.
    low, high = max(pairwise(ordered), key=lambda pair: pair[1] - pair[0])
    if high - low < 1e-3 * float(case.vector.norm()):
        low = high = ordered[0] - float(case.vector.norm())
    threshold = (low + high) / 2
    open_rows = {p: value > threshold for p, value in zip(PROMPTS, at_end, strict=True)}
    with gate(case.chat, case.vector, layer, threshold, COEFF):
        got, together = _logits_in_batch(case, 1), _answers(case)
    for i, prompt in enumerate(PROMPTS):
        edits = _edit(case, lambda n, total: torch.arange(total) >= n - 1, layer)
        ids = case.ids(prompt)
        want = case.logits(ids, edits(len(ids)) if open_rows[prompt] else None)[-1:]
        case.near(got[i], want, "gate")
        answer = _greedy(case, prompt, edits if open_rows[prompt] else None)
        assert together[i][: len(answer)] == answer, "answers with gate"


def _norms(chat: ChatModel) -> list[nn.Module]:
    """Return the final norm, for families that have one."""
    try:
        return [final_norm(chat.model)]
    except SafeSteerError:
        return []


@torch.no_grad()
def check_ablate(case: Case) -> None:
    """Nothing of the direction is left in what blocks, their norms and the final norm read."""
    unit = case.vector / case.vector.norm()
    left: list[float] = []
    first = blocks(case.chat.model)[0]

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        h = args[0] if args else kwargs.get("hidden_states")
        if module is first:
            left.clear()  # what was read before is no residual stream: some put the norm on the embedding too
        if isinstance(h, Tensor) and h.shape[-1] == len(unit):
            left.append(float((h.double() @ unit.double()).abs().max() / h.double().norm(dim=-1).max()))

    with ablate(case.chat, case.vector), ExitStack() as stack:
        for module in (*blocks(case.chat.model), *_norms(case.chat)):
            stack.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
        got = _logits_in_batch(case, 1)
        single = [
            logits_of(
                final_hidden(case.chat.model, PromptBatch.from_ids([case.ids(p)], [[]]))[:, -1:],
                *output_head(case.chat.model),
            )[0]
            for p in PROMPTS
        ]
    assert len(left) >= case.chat.n_layers, "nothing was read"
    limit = 2e-2 if case.half else 1e-5
    assert max(left) < limit, f"ablation leaves {max(left):.2g} of the residual's length"
    case.near(got, torch.stack(single), "ablate in a batch")
    case.near(_logits_in_batch(case, 1)[0], case.logits(case.ids(PROMPTS[0]))[-1:], "after the block")


# --- scores and selection ---


def _refusal(logits: Tensor, ids: Tensor) -> float:
    p = logits.double().softmax(-1)
    on = p[ids].sum()
    return float(on.log() - (1 - on).log())


@torch.no_grad()
def check_scores(case: Case) -> None:
    refusal_ids = case.tokens.ids[:5]
    layers = [0, case.chat.n_layers - 1]
    vectors = torch.stack([case.vector, random_vector(case.chat.d_model, 5) * case.vector.norm() / 4])
    got = score(case.chat, vectors, layers, case.pairs, refusal_ids)
    for i, layer in enumerate(layers):
        shift = {layer: lambda h, v=vectors[i]: h + v.to(h)}
        want: dict[str, list[float]] = {name: [] for name in SCORES}
        for text in case.pairs.harmful:
            with ablate(case.chat, vectors[i]):
                want["ablation_refusal"].append(_refusal(case.logits(case.ids(text))[-1], refusal_ids))
        for text in case.pairs.harmless:
            ids = case.ids(text)
            want["steering_refusal"].append(_refusal(case.logits(ids, shift)[-1], refusal_ids))
            new: list[int] = []
            for _ in range(2):  # an answer that has ended stays ended
                ended = bool(new) and new[-1] in case.chat.eos_ids
                new.append(new[-1] if ended else int(case.logits([*ids, *new])[-1].argmax()))
            ids += new
            p = case.logits(ids)[-3:].double().log_softmax(-1)
            with ablate(case.chat, vectors[i]):
                q = case.logits(ids)[-3:].double().log_softmax(-1)
            n_counting = 1 + next((k for k, t in enumerate(new) if t in case.chat.eos_ids), len(new))
            want["kl_harmless"].append(float((p.exp() * (p - q)).sum(-1)[:n_counting].mean()))
        for name in SCORES:
            expected, limit = torch.tensor(want[name]).double(), 0.5 if case.half else 2e-3
            off = float((got[name][i] - expected).abs().max() / (1 + expected.abs().max()))
            assert off < limit, f"{name} at layer {layer}: off by {off:.2g}"


@torch.no_grad()
def check_selection(case: Case) -> None:
    config = TokenConfig(k=10, k_vote=5, horizon=3, n_samples=2, min_steered_prob=1e-4)
    prompts = case.pairs.harmless
    sampled = sample_answers(case.chat, case.direction, prompts, config)
    chosen = select_tokens(case.chat, case.direction, prompts, config, sampled=sampled)
    edits = _edit(case, lambda n, total: torch.ones(total))(0)
    banned, n_vocab, head = banned_ids(case.chat), case.chat.d_vocab, output_head(case.chat.model)
    ours: list[tuple[Tensor, Tensor]] = []
    votes, p_steered, n = torch.zeros(n_vocab), torch.zeros(n_vocab).double(), 0
    rows: list[Tensor] = []
    for row, prompt in enumerate(sampled.prompts):
        ids = [*case.ids(prompt), *sampled.completion_ids[row].tolist()]
        at = slice(-config.horizon - 1, -1)
        base = case.logits(ids)[at].double().log_softmax(-1)
        steered = case.logits(ids, edits)[at].double().log_softmax(-1)
        for step in range(config.horizon):
            got = [logits_of(h[row, step], *head).log_softmax(-1) for h in (sampled.teacher, sampled.base)]
            ours.append((torch.stack(got).double(), torch.stack([steered[step], base[step]])))
            if bool(sampled.valid[row, step]):
                p_steered, n = p_steered + steered[step].exp(), n + 1
                rows.append(steered[step] - base[step])
    for got, want in ours:
        case.near(got, want, "log-probabilities of teacher and base", 2e-3)
    if case.half:
        return
    allowed = ~banned & (p_steered / n >= config.min_steered_prob)
    for delta in rows:
        votes[delta.masked_fill(~allowed, -torch.inf).topk(config.k_vote).indices] += 1
    got_votes = {token.id: token.votes for token in chosen.tokens}
    off = sum(abs(got_votes[i] - int(votes[i])) for i in got_votes)
    assert off <= 0.02 * len(rows) * config.k_vote, f"votes differ by {off} of {len(rows) * config.k_vote}"


# --- training ---

STEP = {"n_steps": 4, "harmful_per_step": 2, "harmless_per_step": 2, "max_new_tokens": 3, "warmup": 0.0}


def _trained(case: Case) -> SimpleNamespace:
    """One step of a student whose weights lie beside the base's, with its gradients."""
    config = DistillConfig(**STEP, lr=1e-3, max_grad_norm=1e9, train_layers="all", rollouts="student")
    plain = case.chat.copy()
    student = ChatModel(plain.model.float(), plain.tokenizer, plain.name)
    generator = torch.Generator().manual_seed(4)
    for p in student.model.parameters():
        p.data += 0.02 * p.data.std(correction=0) * torch.randn(p.shape, generator=generator)
    before = copy.deepcopy(student.model)
    state = prepare_student(student, case.direction, config)
    prompts = StepPrompts.of(case.pairs.harmful, case.pairs.harmless, config, 0)
    rollouts = sample_rollouts(student, prompts, config)
    record = take_step(state, Teacher(case.chat, case.direction, case.tokens), prompts)
    return SimpleNamespace(
        config=config, before=before, state=state, prompts=prompts, rollouts=rollouts, record=record
    )


def _wide(model: nn.Module) -> nn.Module:
    """Copy in float64, with experts one after the other: grouped products know no float64.

    Two families (XGLM, Inkling 2) do not run in float64: they stay in float32.
    """
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    try:
        wide(torch.tensor([[5, 6, 7]]), use_cache=False)
    except RuntimeError:
        wide.float()
    return wide


def check_loss(case: Case) -> None:
    """Loss and gradient of a step against float64 autograd through the model's own logits."""
    made = _trained(case)
    wide = _wide(made.before).requires_grad_(True)
    base = _wide(case.chat.model)
    S, config = case.tokens.ids, made.config
    steer = _edit(case, lambda n, total: torch.ones(total))(0)
    losses, weights = [], []
    width = made.rollouts.mask.shape[1]
    for row, mask in enumerate(made.rollouts.mask.tolist()):
        prompt = made.rollouts.texts[row // config.n_rollouts]
        n, harmful = sum(mask), prompt in made.prompts.harmful
        ids = [*case.ids(prompt), *made.rollouts.batch.prompt_ids[row, -width:].tolist()[:n]]
        with torch.no_grad():
            q = own_logits(case.chat, base, ids, steer if harmful else None)[-n - 1 : -1]
        p = own_logits(case.chat, wide, ids)[-n - 1 : -1]
        compared = S if harmful else slice(None)  # harmless answers are held over the whole vocabulary
        p, q = (logits.double().log_softmax(-1)[:, compared] for logits in (p, q))
        terms = (p.exp() - q.exp()) * (p - q) / 2  # the symmetric divergence: its - p + q cancel
        early = torch.tensor([config.decay**j for j in range(n)]).double()
        losses.append((terms.sum(-1) * early).sum() / early.sum())
        weights.append(1.0 if harmful else config.anchor_weight)
    loss = torch.stack(losses) @ torch.tensor(weights).double() / sum(weights)
    loss.backward()
    limit = 5e-2 if case.half else 1e-3
    off = abs(made.record.loss - float(loss.detach())) / float(loss.detach())
    assert off < limit, f"loss off by {off:.2g}"
    want = {name: p.grad for name, p in wide.named_parameters() if p.grad is not None}
    total = torch.stack([g.norm() for g in want.values()]).norm()
    got = {name: p.grad for name, p in made.state.student.model.named_parameters() if p.grad is not None}
    differences = [
        (got[name].double() if name in got else torch.zeros_like(g)).sub(g).norm() for name, g in want.items()
    ]
    off = float(torch.stack(differences).norm() / total)
    assert off < (0.2 if case.half else 1e-3), f"gradient off by {off:.2g}"


def check_step(case: Case) -> None:
    """One optimizer step is torch's own AdamW step on these gradients."""
    made = _trained(case)
    after = dict(made.state.student.model.named_parameters())
    before = dict(made.before.named_parameters())
    trained = [name for name, p in after.items() if p.grad is not None]
    leaves = [nn.Parameter(before[name].detach().clone()) for name in trained]
    for leaf, name in zip(leaves, trained, strict=True):
        leaf.grad = after[name].grad
    torch.optim.AdamW(leaves, lr=made.record.lr, weight_decay=made.config.weight_decay).step()
    assert made.record.lr > 0
    assert trained, "nothing trains"
    for leaf, name in zip(leaves, trained, strict=True):
        off = float((leaf - after[name]).detach().abs().max())
        assert off < 1e-2 * made.record.lr, f"{name} moved otherwise than AdamW moves it"


# --- files and the bridge ---


@torch.no_grad()
def check_export(case: Case) -> None:
    """Plain transformers reads the folder back: same logits, same prompt."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        export(case.chat, path)
        kinds = json.loads((path / "config.json").read_text())["architectures"]
        auto = AutoModelForImageTextToText if "ConditionalGeneration" in kinds[0] else AutoModelForCausalLM
        model = auto.from_pretrained(path, dtype=next(case.chat.model.parameters()).dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    ids = case.ids(PROMPTS[1])
    case.near(own_logits(case.chat, model, ids).float(), case.logits(ids), "logits of the export", 1e-5)
    message = [{"role": "user", "content": PROMPTS[1]}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text, add_special_tokens=False).input_ids == ids, "prompt of the export"


@torch.no_grad()
def check_bridge(case: Case) -> None:
    """The bridge reads, steers and ablates as the plain model does."""
    bridged = as_chat(to_bridge(case.chat))
    batch = next(batch for _, batch in case.chat.batched(PROMPTS, len(PROMPTS)))
    layers = list(range(case.chat.n_layers))

    def run(chat: ChatModel) -> tuple[Tensor, Tensor]:
        with record_resid_pre(chat, layers, lambda h: h[:, -2:].clone()) as resid_pre:
            hidden = final_hidden(chat.model, batch)[:, -2:]
        logits = logits_of(hidden, *output_head(chat.model))
        return logits, torch.stack([resid_pre[layer] for layer in layers])

    for name, steering in (
        ("as it is", lambda c: ExitStack()),
        ("with add", lambda c: add(c, case.vector, LAYER, COEFF)),
        ("with ablate", lambda c: ablate(c, case.vector)),
    ):
        results = []
        for chat in (bridged, case.chat):
            with steering(chat):
                results.append(run(chat))
        for what, got, want in zip(("logits", "resid_pre"), *results, strict=True):
            # GPT-1's bridge masks by adding large numbers, which costs digits.
            case.near(got, want, f"{what} of the bridge {name}", 3e-3)


CHECKS: dict[str, Callable[[Case], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
