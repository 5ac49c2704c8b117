"""Rollouts from a stub of vLLM's LLM: answers are recorded, or sampled with the weights it was given."""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from conftest import SIZES, copy_of
from safesteer._errors import SafeSteerError
from safesteer.distillation import vllm
from safesteer.distillation.loop import Training, distill, training_steps
from safesteer.distillation.rollouts import Sampled, Teacher
from safesteer.distillation.state import prepare_student
from safesteer.distillation.vllm import engine_sampler
from safesteer.models.adapter import merged, shares_weights, trained_weights
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import seed_of
from safesteer.settings import DistillConfig
from safesteer.tokens.token_set import SafetyToken, TokenSet

SMALL = {
    "n_steps": 3,
    "harmful_per_step": 2,
    "harmless_per_step": 2,
    "n_rollouts": 2,
    "max_new_tokens": 4,
    "rollouts": "student",
    "lr": 1e-2,
    "warmup": 0.0,
}
ADAPTER = {"lora_rank": 4}
# What `LLM.generate` returns for two prompts and n=2, as far as a sampler reads it.
RECORDED = json.loads("""[
  {"outputs": [
    {"token_ids": [40, 41, 42], "logprobs": [
      {"40": {"logprob": -0.5, "rank": 1}},
      {"7": {"logprob": -0.25, "rank": 1}, "41": {"logprob": -3.0, "rank": 9}},
      {"42": {"logprob": -0.125, "rank": 1}}]},
    {"token_ids": [43, 44, 45], "logprobs": [
      {"43": {"logprob": -1.5, "rank": 2}},
      {"44": {"logprob": -0.75, "rank": 1}},
      {"45": {"logprob": -2.0, "rank": 4}}]}]},
  {"outputs": [
    {"token_ids": [46, 47, 48], "logprobs": [
      {"46": {"logprob": -0.0625, "rank": 1}},
      {"47": {"logprob": -1.0, "rank": 2}},
      {"48": {"logprob": -4.0, "rank": 20}}]},
    {"token_ids": [49, 50, 51], "logprobs": [
      {"49": {"logprob": -0.5, "rank": 1}},
      {"50": {"logprob": -0.5, "rank": 1}},
      {"51": {"logprob": -0.5, "rank": 1}}]}]}
]""")


