"""Interventions: the same on a plain model and on a bridge, exact at the hook, gone afterwards."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from conftest import (
    PROMPTS,
    assert_near,
    batch_of,
    copy_of,
    n_hooks,
    naive_logits,
    plainly_padded,
    random_vector,
)
from safesteer._errors import SafeSteerError
from safesteer.directions.refusal_tokens import refusal_scores
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden, last_logits, prefill
from safesteer.models.generation import generate_ids
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.models.parts import blocks, hf_model
from safesteer.models.passes import reading
from safesteer.models.writes import writes_of
from safesteer.steering.direction import Direction, steer
from safesteer.steering.hooks import apply_hooks, record_resid_pre, run_from_layer
from safesteer.steering.interventions import ablate, ablate_placebo, add, clamp, gate
from safesteer.steering.reader import HarmfulnessReader

LAYER, COEFF = 1, 3.0


@torch.no_grad()
def logits(chat: ChatModel) -> torch.Tensor:
    return logits_of(final_hidden(chat.model, batch_of(chat)), *output_head(chat.model))


def residuals(chat: ChatModel) -> torch.Tensor:
    """resid_pre of every layer at real columns, [n_layers, n, d_model]; batch without sharing."""
    batch = plainly_padded(chat)
    real = batch.attention_mask.bool()
    layers = list(range(chat.n_layers))
    with record_resid_pre(chat.model, layers, lambda h: h[real]) as seen:
        final_hidden(chat.model, batch)
    return torch.stack([seen[layer] for layer in layers])


@pytest.fixture(params=["plain", "bridge"])
def either(request, chat_and_bridge) -> ChatModel:
    return chat_and_bridge[request.param == "bridge"]


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_plain_model_and_bridge_agree(chat_and_bridge, operation):
    results = []
    for chat in chat_and_bridge:
        vector = random_vector(chat.d_model)
        with add(chat, vector, LAYER, COEFF) if operation == "add" else ablate(chat, vector):
            results.append(logits(chat))
        assert (results[-1] - logits(chat)).abs().max() > 0.1
    assert_near(results[0], results[1])


OPERATIONS = {
    "add": lambda chat, vector: add(chat, vector, LAYER, COEFF),
    "clamp": lambda chat, vector: clamp(chat, vector, LAYER, COEFF),
    "gate": lambda chat, vector: gate(chat, vector, LAYER, -1e9, COEFF),
    "ablate": ablate,
    "ablate_placebo": ablate_placebo,
    "steer": lambda chat, vector: steer(chat, Direction(vector, LAYER, "-1", "instruction", COEFF)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_takes_the_model_in_any_form(bridges, tiny_llama, operation):
    vector, results = random_vector(32), []
    bridge = bridges["tiny-llama"]
    pair = (tiny_llama.model, tiny_llama.tokenizer)
    forms = [(tiny_llama, f) for f in (tiny_llama, tiny_llama.model, pair)]
    for chat, form in [*forms, (bridge, bridge.model), (bridge, bridge)]:
        with OPERATIONS[operation](form, vector):
            results.append(logits(chat))
    for other in results[1:]:
        assert_near(other, results[0])
    assert (results[0] - logits(tiny_llama)).abs().max() > 0.01


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_steered_minus_base_is_the_vector_at_the_hook(either, layer):
    """Once, at this layer, at every position; nothing moves before it, something does after it."""
    vector = random_vector(either.d_model)
    base = residuals(either)
    with add(either.model, vector, layer, COEFF):
        moved = residuals(either) - base
    assert_near(moved[layer], (COEFF * vector).expand_as(moved[layer]), 1e-5)
    assert float(moved[:layer].abs().sum()) == 0
    if layer + 1 < either.n_layers:
        later = moved[layer + 1] - COEFF * vector
        assert later.abs().max() > 1e-3


def test_zero_coefficient_is_the_base(chat):
    with add(chat.model, random_vector(chat.d_model), LAYER, 0.0):
        steered = logits(chat)
    assert torch.equal(steered, logits(chat))


def test_opposite_vectors_cancel(chat):
    vector = random_vector(chat.d_model)
    with add(chat.model, vector, LAYER, COEFF), add(chat.model, vector, LAYER, -COEFF):
        both = logits(chat)
    assert_near(both, logits(chat))


def test_ablated_projection_is_zero_everywhere(chat):
    vector = random_vector(chat.d_model)
    unit = vector / vector.norm()
    assert (residuals(chat) @ unit).abs().amax(1).min() > 0.01
    with ablate(chat.model, vector):
        ablated = residuals(chat)
    scale = ablated.norm(dim=-1).max()
    assert float((ablated @ unit).abs().max() / scale) < 1e-6


def test_ablated_projection_is_zero_on_the_bridge(bridges):
    for chat in bridges.values():
        vector = random_vector(chat.d_model)
        with ablate(chat.model, vector):
            assert float((residuals(chat) @ vector).abs().max()) < 1e-4


def test_ablation_equals_orthogonal_weights(tiny_qwen2):
    """Projecting activations is projecting every matrix that writes (Arditi et al., 2.4)."""
    other, vector = copy_of(tiny_qwen2), random_vector(32)
    u = vector / vector.norm()
    with torch.no_grad():
        embedding = other.model.get_input_embeddings().weight
        embedding -= (embedding @ u)[:, None] * u
        for block in blocks(other.model):
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= u[:, None] * (u @ weight)
    with ablate(tiny_qwen2.model, vector):
        got = logits(tiny_qwen2)
    assert_near(got, logits(other))


def test_ablation_ignores_length_and_sign(tiny_llama):
    vector = random_vector(32)
    with ablate(tiny_llama.model, vector):
        want = logits(tiny_llama)
    with ablate(tiny_llama.model, -7 * vector):
        assert_near(logits(tiny_llama), want)


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_one_vector_per_row(either, operation):
    """Row r of the batch is as if its own vector were the only one."""
    batch = plainly_padded(either)
    vectors = torch.stack([random_vector(either.d_model, seed) for seed in range(4)])

    @torch.no_grad()
    def run(vector):
        model = either.model
        with add(model, vector, LAYER, COEFF) if operation == "add" else ablate(model, vector):
            return final_hidden(model, batch)[:, -1]

    together = run(vectors)
    for row, vector in enumerate(vectors):
        assert_near(together[row], run(vector)[row])
    assert (run(vectors[0])[1] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_hooks_are_gone_after_an_exception(either, operation):
    vector, before, base = random_vector(either.d_model), n_hooks(either.model), logits(either)
    steering = add(either.model, vector, LAYER) if operation == "add" else ablate(either.model, vector)

    def stop_inside():
        with steering:
            assert n_hooks(either.model) > before
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_inside()
    assert n_hooks(either.model) == before
    assert torch.equal(logits(either), base)


def test_hooks_are_gone_after_a_failing_edit(either):
    def broken(h):
        raise RuntimeError("inside")

    before = n_hooks(either.model)
    with pytest.raises(RuntimeError, match="inside"), apply_hooks(either.model, {("resid_pre", 0): broken}):
        logits(either)
    assert n_hooks(either.model) == before


def test_hooks_are_gone_when_a_later_one_cannot_be_attached(tiny_llama):
    edits = {("resid_pre", 0): lambda h: h + 1, ("write", 99): lambda h: h}
    before = n_hooks(tiny_llama.model)  # transformers leaves hooks of its own on a model once used
    with pytest.raises(IndexError), apply_hooks(tiny_llama.model, edits):
        pass
    assert n_hooks(tiny_llama.model) == before


@pytest.mark.parametrize("point", ["embed", "resid_pre", "write"])
def test_points_are_the_same_place_on_both(chat_and_bridge, point):
    results = []
    for chat in chat_and_bridge:
        seen = []
        with apply_hooks(chat.model, {(point, LAYER): lambda h, seen=seen: seen.append(h.detach())}):
            naive = plainly_padded(chat)
            with torch.no_grad():
                final_hidden(chat.model, naive)
        assert len(seen) == 1
        results.append(seen[0][naive.attention_mask.bool()])
    assert_near(results[0], results[1])


def test_residual_is_the_sum_of_its_writes(tiny_gemma2):
    """resid_pre[1] = resid_pre[0] + both writes of block 0, also with sandwich norms."""
    points = [("resid_pre", 0), ("write", 0), ("write", 1), ("resid_pre", 1)]
    seen = {}
    edits = {at: (lambda h, at=at: seen.update({at: h.detach()})) for at in points}
    with apply_hooks(tiny_gemma2.model, edits):
        naive_logits(tiny_gemma2, plainly_padded(tiny_gemma2))
    start, attention, mlp, end = (seen[at] for at in points)
    assert_near(start + attention + mlp, end, 1e-5)


def test_record_does_not_change_the_pass(chat):
    base = logits(chat)
    with record_resid_pre(chat.model, [0, 1], lambda h: h) as seen:
        recorded = logits(chat)
    assert torch.equal(recorded, base)
    assert sorted(seen) == [0, 1]
    assert not seen[0].requires_grad


# --- clamp, placebo ---


def test_clamped_projection_is_the_value(either):
    vector = random_vector(either.d_model)
    unit = vector / vector.norm()
    before = residuals(either)[LAYER]
    with clamp(either.model, 5 * vector, LAYER, 2.5):
        after = residuals(either)[LAYER]
    assert_near(after @ unit, torch.full_like(after @ unit, 2.5), 1e-4)
    orthogonal = torch.eye(either.d_model) - torch.outer(unit, unit)
    assert_near(after @ orthogonal, before @ orthogonal)


def test_the_placebo_moves_as_far_as_ablation_along_another_axis(tiny_llama):
    vector, seen = random_vector(32), {}

    def embedding(name, context):
        with context, apply_hooks(tiny_llama.model, {("resid_pre", 0): lambda h: seen.update({name: h})}):
            naive_logits(tiny_llama, batch_of(tiny_llama, ["Hi"]))

    embedding("ablated", ablate(tiny_llama.model, vector))
    embedding("placebo", ablate_placebo(tiny_llama.model, vector, seed=1))
    embedding("base", record_resid_pre(tiny_llama.model, [], lambda h: h))
    moved, placebo = seen["ablated"] - seen["base"], seen["placebo"] - seen["base"]
    assert_near(placebo.norm(dim=-1), moved.norm(dim=-1))
    axis = placebo[0] / placebo[0].norm(dim=-1, keepdim=True)
    assert_near(axis, axis[:1].expand_as(axis))
    assert float((axis[0] @ vector / vector.norm()).abs()) < 0.7


def test_placebos_of_rows_stay_with_their_prompts(tiny_llama):
    """Longer prompts are read first elsewhere, and rows must not change places here."""
    vectors, ids = torch.stack([random_vector(32, 1), random_vector(32, 2)]), torch.tensor([7, 40])
    prompts = ["Name a river in the north, and another in the south.", "Hi"]
    for texts, rows in ((prompts, vectors), (prompts[::-1], vectors.flip(0))):
        with ablate_placebo(tiny_llama, rows):
            together = refusal_scores(tiny_llama, texts, ids)
        for text, vector, score in zip(texts, rows, together, strict=True):
            with ablate_placebo(tiny_llama, vector):
                assert_near(score, refusal_scores(tiny_llama, [text], ids)[0])


def test_a_vector_of_another_width_is_refused(tiny_llama):
    for vector in (torch.ones(1), torch.ones(33)):
        for context in (
            add(tiny_llama, vector, LAYER),
            clamp(tiny_llama, vector, LAYER, 1.0),
            ablate(tiny_llama, vector),
            gate(tiny_llama, vector, LAYER, 0.0),
        ):
            with pytest.raises(SafeSteerError, match="does not fit a residual stream of width 32"), context:
                pass


# --- where in the text ---


def naive_scope(chat, ids, n_prompt: int, scope: str, n_last: int, vector) -> torch.Tensor:
    """Logits of one unpadded text without a cache, with the addition written out by columns."""
    inside = torch.zeros(len(ids), dtype=torch.bool)
    inside[{"prompt": slice(0, n_prompt), "answer": slice(n_prompt, None)}.get(scope, slice(0, None))] = True
    if scope == "last":
        inside[: n_prompt - n_last], inside[n_prompt:] = False, False

    def edit(h):
        return h + COEFF * inside[None, :, None] * vector

    with apply_hooks(chat.model, {("resid_pre", LAYER): edit}), torch.no_grad():
        out = chat.model(torch.tensor([ids]), use_cache=False)
    return (out if isinstance(out, torch.Tensor) else out.logits)[0]


@pytest.mark.parametrize(("scope", "n_last"), [("all", 1), ("prompt", 1), ("answer", 1), ("last", 3)])
def test_scopes_stay_right_in_cached_decoding(either, scope, n_last):
    """Greedy answers of a padded batch with a shared prefix and a cache, against whole texts."""
    vector, batch = random_vector(either.d_model), batch_of(either)
    with add(either.model, vector, LAYER, COEFF, scope=scope, n_last=n_last):
        answers = generate_ids(either, batch, max_new_tokens=5)
    differs = answers.tolist() != generate_ids(either, batch, max_new_tokens=5).tolist()
    plain = ChatModel(hf_model(either.model), either.tokenizer, either.name)
    for row, answer in enumerate(answers.tolist()):
        head = batch.prompt_ids[row][batch.attention_mask[row].bool()].tolist()
        text, want = list(head), []
        for _ in answer:
            step = naive_scope(either, text, len(head), scope, n_last, vector)[-1].argmax()
            want.append(int(step))
            text.append(int(step))
        stop = next((i for i, t in enumerate(want) if t in plain.eos_ids), len(want))
        assert answer[: stop + 1] == want[: stop + 1]
    assert differs


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scope", ["prompt", "answer", "last"])
def test_scopes_agree_with_and_without_a_cache(tiny_llama, scope, use_cache):
    """The model's own generate, told where the prompt ends."""
    batch, vector = plainly_padded(tiny_llama), random_vector(32)
    width = batch.prompt_ids.shape[1]

    def answers(**options):
        with add(tiny_llama.model, vector, LAYER, COEFF, scope=scope, n_last=2, prompt_width=width):
            return tiny_llama.model.generate(
                batch.prompt_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=5,
                do_sample=False,
                **options,
            )[:, width:].tolist()

    with add(tiny_llama.model, vector, LAYER, COEFF, scope=scope, n_last=2):
        want = generate_ids(tiny_llama, batch_of(tiny_llama), max_new_tokens=5).tolist()
    assert answers(use_cache=use_cache) == want


