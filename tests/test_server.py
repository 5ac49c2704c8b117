"""Rollouts from a stub server that samples from the very model that trains."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from conftest import copy_of
from safesteer._endpoint import Endpoint
from safesteer._errors import SafeSteerError
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.distillation.vllm import server_sampler
from safesteer.settings import DistillConfig
from safesteer.tokens.token_set import SafetyToken, TokenSet

SETTINGS = {"n_steps": 1, "harmful_per_step": 2, "harmless_per_step": 2, "n_rollouts": 2, "max_new_tokens": 4}


@pytest.fixture
def served(tiny_llama):
    """served(change) -> (endpoint, requests): greedy answers of the base, which `change` may damage."""
    running = []

    def start(change=lambda reply: reply):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append(body)
                reply = json.dumps(change(answered(tiny_llama, body))).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "tiny", retries=0, at_once=1), requests

    yield start
    for server in running:
        server.shutdown()


@torch.no_grad()
def answered(chat, body: dict) -> dict:
    """Reply as a server would: `n` greedy answers with the log-probability of each token."""
    ids, tokens, logps = list(body["prompt"]), [], []
    while len(tokens) < body["max_tokens"] and (not tokens or tokens[-1] not in chat.eos_ids):
        row = chat.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        tokens.append(int(row.argmax()))
        logps.append(float(row.max()))
        ids.append(tokens[-1])
    choice = {"logprobs": {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logps}}
    return {"choices": [choice] * body["n"]}


def train(chat, direction, few, endpoint, **options):
    config = DistillConfig(**{**SETTINGS, **options})
    chosen = tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in range(40, 48))
    teacher = Teacher(chat, direction, TokenSet(chosen, {}, {}, 1))
    state = prepare_student(copy_of(chat), direction, config)
    return list(training_steps(state, teacher, few, sampler=server_sampler(endpoint) if endpoint else None))


def test_a_server_with_the_students_weights_leaves_no_gap(tiny_llama, direction, few, served):
    endpoint, requests = served()
    (record,) = train(tiny_llama, direction, few, endpoint, rollouts="student")
    assert len(requests) == 4
    assert {r["n"] for r in requests} == {2}
    assert len({r["seed"] for r in requests}) == 4
    assert record.sampler_gap < 1e-5
    assert record.n_tokens > 0


def test_a_server_with_other_weights_is_seen(tiny_llama, direction, few, served):
    def damage(reply):
        for choice in reply["choices"]:
            choice["logprobs"]["token_logprobs"] = [p - 0.25 for p in choice["logprobs"]["token_logprobs"]]
        return reply

    endpoint, _ = served(lambda reply: damage(json.loads(json.dumps(reply))))
    (record,) = train(tiny_llama, direction, few, endpoint, rollouts="student")
    assert record.sampler_gap == pytest.approx(0.25, abs=1e-4)


def test_with_mixed_rollouts_the_teacher_still_answers_here(tiny_llama, direction, few, served):
    endpoint, requests = served()
    (record,) = train(tiny_llama, direction, few, endpoint, rollouts="mixed")
    assert len(requests) == 2
    assert record.sampler_gap < 1e-5


def test_without_a_server_there_is_no_gap(tiny_llama, direction, few):
    (record,) = train(tiny_llama, direction, few, None)
    assert record.sampler_gap == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: {},
        lambda reply: {"choices": reply["choices"][:1]},
        lambda reply: {"choices": [{"text": "no logprobs"}] * 2},
        lambda reply: {"choices": [{"logprobs": {"tokens": [" word"], "token_logprobs": [0.0]}}] * 2},
    ],
)
def test_a_server_that_answers_otherwise_is_one_sentence(tiny_llama, direction, few, served, change):
    endpoint, _ = served(change)
    with pytest.raises(SafeSteerError, match="does not answer as an OpenAI-compatible endpoint does"):
        train(tiny_llama, direction, few, endpoint, rollouts="student")
