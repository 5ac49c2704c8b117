// The live lens: a prompt, a direction that moves, and the answers of all models, token by token.
// `mountLens(root, source, saved)` draws it. `source` answers: facts(), prompt(p), answers(view, onEvent) -> cancel,
// direction(view), page(state); null for a page from disk, which shows `saved` and asks nobody. A source with a `grid`
// (prompts, layers, coeffs) has recorded answers: facts() and answers(view, onEvent) for what is in its lists, no more.
// Every text from a model or a user becomes a text node: nothing is parsed as markup.
"use strict";
function mountLens(root, source, saved) {
const SOON = 250; // ms after the last move of a slider
const MOST_CARDS = 500;
const AUTHORS = { base: "Base", steered: "Steered", student: "Student" };
const HELP = { add: "adds strength × direction at one layer", ablate: "projects the direction out of every write", clamp: "sets the projection at one layer to the strength", gate: "adds where the reader takes the prompt for harmful, ablates where for harmless" };
const grid = (source && source.grid) || null;
let facts = null, reading = null, lanes = [], picked = null, cancel = null, run = 0, timer = 0, measure = "lift", lastView = null;

// Elements ----------------------------------------------------------------------------------
function el(name, props = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.flat(3).filter(c => c !== null && c !== undefined && c !== false));
  return node;
}
const bdi = (text, props = {}) => el("bdi", props, shown(text));
function shown(text) { return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, c => `⟨${c.codePointAt(0).toString(16)}⟩`) || "∅"; }
const style = (node, rules) => { for (const [k, v] of Object.entries(rules)) node.style.setProperty(k, v); return node; };
const prob = p => p === null || p === undefined ? "–" : p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : p > 0 ? p.toExponential(0) : "0";
const signed = x => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`;

// Controls ----------------------------------------------------------------------------------
const say = el("p", { class: "say", role: "status", "aria-live": "polite" });
const prompt = grid ? el("select", { class: "prompt", id: id("prompt"), onchange: moved }, grid.prompts.map(text => el("option", { value: text }, shown(text)))) : el("textarea", { rows: 3, id: id("prompt"), spellcheck: "false", placeholder: "Type a request, or messages as JSON: [{\"role\": \"user\", \"content\": \"...\"}]", onkeydown: event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); start(); } } });
const layer = el("input", { type: "range", id: id("layer"), min: 0, step: 1, oninput: moved });
const strength = el("input", { type: "range", id: id("strength"), min: -4, max: 4, step: 0.05, oninput: moved });
const length = el("select", { id: id("length"), onchange: moved }, [24, 48, 96, 192].map(n => el("option", { value: n }, `${n} tokens`)));
const layerShown = el("output", { for: id("layer") }), strengthShown = el("output", { for: id("strength") });
const interventions = el("fieldset", { class: "choice" }), measures = el("fieldset", { class: "choice" });
const help = el("p", { class: "note" });
const stopButton = el("button", { type: "button", class: "quiet", onclick: () => stop("Stopped.") }, "Stop");
const strip = el("div", { class: "strip" }), board = el("div", { class: "lanes" }), detail = el("div", { class: "detail" }), safety = el("div", { class: "safety" }), cards = el("ol", { class: "cards" });
function id(name) { mountLens.count = mountLens.count || 0; return `lens-${name}-${root.dataset.lens || (root.dataset.lens = String(++mountLens.count))}`; }

function pills(fieldset, legend, values, chosen, pick) {
  const name = id(legend);
  fieldset.replaceChildren(el("legend", {}, legend), ...values.map(([value, text]) => el("label", {}, el("input", { type: "radio", name, value, checked: value === chosen, onchange: () => pick(value) }), el("span", { class: "pill" }, text))));
}
const intervention = () => (interventions.querySelector("input:checked") || {}).value || "add";
function typed() {
  const text = prompt.value.trim();
  if (text.startsWith("[")) { try { const turns = JSON.parse(text); if (Array.isArray(turns)) return turns; } catch { /* a request that opens with a bracket */ } }
  return prompt.value;
}
const layerAt = () => grid ? grid.layers[layer.value] : Number(layer.value), strengthAt = () => grid ? grid.coeffs[strength.value] : Number(strength.value);
const view = () => ({ prompt: grid ? prompt.value : typed(), layer: layerAt(), coeff: strengthAt(), intervention: intervention(), max_new_tokens: Number(length.value) });
let unit = null; // of the slider
function scaled() { // the strength of a clamp is in activation units
  const clamp = intervention() === "clamp", own = facts.operation === "clamp";
  if (!grid && unit !== clamp) { // the slider holds the direction's own strength exactly
    unit = clamp;
    const value = clamp === own ? facts.coeff : clamp ? facts.norm * facts.coeff : facts.coeff / facts.norm;
    const most = Math.max(clamp ? Math.ceil(4 * facts.norm) : 4, Math.ceil(Math.abs(value))), step = clamp ? most / 100 : 0.05;
    const onGrid = Math.abs(value / step - Math.round(value / step)) < 1e-9;
    strength.min = -most; strength.max = most; strength.step = onGrid ? step : "any"; strength.value = value;
  }
  help.textContent = `${intervention()}: ${HELP[intervention()]}.`;
  layer.disabled = intervention() === "ablate" || !source; strength.disabled = intervention() === "ablate" || !source;
}
function showValues() {
  layerShown.textContent = `${layerAt()} of ${facts.n_layers - 1}`; strengthShown.textContent = strengthAt().toFixed(2);
  layer.setAttribute("aria-valuetext", layerShown.textContent); strength.setAttribute("aria-valuetext", strengthShown.textContent);
}
function moved() { showValues(); scaled(); drawStrip(); if (!source || !prompt.value.trim()) return; stop(""); if (grid) start(); else timer = setTimeout(start, SOON); }

// Running -----------------------------------------------------------------------------------
function stop(text) { run += 1; clearTimeout(timer); if (cancel) cancel(); cancel = null; stopButton.disabled = true; root.dataset.running = "false"; say.textContent = text; }
async function start() {
  if (!source) return;
  stop("");
  if (!prompt.value.trim()) { say.textContent = "Type a request first."; return; }
  const mine = run, chosen = view();
  lastView = chosen; root.dataset.running = "true"; stopButton.disabled = false; say.textContent = "Reading …";
  lanes = facts.authors.map(author => ({ author, tokens: [], ended: false })); picked = null; drawLanes(); drawDetail();
  try {
    const key = JSON.stringify(chosen.prompt);
    if (!grid && (!reading || reading.key !== key)) { const read = await source.prompt(chosen.prompt); if (mine !== run) return; reading = { ...read, key }; drawStrip(); }
  } catch (error) { if (mine === run) stop(error.message); return; }
  cancel = source.answers(chosen, event => {
    if (mine !== run) return; // a slider has moved since: two settings never mix
    if (event.error) { stop(event.error); return; }
    if (event.end) { finished(chosen); return; }
    event.tokens.forEach((token, i) => { if (token) { lanes[i].tokens.push(token); addToken(i, lanes[i].tokens.length - 1); } else lanes[i].ended = true; });
    say.textContent = `${Math.max(...lanes.map(l => l.tokens.length))} tokens`;
  });
}
function finished(chosen) { cancel = null; stopButton.disabled = true; root.dataset.running = "false"; say.textContent = "Done."; if (!grid) remember(chosen); }

// The prompt, layer by layer ----------------------------------------------------------------
function drawStrip() {
  if (!reading) { strip.replaceChildren(); return; }
  const n = reading.projections.length, pos = reading.texts.length, at = Number(layer.value);
  // The first position is an attention sink: its huge values would leave nothing to see elsewhere.
  const most = Math.max(1e-9, ...reading.projections.flatMap(row => row.slice(Math.min(1, pos - 1))).map(Math.abs));
  const canvas = el("canvas", { width: pos * 8, height: n * 8, tabindex: 0, role: "img", "aria-label": `Projection on the direction: ${n} layers by ${pos} positions; the largest after the first position is ${most.toFixed(2)}. Arrow keys move, the line below reads out.` });
  const read = el("p", { class: "note", "aria-live": "polite" }, "Projection of the residual stream on the direction: orange towards refusal, blue away from it. Point at a cell.");
  const draw = canvas.getContext("2d"), colours = getComputedStyle(root), warm = colours.getPropertyValue("--raise"), cold = colours.getPropertyValue("--lower");
  reading.projections.forEach((row, l) => row.forEach((x, p) => { draw.fillStyle = `rgba(${x > 0 ? warm : cold},${Math.min(1, Math.abs(x) / most) ** 0.6})`; draw.fillRect(p * 8, (n - 1 - l) * 8, 8, 8); }));
  draw.strokeStyle = colours.getPropertyValue("--ink"); draw.strokeRect(0.5, (n - 1 - at) * 8 + 0.5, pos * 8 - 1, 7);
  let cell = [at, pos - 1];
  const tell = () => { const [l, p] = cell; read.replaceChildren(`Layer ${l}, `, bdi(reading.texts[p], { class: "token" }), ` (position ${p - pos}): projection ${reading.projections[l][p].toFixed(3)}. Logit lens at the last position: `, bdi(reading.top[l], { class: "token" }), `, ${prob(reading.mass_on_s[l])} on S.`); };
  canvas.addEventListener("pointermove", e => { const box = canvas.getBoundingClientRect(); cell = [Math.max(0, n - 1 - Math.floor((e.clientY - box.top) / box.height * n)), Math.min(pos - 1, Math.floor((e.clientX - box.left) / box.width * pos))]; tell(); });
  canvas.addEventListener("click", () => { if (source && !layer.disabled) { layer.value = cell[0]; moved(); } });
  canvas.addEventListener("keydown", e => { const by = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key]; if (!by) return; e.preventDefault(); cell = [Math.min(n - 1, Math.max(0, cell[0] + by[0])), Math.min(pos - 1, Math.max(0, cell[1] + by[1]))]; tell(); });
  const first = reading.mass_on_s.findIndex(m => m > 0.05);
  const lens = el("ol", { class: "lens-row", "aria-label": "Logit lens at the last position, layer by layer" }, reading.top.map((text, l) => el("li", { class: l === at ? "on" : "", title: `layer ${l}: ${prob(reading.mass_on_s[l])} on S` }, style(el("i"), { height: `${Math.round(100 * reading.mass_on_s[l])}%` }), bdi(text, { class: "token" }))));
  strip.replaceChildren(el("div", { class: "scroll" }, canvas), read, el("div", { class: "scroll" }, lens),
    el("p", { class: "note" }, first < 0 ? "No layer puts 5 % on S at the last position." : `S has 5 % of the probability from layer ${first} on.`, reading.score === null ? "" : ` The reader gives the prompt ${reading.score.toFixed(2)} (harmful above ${facts.threshold.toFixed(2)}).`));
}

// The answers -------------------------------------------------------------------------------
function colour(token) {
  if (measure === "lift") return `rgba(var(${token.lift > 0 ? "--raise" : "--lower"}),${(Math.min(Math.abs(token.lift) / 5, 1) * 0.6).toFixed(2)})`;
  if (measure === "share") return `rgba(var(--violet),${(0.6 * token.kl_share).toFixed(2)})`;
  return token.in_s ? "rgba(var(--teal),0.45)" : "transparent";
}
function drawLanes() {
  board.replaceChildren(...lanes.map((lane, i) => el("section", { class: "lane", "aria-label": `Answer of the ${lane.author} model` }, el("h3", {}, AUTHORS[lane.author]), el("div", { class: "flow", "data-lane": i, onkeydown: walk }, lane.tokens.map((_, t) => tokenNode(i, t))))));
}
function addToken(i, t) { board.querySelector(`[data-lane="${i}"]`).append(tokenNode(i, t)); }
function tokenNode(i, t) {
  const token = lanes[i].tokens[t];
  return style(el("button", { type: "button", class: `tok${token.in_s ? " in-s" : ""}`, dir: "auto", tabindex: t === 0 ? 0 : -1, "data-at": `${i},${t}`, onclick: () => pick(i, t), onfocus: () => pick(i, t), onpointerenter: () => pick(i, t) }, shown(token.text)), { background: colour(token) });
}
function walk(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], all = [...event.currentTarget.children];
  if (!step) return;
  const next = all[all.indexOf(document.activeElement) + step];
  if (next) { event.preventDefault(); next.focus(); }
}
function recolour() { for (const node of board.querySelectorAll(".tok")) { const [i, t] = node.dataset.at.split(",").map(Number); node.style.background = colour(lanes[i].tokens[t]); } }
function pick(i, t) { for (const node of board.querySelectorAll(".tok.on")) node.classList.remove("on"); const node = board.querySelector(`[data-at="${i},${t}"]`); if (node) node.classList.add("on"); picked = [i, t]; drawDetail(); }
function drawDetail() {
  const token = picked && lanes[picked[0]] && lanes[picked[0]].tokens[picked[1]];
  if (!token) { detail.replaceChildren(el("p", { class: "note" }, "Point at a token: what each model thought there.")); return; }
  const names = facts.authors, story = facts.tokens.find(s => s.id === token.id);
  detail.replaceChildren(
    el("p", { class: "big" }, bdi(token.text, { class: "token" })),
    el("p", { class: "note" }, `lift ${signed(token.lift)} nats; KL(steered ‖ base) ${token.kl.toFixed(2)} nats, ${Math.round(100 * token.kl_share)} % of it on S; ${token.in_s ? "in S" : "not in S"}`),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { class: "l" }, "model"), el("th", {}, "probability"), el("th", {}, "rank"), el("th", { class: "l" }, "most likely there"))),
      el("tbody", {}, names.map(name => { const r = token.read[name]; return el("tr", {}, el("td", { class: "l" }, AUTHORS[name]), el("td", { "data-p": r.p }, prob(r.p)), el("td", {}, String(r.rank)), el("td", { class: "l" }, r.top.map(a => [bdi(a.text, { class: "token" }), ` ${prob(a.p)}  `]))); })))),
    story ? storyOf(story) : "");
}
function storyOf(s) {
  return el("div", { class: "story" }, el("h3", {}, "Why ", bdi(s.text, { class: "token" }), " is in S"),
    el("p", { class: "note" }, `${s.votes} votes (by position of the answer: ${s.votes_by_position.join(", ")}); base ${prob(s.p_base)}, steered ${prob(s.p_steered)}`, s.direct === null || s.direct === undefined ? "" : `; of its change of ${signed(s.change)} nats at the last prompt position ${signed(s.direct)} come from the direction itself, the others from later layers`, "."),
    s.contexts.length ? el("ul", {}, s.contexts.map(c => el("li", {}, bdi(c.prompt), " → ", bdi(c.answer_so_far || "(start)"), el("mark", {}, bdi(s.text)), ` ${prob(c.p_base)} → ${prob(c.p_steered)}`))) : "");
}
function drawSafety() {
  const out = el("div", { class: "out" });
  safety.replaceChildren(el("h3", {}, `S: the ${facts.tokens.length} safety tokens`), el("div", { class: "chips" }, facts.tokens.map(s => el("button", { type: "button", class: "chip token", dir: "auto", onclick: () => out.replaceChildren(storyOf(s)) }, shown(s.text)))), out);
}

// Cards: what was looked at, kept by the browser -------------------------------------------
const shelf = () => `safesteer-lens:${facts.model}`;
function remembered() { try { return JSON.parse(localStorage.getItem(shelf()) || "[]"); } catch { return []; } }
function remember(chosen) {
  const texts = lanes.map(l => l.tokens.map(t => t.text).join(""));
  const list = [{ view: chosen, texts }, ...remembered().filter(c => JSON.stringify(c.view) !== JSON.stringify(chosen))].slice(0, MOST_CARDS);
  try { localStorage.setItem(shelf(), JSON.stringify(list)); } catch { /* no storage here: cards last as long as the page */ }
  drawCards(list);
}
function drawCards(list) {
  cards.replaceChildren(...list.slice(0, 50).map(card => el("li", {}, el("button", { type: "button", class: "card", onclick: () => take(card.view) },
    el("b", {}, bdi(typeof card.view.prompt === "string" ? card.view.prompt : card.view.prompt.map(m => m.content).join(" / "))), el("small", {}, ` ${card.view.intervention}, layer ${card.view.layer}, strength ${card.view.coeff}`), ...card.texts.map((t, i) => el("span", {}, `${AUTHORS[facts.authors[i]] || ""}: `, bdi(t.slice(0, 90))))))));
  cards.hidden = !list.length;
}
function take(chosen) { put(chosen); start(); }
function put(chosen) {
  prompt.value = typeof chosen.prompt === "string" ? chosen.prompt : JSON.stringify(chosen.prompt);
  const radio = interventions.querySelector(`input[value="${chosen.intervention}"]`); if (radio) radio.checked = true;
  scaled(); layer.value = chosen.layer; strength.value = chosen.coeff; length.value = chosen.max_new_tokens; showValues();
}
function download(data, name) { const link = el("a", { href: URL.createObjectURL(data), download: name }); root.append(link); link.click(); link.remove(); setTimeout(() => URL.revokeObjectURL(link.href), 10000); }
async function keep(what, name) { try { download(await what(), name); say.textContent = `Saved ${name}.`; } catch (error) { say.textContent = error.message; } }
const state = () => ({ facts, reading, lanes, view: lastView || view(), measure });

// Start -------------------------------------------------------------------------------------
root.classList.add("lens");
const sliders = el("div", { class: "sliders" }, el("label", { for: id("layer") }, "Layer ", layerShown), layer, el("label", { for: id("strength") }, "Strength ", strengthShown), strength,
  grid ? null : [el("label", { for: id("length") }, "Length"), length]);
const model = el("bdi", { class: "model" }), tools = el("div", { class: "tools" }, el("button", { type: "button", class: "run", onclick: start }, "Run"), stopButton,
  el("button", { type: "button", class: "quiet", onclick: () => keep(() => source.direction(view()), "direction.safetensors") }, "Keep this direction"),
  el("button", { type: "button", class: "quiet", onclick: () => keep(() => source.page(state()), "lens.html") }, "Save this view"), say);
const panel = el("div", { class: "panel" }, el("label", { for: id("prompt") }, "Prompt"), prompt, grid ? null : [interventions, help], sliders, grid ? null : tools);
root.replaceChildren(...(grid ? [panel, measures, board, detail] : [
  el("header", {}, el("p", { class: "kicker" }, "SafeSteer lens"), el("h1", {}, model)),
  panel, measures, board, detail, el("h2", {}, "The prompt, layer by layer"), strip, safety, el("h2", {}, "Looked at"), cards]));
function ready(values) {
  facts = values;
  model.textContent = shown(facts.model);
  if (grid) for (const [slider, list, value] of [[layer, grid.layers, facts.layer], [strength, grid.coeffs, facts.coeff]]) { slider.min = 0; slider.max = list.length - 1; slider.step = 1; slider.value = list.indexOf(value); }
  else { layer.max = facts.n_layers - 1; layer.value = facts.layer; }
  pills(interventions, "Intervention", facts.interventions.map(v => [v, v]), facts.interventions.includes(facts.operation) ? facts.operation : "add", () => { scaled(); moved(); });
  pills(measures, "Colour", [["lift", "lift"], ["share", "share of KL on S"], ["s", "in S"]], measure, value => { measure = value; recolour(); });
  lanes = facts.authors.map(author => ({ author, tokens: [], ended: false }));
  scaled(); showValues(); drawLanes(); drawDetail(); drawSafety(); stop("");
  if (saved) { lanes = saved.lanes; reading = saved.reading; put(saved.view); drawLanes(); drawStrip(); }
  if (!source) for (const node of root.querySelectorAll(".panel input, .panel textarea, .panel select, .panel button")) node.disabled = true;
  else if (grid) start();
  else drawCards(remembered());
  if (!source) say.textContent = "A saved view: nothing runs behind it.";
  root.dataset.ready = "true";
}
if (saved) ready(saved.facts); else source.facts().then(ready, error => { say.textContent = error.message; });
return () => stop("");
}
