"""Sample rollouts with vLLM: an engine in this process, or a server (or another OpenAI-compatible one).

    training_steps(state, teacher, prompts, sampler=engine_sampler(llm, state.student))
    training_steps(state, teacher, prompts, sampler=server_sampler(endpoint))

The engine gets the student's weights before every step. A server must be given them by you, or rollouts lag
behind. How far sampler and student are apart on the sampled tokens is logged as `sampler_gap` in every
record: rounding gives hundredths of a nat, old weights more.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from safesteer._endpoint import Endpoint
from safesteer._errors import SafeSteerError, first_line
from safesteer.distillation.rollouts import Sampled, Sampler
from safesteer.models.adapter import trained_weights
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import seed_of
from safesteer.models.parts import hf_model

# All of it: a server fills what is left out from the checkpoint's generation_config.
PURE_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "logprobs": 0,  # the sampled token's alone
}
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError)


def server_sampler(endpoint: Endpoint) -> Sampler:
    """Make a sampler that asks `endpoint` for token ids with their log-probabilities.

    Args:
        endpoint: The server. Prompts go out as token ids.

    Returns:
        A sampler. When used it raises SafeSteerError for a server that does not return tokens as ids
        (vLLM: return_tokens_as_token_ids).
    """

    def sample(
        prompts: Sequence[Sequence[int]], n_samples: int, max_new_tokens: int, keys: Sequence[tuple]
    ) -> list[list[Sampled]]:
        bodies = [
            {
                **PURE_SAMPLING,
                "prompt": list(ids),
                "n": n_samples,
                "max_tokens": max_new_tokens,
                "seed": _seed(key),
                "return_tokens_as_token_ids": True,
            }
            for ids, key in zip(prompts, keys, strict=True)
        ]
        answers = []
        for reply in endpoint.ask_all("completions", bodies):
            try:
                samples = [_read(choice["logprobs"]) for choice in reply["choices"]]
            except UNREADABLE as error:
                raise endpoint.unlike() from error
            if len(samples) != n_samples or any(len(s.ids) > max_new_tokens for s in samples):
                raise endpoint.unlike()
            answers.append(samples)
        return answers

    return sample


def engine_sampler(llm: Any, student: ChatModel) -> Sampler:
    """Make a sampler that lets a vLLM engine in this process answer with the student's weights.

    Every call, of which `training_steps` makes one per step, gives the engine the weights that train, empties
    its prefix cache and asks for all answers at once. An adapter is merged for the engine alone.

    Args:
        llm: A `vllm.LLM` of the base's checkpoint, made with VLLM_ENABLE_V1_MULTIPROCESSING=0.
        student: That of `prepare_student`, not sharded.

    Returns:
        A sampler. When used it raises SafeSteerError for an engine that does not take the weights, refuses
        the prompts, or answers in another shape than vLLM's.
    """

    def sample(
        prompts: Sequence[Sequence[int]], n_samples: int, max_new_tokens: int, keys: Sequence[tuple]
    ) -> list[list[Sampled]]:
        # Casts of the student's training must not reach the engine, nor the merge.
        with torch.autocast(student.device.type, enabled=False):
            _give_weights(llm, student)
            replies = _generated(llm, student, prompts, n_samples, max_new_tokens, keys)
        try:
            answers = [[_read_output(output) for output in reply.outputs] for reply in replies]
        except UNREADABLE as error:
            raise _unlike_vllm() from error
        if len(answers) != len(prompts) or any(len(samples) != n_samples for samples in answers):
            raise _unlike_vllm()
        if any(len(s.ids) > max_new_tokens for samples in answers for s in samples):
            raise _unlike_vllm()
        return answers

    return sample


def _give_weights(llm: Any, student: ChatModel) -> None:
    """Replace the engine's weights by the student's, and forget what was read with the old ones."""
    if any(isinstance(p, DTensor) for p in student.model.parameters()):
        raise SafeSteerError(
            "A sharded student cannot give its weights to a vLLM engine: leave distill.sharded off, or let"
            " the student sample."
        )

    def load(model: Any) -> None:
        model.load_weights(_as_in_checkpoints(student))

    try:
        llm.apply_model(load)
    except (AssertionError, *UNREADABLE) as error:
        raise SafeSteerError(
            f"The vLLM engine does not take the student's weights ({first_line(error)}): it must hold the"
            " base's own checkpoint in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), not quantized."
        ) from error
    if llm.reset_prefix_cache() is False:
        raise SafeSteerError(
            "The vLLM engine keeps a prefix cache of old weights: it must have no other requests under way."
        )


def _as_in_checkpoints(student: ChatModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained weights as files have them (experts one by one, say), block by block."""
    model = hf_model(student.model)
    for _, block in groupby(trained_weights(student), lambda named: re.findall(r"\.(\d+)\.", named[0])[:1]):
        yield from revert_weight_conversion(model, dict(block)).items()


def _generated(
    llm: Any,
    student: ChatModel,
    prompts: Sequence[Sequence[int]],
    n_samples: int,
    max_new_tokens: int,
    keys: Sequence[tuple],
) -> Sequence[Any]:
    """Ask the engine for all answers in one call."""
    try:
        from vllm import SamplingParams
    except ImportError as error:
        raise SafeSteerError("engine_sampler needs vLLM: pip install 'safesteer[vllm]'.") from error
    options = {**PURE_SAMPLING, "n": n_samples, "max_tokens": max_new_tokens, "detokenize": False}
    params = [
        SamplingParams(**options, seed=_seed(key), stop_token_ids=list(student.eos_ids)) for key in keys
    ]
    try:
        return llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
    except ValueError as error:
        raise SafeSteerError(f"The vLLM engine refuses a step's prompts: {first_line(error)}") from error


def _seed(key: tuple) -> int:
    """Return a seed of 31 bits, which is what servers take."""
    return seed_of(key) >> 32


def _unlike_vllm() -> SafeSteerError:
    return SafeSteerError(
        "The engine does not answer as vLLM's LLM.generate does: all samples of each prompt, each with its"
        " token ids and their log-probabilities."
    )


def _read(logprobs: dict[str, Any]) -> Sampled:
    """Read one answer from the part of a server's reply that holds its tokens."""
    ids = (int(token.removeprefix("token_id:")) for token in logprobs["tokens"])
    return Sampled(tuple(ids), tuple(float(p) for p in logprobs["token_logprobs"]))


def _read_output(output: Any) -> Sampled:
    """Read one answer of an engine: at every position a mapping from token ids to log-probabilities."""
    ids = tuple(int(token) for token in output.token_ids)
    logps = (float(at[token].logprob) for token, at in zip(ids, output.logprobs, strict=True))
    return Sampled(ids, tuple(logps))
