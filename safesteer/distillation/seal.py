"""Hold a model's safety while it is fine-tuned on something else: a callback of transformers' Trainer.

    Trainer(model, ..., callbacks=[ss.SafetySeal(model, tokenizer, tokens=tokens)])

1. When it is made, the model opens an answer to some harmful prompts and to their harmless twins. Its
   probabilities q of the tokens of S, and of all others together, are stored at these positions.
2. At the start of an optimizer step a few of the prompts are read again with the same openings, and the
   gradient of weight x KL(q || p) is left with the weights; the Trainer adds that of its own batches.
3. Every so often val prompts are answered, and the shares that are refused go into the Trainer's log.

q comes first in the divergence, because sum p (log p - log q) has next to no gradient where a token that
was held has gone (p ~ 0). The hook is `on_step_begin`: what is in the gradients then is unscaled (float16),
averaged over processes and clipped with all the rest, so that a step is one of the Trainer's loss plus
weight x KL. At `on_pre_optimizer_step` all of that is over.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from safesteer._errors import SafeSteerError, expect
from safesteer.directions.calibration import refusal_rate
from safesteer.distillation.divergence import localized_divergence
from safesteer.distillation.rollouts import predicting_states, prompt_indices
from safesteer.distillation.watching import LOOK_TOKENS
from safesteer.judges.judge import Judge
from safesteer.judges.wording import refuses
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat, module_of
from safesteer.models.forward import final_hidden
from safesteer.models.generation import greedy_ids
from safesteer.models.head import output_head
from safesteer.models.logits import logps_on
from safesteer.models.parts import hf_model, modes_put_back
from safesteer.prompts.conversation import PromptLike
from safesteer.prompts.prompt_set import LABELS, PromptSet, load_prompts
from safesteer.tokens.token_set import TokenSet

N_PAIRS = 64  # of train, that are held
PAIRS_PER_STEP = 4
BATCH_SIZE = 32  # prompts per pass when probabilities are stored
N_TOKENS = 4  # of an answer: whether it refuses is decided in its first words
N_WATCHED = 32  # pairs of val that a look answers
SPREAD = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


@dataclass(frozen=True, eq=False)
class Held:
    """What a model held: prompts, how it opened its answers, and log-probabilities on S along them."""

    prompts: tuple[PromptLike, ...]  # harmful ones first
    counts: tuple[int, ...]  # of each kind
    openings: tuple[tuple[int, ...], ...]  # ids
    logps: tuple[Float[Tensor, "_ n_set"], ...]  # in nats, a row per token of an opening
    ids: Int[Tensor, " n_set"]


@torch.no_grad()
def hold(chat: ChatModel, prompts: PromptSet, tokens: TokenSet) -> Held:
    """Let a model open its answers, and store its log-probabilities on S along them.

    Args:
        chat: The model as it is now.
        prompts: Harmful and harmless prompts.
        tokens: The safety tokens S.

    Returns:
        What `divergence_from` compares a later model with.

    Raises:
        SafeSteerError: If the model has no row for a token of S, or its logits are not finite.
    """
    kinds = [texts for texts in map(prompts.texts, LABELS) if texts]
    texts = tuple(text for kind in kinds for text in kind)
    tokens.check(chat)
    logps: list[Tensor] = [torch.empty(0)] * len(texts)
    with evaluating(chat.model):
        openings = tuple(map(tuple, greedy_ids(chat, texts, N_TOKENS, BATCH_SIZE, keep_eos=True)))
        for rows, part in _logps_along(chat, texts, openings, tokens.ids):
            pieces = part.cpu().split([len(openings[i]) for i in rows])
            for i, piece in zip(rows, pieces, strict=True):
                logps[i] = piece
    if any(bool(part.isnan().any()) for part in logps):
        raise SafeSteerError(f"The logits of '{chat.name}' are not finite: its weights are damaged.")
    return Held(texts, tuple(map(len, kinds)), openings, tuple(logps), tokens.ids)


def divergence_from(
    held: Held, chat: ChatModel, rows: Sequence[int], dtype: torch.dtype | None = None
) -> Float[Tensor, ""]:
    """Compute KL(q || p) on S and one bucket for all other tokens, differentiable.

    Args:
        held: The probabilities q, and where they were read.
        chat: The model whose probabilities are p.
        rows: Which of the held prompts are read.
        dtype: Of the forward pass under autocast; None: that of the weights.

    Returns:
        The mean over the positions of all rows, in nats.
    """
    prompts, openings = [held.prompts[i] for i in rows], [held.openings[i] for i in rows]
    parts = []
    for at, p in _logps_along(chat, prompts, openings, held.ids, dtype):
        q = torch.cat([held.logps[rows[i]] for i in at]).to(p)
        parts.append(localized_divergence(p, q, "forward", "tail"))
    return torch.cat(parts).mean()


def _logps_along(
    chat: ChatModel,
    prompts: Sequence[PromptLike],
    openings: Sequence[Sequence[int]],
    ids: Int[Tensor, " n_set"],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "n n_set"]]]:
    """Yield batches: (indices into `prompts`, log-probabilities on S where an opening is predicted)."""
    head = output_head(chat.model)
    for rows, batch in chat.batched(prompts, BATCH_SIZE, continuations=openings):
        # Mixed precision ends before the head, whose rounded logits would count as a difference.
        with torch.autocast(chat.device.type, dtype, enabled=dtype is not None):
            states = final_hidden(chat.model, batch)
        mask = batch.completion_mask[:, -max(len(openings[i]) for i in rows) :]
        hidden = predicting_states(states, mask)
        yield rows, logps_on(hidden, head.weight, ids.to(hidden.device), **head.options)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model be in evaluation mode inside the block; then every module has its own mode again."""
    with modes_put_back(model):
        model.eval()
        yield


