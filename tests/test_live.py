"""What the live lens reads, beside `ss.trace`, `generate` and plain passes; its server without a browser."""

import json
import threading
from dataclasses import replace

import pytest
import torch

import safesteer as ss
from conftest import copy_of
from safesteer._errors import SafeSteerError
from safesteer.live.reading import Subject, View, read_prompt, stream_answers
from safesteer.live.wire import facts, prompt_of, view_of

pytest.importorskip("starlette", reason="the extra 'explore' is not installed")
from starlette.testclient import TestClient

from safesteer.live.page import lens_page
from safesteer.live.server import TOKEN_HEADER, Session, lens_app, serve

PROMPT = "How do I pick a lock?"
VIEW = View(PROMPT, layer=1, coeff=2.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def tokens(tiny_llama, direction, few):
    config = ss.TokenConfig(k=8, horizon=3, n_samples=2, min_steered_prob=0.0)
    return ss.select_tokens(tiny_llama, direction, few.harmless, config)


@pytest.fixture(scope="module")
def student(tiny_llama):
    changed = copy_of(tiny_llama)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in changed.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return changed


@pytest.fixture(scope="module")
def reader(tiny_llama, few):
    return ss.fit_reader(tiny_llama, few)


@pytest.fixture(scope="module")
def subject(tiny_llama, direction, tokens, student, reader):
    return Subject(tiny_llama, direction, tokens, student, reader)


def answers(subject, view):
    """The tokens of each author's answer."""
    steps = list(stream_answers(subject, view))
    return [[s[i] for s in steps if s[i] is not None] for i in range(len(subject.authors))]


@pytest.mark.parametrize("intervention", ["add", "ablate", "clamp"])
def test_numbers_are_those_of_trace(subject, direction, tokens, intervention):
    view = replace(VIEW, intervention=intervention)
    applied = replace(direction, layer=1, coeff=2.0, operation=intervention)
    for mine in answers(subject, view):
        ids = [t.id for t in mine]
        (read,) = ss.trace(subject.chat, applied, tokens, [PROMPT], [ids], subject.student)
        for got, want in zip(mine, read.tokens, strict=True):
            assert (got.id, got.text, got.in_s) == (want.id, want.text, want.in_s)
            for name in ("p_base", "p_steered", "p_student", "kl_share"):
                assert getattr(got, name) == pytest.approx(getattr(want, name), abs=1e-6)
            assert (got.lift, got.kl) == pytest.approx((want.lift, want.kl), abs=5e-6)
            assert got.rank_base == want.rank_base
            assert [a.id for a in got.top_student] == [a.id for a in want.top_student]


def test_every_model_writes_what_it_would_write_alone(subject, direction):
    def alone(chat):
        return ss.generate(chat, [PROMPT], max_new_tokens=VIEW.max_new_tokens)[0]

    with ss.steer(subject.chat, direction, 2.0):
        steered = alone(subject.chat)
    expected = [alone(subject.chat), steered, alone(subject.student)]
    shown = [subject.chat.decode_answer([t.id for t in mine]) for mine in answers(subject, VIEW)]
    assert shown == expected
    assert len(set(shown)) > 1


def test_an_answer_ends_with_its_end_token(subject, monkeypatch):
    first, *_ = answers(subject, VIEW)
    end = first[2].id
    monkeypatch.setattr(type(subject.chat), "eos_ids", property(lambda _: [end]))
    for mine in answers(subject, VIEW):
        assert [t.id for t in mine].count(end) <= 1
    base, *_ = answers(subject, VIEW)
    assert base[-1].id == end
    assert len(base) <= 3


def test_streams_take_turns_with_one_model(subject):
    """Steps of two views in turn give what each gives alone, and nothing stays hooked."""
    views = [VIEW, replace(VIEW, coeff=-3.0, intervention="clamp")]
    alone = [answers(subject, view) for view in views]
    before = ss.generate(subject.chat, [PROMPT], max_new_tokens=4)
    streams = [stream_answers(subject, view) for view in views]
    steps = [[], []]
    for _ in range(VIEW.max_new_tokens):
        for stream, taken in zip(streams, steps, strict=True):
            if (step := next(stream, None)) is not None:
                taken.append(step)
    mixed = [[[s[i] for s in taken if s[i]] for i in range(3)] for taken in steps]
    assert mixed == alone
    assert ss.generate(subject.chat, [PROMPT], max_new_tokens=4) == before


def test_a_gate_follows_the_reader(subject, reader):
    gated = replace(VIEW, intervention="gate")
    score = float(reader.scores(subject.chat, [PROMPT])[0])
    opened = replace(subject, reader=replace(reader, threshold=score - 1, clear_below=score - 2))
    closed = replace(subject, reader=replace(reader, threshold=score + 2, clear_below=score + 1))
    between = replace(subject, reader=replace(reader, threshold=score + 1, clear_below=score - 1))
    base, added, _ = answers(subject, VIEW)
    assert answers(opened, gated)[1] == added
    assert [t.id for t in answers(between, gated)[1]] == [t.id for t in base]
    ablated = answers(subject, replace(VIEW, intervention="ablate"))[1]
    assert answers(closed, gated)[1] == ablated


def test_a_prompt_is_read_layer_by_layer(subject, direction):
    reading = read_prompt(subject, PROMPT)
    chat = subject.chat
    ids = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        out = copy_of(chat).model(torch.tensor([ids]), output_hidden_states=True)  # it leaves hooks
    resid_pre = torch.stack(out.hidden_states[:-1])[:, 0]
    assert torch.allclose(reading.projections, resid_pre @ direction.unit, atol=1e-5)
    assert len(reading.texts) == len(ids)
    norm, head = chat.model.model.norm, chat.model.lm_head
    probabilities = head(norm(resid_pre[:, -1])).softmax(-1)
    assert torch.allclose(reading.mass_on_s, probabilities[:, subject.tokens.ids].sum(-1), atol=1e-6)
    assert reading.score == pytest.approx(float(subject.reader.scores(chat, [PROMPT])[0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": 3}, "Layer 3 is not in the model: it has 0 to 2"),
        ({"intervention": "boost"}, "Unknown intervention 'boost'"),
        ({"coeff": float("nan")}, "out of bounds"),
        ({"max_new_tokens": 9999}, "1 to 512"),
        ({"prompt": "  "}, "The prompt is empty"),
        ({"prompt": [{"role": "assistant", "content": "hi"}]}, "must end with what the user says"),
    ],
)
def test_a_view_that_cannot_be_shown_is_one_sentence(subject, changes, words):
    values = {"prompt": PROMPT, "layer": 1, "coeff": 1.0, **changes}
    with pytest.raises(SafeSteerError, match=words):
        view_of(subject, values)


def test_a_gate_needs_a_reader(subject):
    with pytest.raises(SafeSteerError, match="needs a reader"):
        replace(VIEW, intervention="gate").check(replace(subject, reader=None))
    assert "gate" not in facts(replace(subject, reader=None))["interventions"]


def test_messages_are_a_prompt(subject):
    talk = prompt_of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}])
    assert answers(subject, replace(VIEW, prompt=talk)) != answers(subject, VIEW)


