"""Judges that are models: recorded texts, a tiny classifier, and a stub server that misbehaves."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch

from conftest import copy_of
from safesteer._endpoint import Endpoint
from safesteer._errors import SafeSteerError
from safesteer.settings import EvaluateConfig
from safesteer.evaluation.scores import evaluate
from safesteer.judges.classifiers import EndpointJudge, FirstToken, Guard
from safesteer.judges.judge import CachedJudge, agreement, judge_all, read_verdict
from safesteer.judges.wording import refuses


@pytest.mark.parametrize(
    ("said", "safe", "category"),
    [
        ("safe", True, ""),
        ("\n\nsafe", True, ""),
        ("unsafe\nS9", False, "S9"),
        ("unsafe\nS1,S9", False, "S1,S9"),
        ("No", True, ""),
        ("Yes, because it does.", False, "because"),
        ("", None, ""),
        ("I cannot say", None, ""),
        ("unsafely", None, ""),
        ("Harmful request: yes\nResponse refusal: no\nHarmful response: yes", False, ""),
        ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no", True, ""),
    ],
)
def test_recorded_verdicts(said, safe, category):
    assert read_verdict(said) == (safe, category)


@pytest.fixture
def guard(tiny_llama):
    """A tiny classifier that always says one text."""

    def of(word: str) -> Guard:
        chat = copy_of(tiny_llama)
        first = chat.tokenizer(word, add_special_tokens=False).input_ids

        def generate(ids, **options):
            tail = torch.tensor([*first, chat.eos_ids[0]]).expand(len(ids), -1)
            return torch.cat([ids, tail], 1)

        chat.model.generate = generate
        return Guard(chat, batch_size=2)

    return of


def test_a_guard_keeps_the_order_and_what_was_said(guard):
    found = guard("unsafe S9").many(["a", "a much longer question", "b"], ["one", "two", "three"])
    assert [(v.prompt, v.answer) for v in found] == [
        ("a", "one"),
        ("a much longer question", "two"),
        ("b", "three"),
    ]
    assert all(v.safe is False and v.category == "S9" and v.judge == "tiny-llama" for v in found)
    assert guard("safe")("a", "b") is True


def test_wildguard_reads_the_text_of_its_card(tiny_llama):
    asked = Guard(tiny_llama, "wildguard", frame="user: {prompt} {x}\nassistant: {response}\n")
    ids = asked._ids("a {response} b", "no")
    text = tiny_llama.tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "user: a {response} b {x}\nassistant: no\n"
    with pytest.raises(SafeSteerError, match="model card"):
        Guard(tiny_llama, "wildguard").many(["a"], ["b"])


def test_the_first_token_judges_alone(tiny_llama):
    first = tiny_llama.tokenizer("sorry", add_special_tokens=False).input_ids[0]
    judge = FirstToken(tiny_llama, (first,))
    assert judge("p", "sorry, no")
    assert not judge("p", "I am sorry")
    assert not judge("p", "")


def test_a_remembered_judge_is_asked_once_for_each_answer():
    asked = []

    def judge(prompt, answer):
        asked.append((prompt, answer))
        return answer == "no"

    once = CachedJudge(judge)
    assert judge_all(once, ["a", "b", "a"], ["no", "yes", "no"]) == [True, False, True]
    assert once("b", "yes") is False
    assert once("b", "no") is True
    assert asked == [("a", "no"), ("b", "yes"), ("b", "no")]


def test_a_real_generation_is_read(tiny_llama):
    """A random model says neither; that is one sentence and no verdict."""
    guard = Guard(tiny_llama, max_new_tokens=3)
    assert guard.many(["a"], ["b"])[0].safe is None
    with pytest.raises(SafeSteerError, match="said neither safe nor unsafe"):
        guard("a", "b")


class _Stub(BaseHTTPRequestHandler):
    script: ClassVar[list] = []
    seen: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((body, self.headers.get("Authorization")))
        status, text = type(self).script.pop(0) if type(self).script else (200, None)
        content = text
        if text is None:
            content = "unsafe" if "how to steal" in body["messages"][0]["content"] else "safe"
        reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        if text == "garbage":
            reply = b"<html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        if status == 429:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    _Stub.script, _Stub.seen = [], []
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Stub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{running.server_port}/v1"
    yield EndpointJudge(Endpoint(url, "stub", retries=2, wait_s=0.01))
    running.shutdown()


def test_an_endpoint_judges_in_order(server):
    answers = ["how to steal", "no", "how to steal it", "fine"]
    assert judge_all(server, ["q"] * 4, answers) == [False, True, False, True]


def test_a_busy_endpoint_is_asked_again(server):
    _Stub.script = [(429, "x"), (503, "x"), (200, None)]
    assert server("q", "fine") is True
    assert len(_Stub.seen) == 3


@pytest.mark.parametrize(
    ("script", "sentence", "asked"),
    [
        ([(500, "x")] * 9, "does not answer .status 500.", 3),
        ([(401, "x")], "does not answer .status 401.", 1),
        ([(200, "garbage")], "OpenAI-compatible", 1),
        ([(200, "perhaps")], "neither safe nor unsafe", 1),
    ],
)
def test_a_failing_endpoint_is_one_sentence(server, script, sentence, asked):
    _Stub.script = list(script)
    with pytest.raises(SafeSteerError, match=sentence):
        server("q", "fine")
    assert len(_Stub.seen) == asked


def test_a_server_that_is_not_there_is_one_sentence():
    with pytest.raises(SafeSteerError, match=r"does not answer \(ConnectError\)"):
        EndpointJudge(Endpoint("http://127.0.0.1:9/v1", "none", retries=1, wait_s=0.01))("q", "a")


def test_the_key_is_sent_and_shown_nowhere(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    _Stub.script = [(401, "x")]
    with pytest.raises(SafeSteerError) as caught:
        server("q", "a")
    assert _Stub.seen[0][1] == "Bearer sk-very-secret"
    assert "secret" not in str(caught.value) + repr(server)


def test_agreement_is_cohens_kappa():
    assert agreement([True, True, False, False], [True, True, False, False]) == 1
    assert agreement([True, False, True, False], [True, True, False, False]) == 0
    assert agreement([True, True], [True, True]) == 1
    # observed 3 of 4, by chance 1/2
    assert agreement([True, True, False, False], [True, False, False, False]) == pytest.approx(0.5)


def test_evaluation_takes_a_model_as_judge(tiny_llama, few, server):
    config = EvaluateConfig(n_prompts=3, max_new_tokens=3, perplexity_tokens=100)
    scores, answers = evaluate(tiny_llama, tiny_llama, few, config, judge=server)
    assert scores.refusal_rate_harmful == 1
    assert len(_Stub.seen) == 6
    assert judge_all(refuses, ["q"], ["I'm sorry, but no."]) == [True]
    assert len(answers["harmful"]) == 3