class SafetySeal(TrainerCallback):
    """Keep a model's probabilities on S, on harmful prompts and their twins, while a Trainer trains it.

    Nothing but the gradients of the Trainer's steps is changed: no random number is drawn, and the model is
    in the mode that it had. In the log `seal_divergence` is the mean of KL(q || p) since the last one, in
    nats per position, and every `look_every` steps `seal_val_refused` and `seal_val_over_refused` are the
    shares of harmful and of harmless val prompts that are refused.

    Args:
        model: The model before it is fine-tuned: a ChatModel, a Hugging Face model (with `tokenizer`) or
            (model, tokenizer). The Trainer may train this one, a copy, or an adapter on it.
        tokenizer: The model's own, with a chat template, where `model` does not bring it.
        tokens: The safety tokens S.
        prompts: Prompts with the splits "train", which is held, and "val", which is watched; None: the
            project's own.
        weight: What the divergence counts beside the Trainer's loss; 0 watches and holds nothing.
        every: Optimizer steps per step in which the seal pulls.
        look_every: Optimizer steps per look at val; 0: nobody looks.
        judge: Says which answers refuse.

    Raises:
        SafeSteerError: For a setting out of bounds, a model without its tokenizer, tokens of another
            vocabulary, a split that is missing; while training for weights that are spread over processes,
            an adapter on the output head, and a divergence that is not finite.

    Example:
        >>> ss.SafetySeal(chat, tokens=tokens)
        SafetySeal(8 tokens on 128 prompts, weight 1, every step)
    """

    def __init__(
        self,
        model: ModelLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        tokens: TokenSet,
        prompts: PromptSet | None = None,
        weight: float = 1.0,
        every: int = 1,
        look_every: int = 50,
        judge: Judge = refuses,
    ) -> None:
        expect(TokenSet, tokens)
        if not (0 <= weight < math.inf and every >= 1 and look_every >= 0 and len(tokens)):
            raise SafeSteerError(
                f"SafetySeal needs a weight of 0 or more (not {weight}), every of 1 or more (not {every}),"
                f" look_every of 0 or more (not {look_every}), and at least one token (not {len(tokens)})."
            )
        chat = as_chat(model if tokenizer is None else (module_of(model), tokenizer))
        prompts = prompts or load_prompts()
        expect(PromptSet, prompts)
        val = prompts.split("val").across(N_WATCHED) if look_every else PromptSet(())
        self.watched = {"seal_val_refused": val.harmful, "seal_val_over_refused": val.harmless}
        self.held = hold(chat, prompts.split("train").across(N_PAIRS), tokens)
        self.weight, self.every, self.look_every, self.judge = weight, every, look_every, judge
        self._tokenizer, self._name = chat.tokenizer, chat.name  # not the model, which may be let go
        self._divergences: list[float] = []
        self._shares: dict[str, float] = {}

    def __repr__(self) -> str:
        steps = "step" if self.every == 1 else f"{self.every} steps"
        return (
            f"SafetySeal({len(self.held.ids)} tokens on {len(self.held.prompts)} prompts, weight"
            f" {self.weight:g}, every {steps})"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be sealed; write what the model refuses before training."""
        model: nn.Module = kwargs["model"]
        _require_readable(model)
        self._divergences, self._shares = [], {}
        if self.look_every and state.global_step == 0:
            state.log_history.append({**self._look(args, model), "epoch": 0.0, "step": 0})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the gradient of weight x KL(q || p) with the weights, to which the Trainer adds its own."""
        turn, later = divmod(state.global_step, self.every)
        if later:
            return
        rows, first = [], 0
        for n in self.held.counts:
            drawn = prompt_indices(n, PAIRS_PER_STEP, turn * args.world_size + args.process_index, args.seed)
            rows += [first + i for i in drawn]
            first += n
        model: nn.Module = kwargs["model"]
        with evaluating(model), torch.set_grad_enabled(self.weight > 0):
            divergence = divergence_from(self.held, self._chat(model), rows, _autocast_dtype(args))
            if not bool(divergence.isfinite()):
                raise SafeSteerError(
                    f"The probabilities on S are no numbers at step {state.global_step + 1}: the training"
                    " has diverged, so lower its learning rate."
                )
            if self.weight > 0 and not divergence.requires_grad:
                raise SafeSteerError(
                    "Nothing that trains changes what SafetySeal reads (prompt or prefix tuning?): train"
                    " weights or an adapter of the blocks."
                )
            if self.weight > 0:
                _scaled(self.weight * divergence, kwargs.get("optimizer")).backward()
        self._divergences.append(float(divergence.detach()))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Look at val when it is time, and let the Trainer log it."""
        if self.look_every and state.global_step % self.look_every == 0:
            if state.is_world_process_zero:  # whose log counts
                self._shares = self._look(args, kwargs["model"])
            control.should_log = True
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add what was measured since the last log of the training to this one, and to the history."""
        if "loss" not in kwargs["logs"]:  # an evaluation's, or the summary
            return
        values, pulls = self._shares, self._divergences
        if pulls:
            values = {"seal_divergence": sum(pulls) / len(pulls), **values}
        self._divergences, self._shares = [], {}
        kwargs["logs"].update(values)
        if state.log_history:  # which holds a copy
            state.log_history[-1].update(values)

    def _look(self, args: TrainingArguments, model: nn.Module) -> dict[str, float]:
        """Let the model answer the val prompts; return the shares that it refuses."""
        chat, dtype = self._chat(model), _autocast_dtype(args)
        with evaluating(model), torch.autocast(chat.device.type, dtype, enabled=dtype is not None):
            return {
                name: refusal_rate(chat, texts, self.judge, LOOK_TOKENS)
                for name, texts in self.watched.items()
                if texts
            }

    def _chat(self, model: nn.Module) -> ChatModel:
        return ChatModel(model, self._tokenizer, self._name)


def _require_readable(model: nn.Module) -> None:
    """Raise SafeSteerError for a model whose weights or logits are not read as they are used."""
    spread = AcceleratorState().distributed_type in SPREAD
    if spread or any(isinstance(p, DTensor) for p in model.parameters()):
        raise SafeSteerError(
            "SafetySeal reads whole weights, and here they are spread over processes (FSDP, DeepSpeed): train"
            " with one process or with DDP, with an adapter where memory is short."
        )
    head = cast(nn.Module, hf_model(model).get_output_embeddings())
    if any(p.requires_grad for name, p in head.named_parameters() if name not in ("weight", "bias")):
        raise SafeSteerError(
            "SafetySeal reads the output head's weight, and here an adapter trains in its place: leave the"
            " head out of the adapter's modules (target_modules, modules_to_save)."
        )


def _autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """Return the precision of the Trainer's passes, None where it is that of the weights."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _scaled(loss: Float[Tensor, ""], optimizer: torch.optim.Optimizer | None) -> Float[Tensor, ""]:
    """Scale a loss as the Trainer scales its own where passes are in float16."""
    if isinstance(optimizer, AcceleratedOptimizer) and optimizer.scaler is not None:
        return optimizer.scaler.scale(loss)
    return loss