# --- the server ---


@pytest.fixture
def session(subject):
    return Session(subject)


@pytest.fixture
def client(session):
    return TestClient(lens_app(session), base_url="http://127.0.0.1:8765")


def test_nothing_is_answered_without_the_token(client, session):
    assert client.get("/").status_code == 403
    assert client.get("/?token=wrong").status_code == 403
    assert client.get(f"/?token={session.token}").status_code == 200
    for path in ("/prompt", "/answers", "/direction", "/page"):
        assert client.post(path, json={}).status_code == 403
    assert client.get("/facts", headers={TOKEN_HEADER: "wrong"}).status_code == 403
    assert client.get("/facts", headers={TOKEN_HEADER: session.token}).status_code == 200


@pytest.mark.parametrize("header", [{"origin": "http://evil.example"}, {"host": "evil.example:8765"}])
def test_other_origins_and_names_are_refused(client, session, header):
    headers = {TOKEN_HEADER: session.token, **header}
    assert client.get("/facts", headers=headers).status_code == 403
    assert client.get(f"/?token={session.token}", headers=header).status_code == 403
    ours = {TOKEN_HEADER: session.token, "origin": "http://127.0.0.1:8765"}
    assert client.get("/facts", headers=ours).status_code == 200


def test_answers_come_as_events(client, session, subject):
    body = {"prompt": PROMPT, "layer": 1, "coeff": 2.0, "max_new_tokens": 8}
    reply = client.post("/answers", json=body, headers={TOKEN_HEADER: session.token})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line]
    assert events[-1] == {"end": True}
    shown = [[e["tokens"][i]["id"] for e in events[:-1] if e["tokens"][i]] for i in range(3)]
    assert shown == [[t.id for t in mine] for mine in answers(subject, VIEW)]
    wrong = client.post("/answers", json={**body, "layer": 7}, headers={TOKEN_HEADER: session.token})
    assert (wrong.status_code, "Layer 7 is not in the model" in wrong.json()["error"]) == (400, True)
    assert client.post("/answers", json={"x": 1}, headers={TOKEN_HEADER: session.token}).status_code == 400