def test_bridge_generate_takes_scopes(bridges, tiny_llama):
    bridge, batch, vector = bridges["tiny-llama"], plainly_padded(tiny_llama), random_vector(32)
    width = batch.prompt_ids.shape[1]
    with add(bridge.model, vector, LAYER, COEFF, scope="answer", prompt_width=width):
        out = bridge.model.generate(
            batch.prompt_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=5,
            do_sample=False,
            return_type="tokens",
            verbose=False,
        )
    with add(tiny_llama.model, vector, LAYER, COEFF, scope="answer"):
        want = generate_ids(tiny_llama, batch_of(tiny_llama), max_new_tokens=5)
    assert out[:, width:].tolist() == want[:, : out.shape[1] - width].tolist()


def test_teacher_forced_answers_of_unequal_length_are_found(tiny_llama):
    """Each row's own answer is steered, not one column for the batch."""
    tails, vector = ["I", "Here is a long answer to it"], random_vector(32)
    batch = PromptBatch.of(tiny_llama.tokenizer, PROMPTS[:2], tails)
    with add(tiny_llama.model, vector, LAYER, COEFF, scope="answer"), torch.no_grad():
        got = final_hidden(tiny_llama.model, batch)[:, -1]
        for row in range(2):
            single = PromptBatch.of(tiny_llama.tokenizer, [PROMPTS[row]], [tails[row]])
            assert_near(got[row], final_hidden(tiny_llama.model, single)[0, -1])


