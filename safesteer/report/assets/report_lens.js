// The lens from disk: answers recorded at a few layers and strengths, as `lens_data.py` packs them.
"use strict";
(() => {
const { data, byId, missing } = window.safesteer, lens = data.lens, place = byId("lens-body");
if (!lens) { place.append(missing("lens")); return; }
const text = id => lens.vocabulary[id];
function reading([p, rank, ...top]) {
  return { p, rank, top: top.filter((_, i) => i % 2 === 0).map((id, i) => ({ id, text: text(id), p: top[2 * i + 1] })) };
}
function unpack(answer) {
  return answer.tokens.map(([id, lift, kl, share, inS], t) => ({ id, text: text(id), lift, kl, kl_share: share, in_s: !!inS,
    read: Object.fromEntries(lens.models.map((name, m) => [name, reading(lens.readings[answer.read[m]][t])])) }));
}
function cellOf(view) {
  const [p, l, c] = [lens.prompts.indexOf(view.prompt), lens.layers.indexOf(view.layer), lens.coeffs.indexOf(view.coeff)];
  return lens.cells[(p * lens.layers.length + l) * lens.coeffs.length + c].map(unpack);
}
const stories = data.tokens ? data.tokens.rows.map(t => ({ ...t, direct: t.story && t.story.direct, change: t.story && t.story.change })) : [];
const facts = { model: data.run.model, authors: lens.models, n_layers: lens.n_layers, layer: lens.layer, coeff: lens.coeff, norm: 1, operation: "add", interventions: ["add"], threshold: null, lower: null, tokens: stories };
const source = {
  grid: lens,
  facts: () => Promise.resolve(facts),
  answers(view, onEvent) {
    const answers = cellOf(view);
    for (let t = 0; answers.some(a => t < a.length); t += 1) onEvent({ tokens: answers.map(a => a[t] || null) });
    onEvent({ end: true });
    return () => {};
  },
};
mountLens(place, source, null);
})();