@dataclass
class SamplingParams:
    """The fields of vLLM's that are set here; one that it lacks is an error."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_tokens: int
    max_tokens: int
    logprobs: int
    seed: int
    stop_token_ids: list[int]
    detokenize: bool


@dataclass
class Engine:
    """A model of its own, which answers by pure sampling and must forget what it read with old weights."""

    chat: ChatModel
    deaf: bool = False  # takes no new weights
    given: list[str] = field(default_factory=list)
    calls: list[tuple] = field(default_factory=list)
    states: list[dict] = field(default_factory=list)  # its weights at every call
    stale: bool = False

    def load_weights(self, weights):
        own = dict(self.chat.model.named_parameters())
        self.given, self.stale = [], True
        for name, weight in weights:
            self.given.append(name)
            if not self.deaf:
                own[name].data.copy_(weight)

    def apply_model(self, function):
        return [function(self)]

    def reset_prefix_cache(self):
        self.stale = False
        return True

    def generate(self, prompts, params, use_tqdm):
        assert not self.stale
        assert not torch.is_autocast_enabled(self.chat.device.type)
        self.calls.append((prompts, params))
        self.states.append({n: p.detach().clone() for n, p in self.chat.model.named_parameters()})
        return [
            SimpleNamespace(outputs=[self.answer(prompt["prompt_token_ids"], p, i) for i in range(p.n)])
            for prompt, p in zip(prompts, params, strict=True)
        ]

    @torch.no_grad()
    def answer(self, prompt, params, index):
        generator = torch.Generator().manual_seed(params.seed + index)
        ids, logprobs = [], []
        while len(ids) < params.max_tokens and not (ids and ids[-1] in params.stop_token_ids):
            row = self.chat.model(torch.tensor([prompt + ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
            logprobs.append({ids[-1]: SimpleNamespace(logprob=float(row[ids[-1]]))})
        return SimpleNamespace(token_ids=ids, logprobs=logprobs)


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SamplingParams))


@pytest.fixture
def tokens():
    return TokenSet(tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in range(40, 48)), {}, {}, 1)


@pytest.fixture
def train(tiny_llama, direction, few, tokens):
    """train(engine, options...) -> (state, the student's weights before every step, history)."""

    def start(engine, **options):
        config = DistillConfig(**{**SMALL, **options})
        base = copy_of(tiny_llama)
        state = prepare_student(base if config.lora_rank else copy_of(tiny_llama), direction, config)
        sampler = engine_sampler(engine, state.student)
        states, history = [weights_of(state.student)], []
        for record in training_steps(state, Teacher(base, direction, tokens), few, sampler=sampler):
            history.append(record)
            states.append(weights_of(state.student))
        return state, states, history

    return start


def weights_of(student: ChatModel) -> dict:
    return {name: weight.clone() for name, weight in trained_weights(student)}


def recorded(outputs=RECORDED):
    """The recording as vLLM's objects: attributes, and token ids that are numbers."""
    return [
        SimpleNamespace(
            outputs=[
                SimpleNamespace(
                    token_ids=output["token_ids"],
                    logprobs=[
                        {int(token): SimpleNamespace(**value) for token, value in at.items()}
                        for at in output["logprobs"]
                    ],
                )
                for output in reply["outputs"]
            ]
        )
        for reply in outputs
    ]


def ask(tiny_llama, **replaced) -> tuple[list, list]:
    """Ask an engine with other methods for two answers to two prompts; return them and its calls."""
    engine, calls = Engine(copy_of(tiny_llama)), []
    engine.generate = lambda *args, **options: calls.append((args, options)) or recorded()
    for name, value in replaced.items():
        setattr(engine, name, value)
    sample = engine_sampler(engine, copy_of(tiny_llama))
    return sample([[5, 6], [7]], 2, 3, [(0, 1, 0), (0, 1, 1)]), calls


def test_recorded_answers_are_read(tiny_llama):
    answers, calls = ask(tiny_llama)
    assert answers == [
        [Sampled((40, 41, 42), (-0.5, -3.0, -0.125)), Sampled((43, 44, 45), (-1.5, -0.75, -2.0))],
        [Sampled((46, 47, 48), (-0.0625, -1.0, -4.0)), Sampled((49, 50, 51), (-0.5, -0.5, -0.5))],
    ]
    (((prompts, params), _),) = calls  # one call for all
    assert prompts == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7]}]
    assert [p.seed for p in params] == [seed_of((0, 1, i)) >> 32 for i in (0, 1)]
    for p in params:
        assert (p.n, p.max_tokens, p.min_tokens, p.logprobs) == (2, 3, 0, 0)
        assert (p.temperature, p.top_p, p.top_k, p.min_p) == (1.0, 1.0, -1, 0.0)
        assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.0, 0.0, 0.0)
        assert p.stop_token_ids == list(tiny_llama.eos_ids)


@pytest.mark.parametrize("options", [{}, {"train_layers": "all"}, ADAPTER, {"precision": "bfloat16"}])
def test_the_engine_has_the_students_weights_at_every_step(tiny_llama, train, options):
    if "lora_rank" in options:
        pytest.importorskip("peft", reason="peft is not installed (pip install 'safesteer[lora]')")
    engine = Engine(copy_of(tiny_llama))
    state, states, history = train(engine, **options)
    assert len(engine.calls) == len(history) == 3
    seeds = [p.seed for _, params in engine.calls for p in params]
    assert len(set(seeds)) == len(seeds) == 3 * 4
    for had, student in zip(engine.states, states[:3], strict=True):
        assert all(torch.equal(had[name], weight) for name, weight in student.items())
    assert all(not torch.equal(states[1][name], states[2][name]) for name in engine.given)
    # Weights that never train are the engine's own.
    before = dict(tiny_llama.model.named_parameters())
    untouched = before.keys() - set(engine.given)
    assert all(torch.equal(engine.states[2][name], before[name]) for name in untouched)
    assert max(record.sampler_gap for record in history) < (0.05 if "precision" in options else 1e-5)
    # The next call would end with the very weights of the trained student.
    engine_sampler(engine, state.student)([[5]], 1, 1, [(0, 3, 0)])
    assert all(torch.equal(engine.states[3][name], weight) for name, weight in states[3].items())


def test_old_weights_are_seen(tiny_llama, train):
    _, _, history = train(Engine(copy_of(tiny_llama), deaf=True))
    assert history[0].sampler_gap < 1e-5
    assert min(record.sampler_gap for record in history[1:]) > 1e-3


def test_an_adapter_is_merged_for_the_engine_alone(tiny_llama, train):
    pytest.importorskip("peft", reason="peft is not installed (pip install 'safesteer[lora]')")
    engine = Engine(copy_of(tiny_llama))
    state, states, _ = train(engine, **ADAPTER)
    before = dict(tiny_llama.model.named_parameters())
    assert not any("lora" in name or "base_layer" in name for name in engine.given)
    assert not any("layers.0." in name for name in engine.given)  # the direction is of layer 1
    for name, p in state.student.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")])
    assert not shares_weights(tiny_llama, state.student)
    plain = dict(merged(state.student).model.named_parameters())
    assert all(torch.allclose(plain[name], weight, atol=1e-6) for name, weight in states[3].items())