def test_scopes_that_cannot_be_known_are_refused(tiny_llama):
    vector, ids = random_vector(32), torch.tensor([[1, 2, 3]])
    with (
        pytest.raises(SafeSteerError, match="prompt_width"),
        add(tiny_llama.model, vector, 1, scope="answer"),
    ):
        tiny_llama.model(ids)


def test_more_last_positions_than_a_prompt_has_are_the_prompt(tiny_llama):
    vector = random_vector(32)
    with add(tiny_llama.model, vector, 1, scope="last", n_last=200):
        got = last_logits(tiny_llama, batch_of(tiny_llama))
    with add(tiny_llama.model, vector, 1, scope="prompt"):
        assert_near(got, last_logits(tiny_llama, batch_of(tiny_llama)))


# --- gate ---


def projections(chat: ChatModel, vector, gate_layer: int) -> list[float]:
    """Of each prompt alone, at its last position."""
    values = []
    for text in PROMPTS:
        seen = {}
        with apply_hooks(chat.model, {("resid_pre", gate_layer): lambda h, seen=seen: seen.update(h=h)}):
            final_hidden(chat.model, batch_of(chat, [text]))
        values.append(float(seen["h"][0, -1] @ vector / vector.norm()))
    return values


@pytest.mark.parametrize("gate_layer", [None, 1])
@pytest.mark.parametrize("n_samples", [1, 2])
def test_the_gate_decides_row_by_row(either, gate_layer, n_samples):
    """Rows above the threshold answer as steered from their last prompt position on, others as the base."""
    vector, layer = random_vector(either.d_model), 2
    seen = projections(either, vector, layer if gate_layer is None else gate_layer)
    threshold = sorted(seen)[1] + 1e-4
    with gate(either.model, vector, layer, threshold, COEFF, gate_layer=gate_layer):
        got = generate_ids(either, batch_of(either), max_new_tokens=5, n_samples=n_samples).tolist()
    alone = [batch_of(either, [p]) for p in PROMPTS]
    base = [generate_ids(either, b, max_new_tokens=5)[0].tolist() for b in alone]
    steered = []
    for b in alone:  # "last" plus "answer" is what an open gate does
        with (
            add(either.model, vector, layer, COEFF, scope="last"),
            add(either.model, vector, layer, COEFF, scope="answer"),
        ):
            steered.append(generate_ids(either, b, max_new_tokens=5)[0].tolist())
    assert base != steered
    for i, p in enumerate(seen):
        want = steered[i] if p > threshold else base[i]
        for sample in range(n_samples):
            answer = got[i * n_samples + sample]
            assert answer[: len(want)] == want[: len(answer)]
    assert {p > threshold for p in seen} == {True, False}


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_gate_agrees_with_and_without_a_cache(tiny_llama, use_cache):
    vector, batch = random_vector(32), plainly_padded(tiny_llama)
    threshold = sorted(projections(tiny_llama, vector, 1))[1] + 1e-4
    width = batch.prompt_ids.shape[1]
    with gate(tiny_llama.model, vector, 1, threshold, COEFF, prompt_width=width):
        got = tiny_llama.model.generate(
            batch.prompt_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
        )
    with gate(tiny_llama.model, vector, 1, threshold, COEFF):
        want = generate_ids(tiny_llama, batch_of(tiny_llama), max_new_tokens=5)
    assert got[:, width:].tolist() == want.tolist()