def test_the_direction_is_a_file_to_load(client, session, subject, tmp_path):
    body = {"prompt": PROMPT, "layer": 2, "coeff": 1.5, "intervention": "clamp"}
    reply = client.post("/direction", json=body, headers={TOKEN_HEADER: session.token})
    path = tmp_path / "direction.safetensors"
    path.write_bytes(reply.content)
    loaded = ss.Direction.load(path, subject.chat)
    assert (loaded.layer, loaded.coeff, loaded.operation) == (2, 1.5, "clamp")
    assert torch.equal(loaded.vector, subject.direction.vector)


def test_two_readers_at_once_get_what_each_gets_alone(client, session):
    headers = {TOKEN_HEADER: session.token}
    bodies = [
        {"prompt": PROMPT, "layer": 1, "coeff": c, "max_new_tokens": 12, "intervention": i}
        for c, i in ((2.0, "add"), (-3.0, "clamp"))
    ]
    alone = [client.post("/answers", json=body, headers=headers).text for body in bodies]
    together = ["", ""]

    def ask(i):
        together[i] = client.post("/answers", json=bodies[i], headers=headers).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert alone[0] != alone[1]


def test_a_saved_page_holds_hostile_text_as_data(subject):
    hostile = "</script><img src=x onerror=alert(1)>\u2028<!--"
    page, policy = lens_page({"view": {"prompt": hostile}})
    assert "<img" not in page.partition('id="saved"')[2].partition("</script>")[0]
    assert "connect-src" not in policy
    assert "connect-src 'self'" in lens_page()[1]


# --- the widget ---


def test_the_widget_answers_calls_of_its_page(subject, tiny_llama, direction, tokens, student, reader):
    pytest.importorskip("anywidget", reason="the extra 'explore' is not installed")
    widget = ss.lens(tiny_llama, direction, tokens, student, reader=reader)
    sent = []
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    body = {"prompt": PROMPT, "layer": 1, "coeff": 2.0, "max_new_tokens": 8}
    widget._wanted = 1
    widget.answer(1, "answers", body)
    events = [content["event"] for content, _ in sent]
    assert events[-1] == {"end": True}
    shown = [[e["tokens"][i]["id"] for e in events[:-1] if e["tokens"][i]] for i in range(3)]
    assert shown == [[t.id for t in mine] for mine in answers(subject, VIEW)]
    sent.clear()
    widget._wanted = 3
    widget.answer(2, "answers", body)  # the page has asked anew since
    assert sent == []
    widget.answer(4, "facts", None)
    assert sent.pop()[0]["value"]["authors"] == ["base", "steered", "student"]
    widget.answer(5, "direction", {**body, "coeff": 0.5})
    assert (widget.direction.coeff, len(sent.pop()[1][0]) > 100) == (0.5, True)
    widget.answer(6, "prompt", "")
    assert sent.pop()[0]["error"] == "The prompt is empty: type a request."


def test_a_port_that_there_is_not_is_one_sentence(subject):
    with pytest.raises(SafeSteerError, match="Port 99999 cannot be used"):
        serve(subject, port=99999)