def test_weights_have_the_names_of_files(chatml_tokenizer, tiny_llama, direction, tmp_path):
    """vLLM loads files: transformers keeps the experts of a layer in one tensor, files do not."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_local_experts": 2, "vocab_size": len(chatml_tokenizer)}
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, **shape))
    for model in (mixtral, copy_of(tiny_llama).model):
        student = ChatModel(model, chatml_tokenizer, "tiny")
        prepare_student(student, direction, DistillConfig(train_layers="all"))
        given = dict(vllm._as_in_checkpoints(student))
        model.save_pretrained(tmp_path / type(model).__name__)
        (path,) = (tmp_path / type(model).__name__).glob("*.safetensors")
        stored = load_file(path)
        assert given.keys() == stored.keys()
        assert all(torch.equal(given[name], stored[name]) for name in stored)
        if model is mixtral:
            assert sum("experts.1." in name for name in given) == 3 * 2
            assert not given.keys() <= dict(model.named_parameters()).keys()


def refusing(error):
    def refuse(*args, **options):
        raise error

    return refuse


def altered(change):
    replies = json.loads(json.dumps(RECORDED))
    change(replies)
    return lambda *args, **options: recorded(replies)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"load_weights": refusing(KeyError("layers.2.mlp"))}, r"weights \('layers.2.mlp'\): it must hold"),
        ({"apply_model": refusing(TypeError("not serializable"))}, "VLLM_ENABLE_V1_MULTIPROCESSING=0"),
        ({"reset_prefix_cache": lambda: False}, "prefix cache of old weights"),
        ({"generate": refusing(ValueError("longer than the model length\nmore"))}, "length$"),
        ({"generate": altered(lambda replies: replies.pop())}, "all samples of each prompt"),
        ({"generate": altered(lambda replies: replies[0]["outputs"].pop())}, "all samples of each prompt"),
        ({"generate": lambda *args, **options: [None, None]}, "all samples of each prompt"),
        (
            {"generate": altered(lambda replies: replies[0]["outputs"][0]["logprobs"].pop())},
            "all samples of each prompt",
        ),
        (
            {"generate": altered(lambda replies: replies[0]["outputs"][0]["token_ids"].__setitem__(0, 9))},
            "all samples of each prompt",
        ),
    ],
)
def test_an_engine_that_refuses_or_answers_otherwise_is_one_sentence(tiny_llama, replaced, message):
    with pytest.raises(SafeSteerError, match=message):
        ask(tiny_llama, **replaced)


def test_answers_that_are_too_long_are_refused(tiny_llama):
    sample = engine_sampler(engine := Engine(copy_of(tiny_llama)), copy_of(tiny_llama))
    engine.generate = lambda *args, **options: recorded()
    with pytest.raises(SafeSteerError, match="all samples of each prompt"):
        sample([[5], [6]], 2, 2, [(0, 0, 0), (0, 0, 1)])


def test_an_answer_cut_short_is_not_learnt_as_an_end(tiny_llama, train):
    """vLLM cuts answers at max_model_len."""
    engine = Engine(copy_of(tiny_llama))
    whole = engine.answer
    engine.answer = lambda prompt, params, index: whole(prompt, SimpleNamespace(**cut(params)), index)

    def cut(params):
        return {**vars(params), "max_tokens": 2, "stop_token_ids": []}

    with pytest.raises(SafeSteerError, match="after 2 of 4 tokens without an end token"):
        train(engine)


def test_a_sharded_student_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr(vllm, "DTensor", torch.nn.Parameter)
    with pytest.raises(SafeSteerError, match=r"leave distill\.sharded off"):
        ask(tiny_llama)


def test_without_vllm_it_says_what_to_install(tiny_llama, train, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SafeSteerError, match=r"pip install 'safesteer\[vllm\]'"):
        train(Engine(copy_of(tiny_llama)))


def test_distill_takes_an_engine(tiny_llama, direction, few, tokens):
    engine = Engine(copy_of(tiny_llama))
    training = Training(sampler=partial(engine_sampler, engine))
    config = DistillConfig(**SMALL, splits=("val",), watch_every=0)
    student = distill(tiny_llama, direction, tokens, few, config, training=training)
    assert len(engine.calls) == len(student.history) == 3
    assert student.history[-1].sampler_gap < 1e-5