def test_gates_that_cannot_decide_are_refused(tiny_llama):
    vector = random_vector(32)
    with (
        pytest.raises(SafeSteerError, match="above layer 1"),
        gate(tiny_llama.model, vector, 1, 0.0, gate_layer=2),
    ):
        pass
    batch = batch_of(tiny_llama)
    cache = prefill(tiny_llama.model, batch, batch.prompt_ids.shape[1])
    token = torch.ones((4, 1), dtype=torch.long)
    with (
        pytest.raises(SafeSteerError, match="did not see the prompt"),
        reading(batch),
        gate(tiny_llama.model, vector, 1, 0.0),
    ):
        tiny_llama.model(token, past_key_values=cache)


# --- starting half-way ---


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_starting_at_a_layer_equals_the_whole_pass(chat, layer):
    layer = min(layer, chat.n_layers - 1)
    batch = plainly_padded(chat)
    with record_resid_pre(chat.model, [layer], lambda h: h) as seen:
        want = final_hidden(chat.model, batch)
    ran = []
    first = blocks(chat.model)[0]
    handle = first.register_forward_hook(lambda *args: ran.append(1))
    with run_from_layer(chat.model, layer, seen[layer]), torch.no_grad():
        got = final_hidden(chat.model, batch)
    handle.remove()
    assert_near(got, want)
    assert len(ran) == (layer == 0)
    assert blocks(chat.model)[0] is first
    with pytest.raises(RuntimeError, match="stop"), run_from_layer(chat.model, layer, seen[layer]):
        raise RuntimeError("stop")
    assert blocks(chat.model)[0] is first


# --- the value ---


def test_a_direction_is_a_row_and_a_table(direction):
    row = direction.to_frame().iloc[0]
    assert {name: row[name] for name in direction.metadata} == direction.metadata
    assert row.norm == pytest.approx(float(direction.vector.norm()))
    hostile = Direction(direction.vector, 1, "-1", "instruction", model="<script>")
    page = hostile._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert f"{float(direction.vector.norm()):.3g}" in page


def test_an_unknown_operation_is_refused(tiny_llama, direction):
    odd = Direction(direction.vector, 1, "-1", "instruction", operation="rotate")
    with pytest.raises(SafeSteerError, match="use one of add, ablate, clamp"), steer(tiny_llama, odd):
        pass


def test_the_rounding_of_huge_elements_is_no_write_of_its_own(tiny_llama):
    """Qwen2's stream has elements near 2,000, which bfloat16 knows to 8; a block adds a tenth of one."""
    chat = copy_of(tiny_llama)
    with torch.no_grad():
        chat.model.get_input_embeddings().weight[:, 3] = 1744.0
    chat.model.bfloat16()
    writes = writes_of(chat.model)
    assert len(writes.places) == 2 * chat.n_layers
    assert writes.starts_at_embedding


def test_a_write_that_is_left_out_is_seen_beside_huge_elements(tiny_llama):
    chat = copy_of(tiny_llama)
    with torch.no_grad():
        chat.model.get_input_embeddings().weight[:, 3] = 1744.0
    chat.model.bfloat16()
    block, inside = blocks(chat.model)[0], blocks(chat.model)[0].forward
    block.forward = lambda *args, **kwargs: (
        inside(*args, **kwargs) + torch.arange(chat.d_model).bfloat16() / 9
    )
    with pytest.raises(SafeSteerError, match="not a sum of its parts"):
        writes_of(chat.model)


@pytest.mark.parametrize("emptied", ["reset", "crop"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_cache_that_is_used_again_is_counted_anew(tiny_llama, direction, emptied, gated):
    """Two prompts through one cache, inside one block, are steered as with a cache of their own."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randint(5, 390, (2, 1, 14), generator=generator)
    second[:, :4] = first[:, :4]
    projected = [PromptBatch.from_ids(ids.tolist(), [[]]) for ids in (first, second)]
    reader = HarmfulnessReader(random_vector(32, 5), 0.0, 1, "prompt")
    scores = [float(reader.scores_of(tiny_llama.model, batch)[0]) for batch in projected]
    reader = replace(reader, threshold=sum(scores) / 2)  # tells one from the other
    how = {"gate": reader} if gated else {"scope": "answer"}

    @torch.no_grad()
    def answer(ids, cache):
        tiny_llama.model(ids, past_key_values=cache, use_cache=True)
        return tiny_llama.model(torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits[0, -1]

    def new():
        if emptied == "reset":
            return StaticCache(config=tiny_llama.config, max_cache_len=32)
        return DynamicCache(config=tiny_llama.config)

    want = []
    for ids in (first, second):
        with steer(tiny_llama, direction, prompt_width=14, **how):
            want.append(answer(ids, new()))
    cache = new()
    with steer(tiny_llama, direction, prompt_width=14, **how):
        for ids, expected in zip((first, second), want, strict=True):
            assert_near(answer(ids, cache), expected)
            cache.reset() if emptied == "reset" else cache.crop(-15)
