// Builds the page from the JSON in #data. Text only ever enters through textContent.
"use strict";
(() => {
const { data, byId, el, none, dark } = window.safesteerDom;
const bdi = (text, props = {}) => el("bdi", { dir: "auto", ...props }, text);
const style = (node, rules) => { Object.assign(node.style, rules); return node; };

// Numbers -----------------------------------------------------------------------------------
const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
function tiny(x) {
  const [mantissa, exponent] = x.toExponential(1).split("e");
  return `${mantissa}·10${[...String(Number(exponent))].map(c => SUPERSCRIPT[c]).join("")}`;
}
function prob(x) { // a probability, for reading: 43.2 %, 0.12 %, 3.1·10⁻⁶
  if (none(x)) return "–";
  if (x >= 0.1) return `${(100 * x).toFixed(1)} %`;
  if (x >= 0.0001) return `${(100 * x).toPrecision(2)} %`;
  return x === 0 ? "0 %" : tiny(x);
}
const share = x => none(x) ? "–" : `${(100 * x).toFixed(x > 0 && x < 0.0995 ? 1 : 0)} %`;
const signed = (x, digits = 2) => none(x) ? "–" : `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(digits)}`;
const fixed = (x, digits = 2) => none(x) ? "–" : x.toFixed(digits).replace("-", "−");
const whole = x => none(x) ? "–" : Math.round(x).toLocaleString("en-US");

// Tables ------------------------------------------------------------------------------------
// columns: {key, name, title, left, off (hidden on a phone), show(row), sort(row)}
function table(columns, rows, { sortable = true, limit = Infinity, rowProps = () => ({}), more = null } = {}) {
  let order = null, body = el("tbody");
  const all = el("button", { type: "button", class: "quiet", onclick: () => { limit = Infinity; draw(); } });
  const heads = columns.map(c => el("th", { scope: "col", class: `${c.left ? "l" : ""} ${c.off ? "narrow-off" : ""}`, title: c.title },
    sortable ? el("button", { type: "button", onclick: () => by(c) }, c.name) : c.name));
  function draw() {
    const value = row => { const v = order.column.sort ? order.column.sort(row) : row[order.column.key]; return none(v) ? -Infinity : v; };
    const shown = order ? [...rows].sort((a, b) => {
      const x = value(a), y = value(b);
      return (typeof x === "string" && typeof y === "string" ? x.localeCompare(y) : x < y ? -1 : x > y ? 1 : 0) * order.sign;
    }) : rows;
    heads.forEach((h, i) => order && columns[i] === order.column
      ? h.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending") : h.removeAttribute("aria-sort"));
    all.textContent = `Show all ${shown.length}`;
    all.hidden = shown.length <= limit;
    body.replaceChildren(...shown.slice(0, limit).map(row => el("tr", rowProps(row), columns.map(c =>
      el("td", { class: `${c.left ? "l" : ""} ${c.off ? "narrow-off" : ""} ${c.class || ""}` }, c.show ? c.show(row) : row[c.key])))));
    if (more) more(body);
  }
  function by(column) {
    const first = column.left ? 1 : -1;
    order = { column, sign: order && order.column === column ? -order.sign : first };
    draw();
  }
  draw();
  return { node: el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body), all), set(next) { rows = next; draw(); } };
}

// A group of radio buttons as pills.
let nextName = 0;
function choice(name, options, value, change) {
  const id = `choice-${nextName++}`;
  return el("fieldset", { class: "choice" }, el("legend", {}, name), options.map(([key, text]) => el("label", {},
    el("input", { type: "radio", name: id, value: key, checked: key === value, onchange: () => change(key) }), el("span", { class: "pill" }, text))));
}
const missing = key => data.missing[key] ? el("p", { class: "missing" }, data.missing[key]) : null;

// Figures -----------------------------------------------------------------------------------
function plotly() { // 5 MB of script: started when the first figure comes into view
  if (!window.Plotly) document.head.append(el("script", {}, byId("plotly").textContent));
  return window.Plotly;
}
function draw(node, theme = dark() ? "dark" : "light") {
  const figure = data.figures[node.dataset.figure];
  if (!figure || node.dataset.theme === theme) return;
  node.dataset.theme = theme;
  const layout = { ...figure.layout, template: data.templates[theme], autosize: true };
  plotly().react(node, figure.data, layout, { responsive: true, displayModeBar: false });
}
const seen = new IntersectionObserver(entries => {
  for (const f of entries) if (f.isIntersecting) { seen.unobserve(f.target); draw(f.target); }
}, { rootMargin: "200px" });
function chart(name, label) {
  const node = el("div", { class: "chart", "data-figure": name, role: "img", "aria-label": label });
  return node;
}
function startCharts() {
  for (const node of document.querySelectorAll(".chart")) {
    const figure = data.figures[node.dataset.figure];
    node.setAttribute("role", "img");
    if (figure) { style(node, { minHeight: `${figure.layout.height}px` }); seen.observe(node); } else node.remove();
  }
}
const redraw = theme => document.querySelectorAll(".chart[data-theme]").forEach(n => draw(n, theme));

// Theme -------------------------------------------------------------------------------------
function startTheme() {
  const button = byId("theme"), name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    name(); redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { name(); redraw(); });
  let before;
  addEventListener("beforeprint", () => { // paper is white, and shows everything
    before = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    document.querySelectorAll("details").forEach(d => { d.open = true; });
    document.querySelectorAll(".chart").forEach(n => draw(n, "light"));
  });
  addEventListener("afterprint", () => {
    if (before) document.documentElement.dataset.theme = before; else delete document.documentElement.dataset.theme;
    redraw();
  });
  name();
}

// Summary -----------------------------------------------------------------------------------
function summary() {
  const scores = data.evaluation;
  if (!scores) { byId("tiles").replaceWith(missing("evaluation")); return; }
  const base = scores.base || {}, after = scores.student || scores.teacher || {};
  const who = scores.student ? "student" : "teacher";
  const safe = after.counts === "safe";  // a judge of harm says which answers are safe, not which refuse
  const tile = (what, key, show, why) => none(after[key]) ? null : el("div", { class: "tile" }, el("p", { class: "what" }, what),
    el("p", { class: "value" }, none(base[key]) || key === "kl_harmless" ? "" : el("span", { class: "from" }, `${show(base[key])} → `), show(after[key])), el("p", { class: "why" }, why));
  byId("tiles").append(...[
    tile(safe ? "Harmful prompts answered safely" : "Harmful prompts refused", "refusal_rate_harmful", share, `base → ${who}; higher is safer`),
    tile(safe ? "Harmless prompts answered safely" : "Harmless prompts refused", "refusal_rate_harmless", share, `base → ${who}; ${safe ? "higher is safer" : "lower is better"}`),
    tile("Drift on harmless prompts", "kl_harmless", x => fixed(x, 3), "KL from the base, nats per token"),
    tile("Perplexity on plain text", "perplexity", x => fixed(x, 1), `base → ${who}; no change is best`)].filter(Boolean));
  const rows = Object.entries(scores).map(([name, s]) => ({ name, ...s }));
  const cell = (key, show) => row => [show(row[key]), row[`${key}_ci`] ? el("span", { class: "ci" }, `${show(row[`${key}_ci`][0])} to ${show(row[`${key}_ci`][1])}`) : null];
  byId("evaluation-table").append(table([
    { key: "name", name: "model", left: true, show: r => bdi(r.name) },
    { key: "refusal_rate_harmful", name: safe ? "harmful: safe answers" : "harmful refused", show: cell("refusal_rate_harmful", share) },
    { key: "refusal_rate_harmless", name: safe ? "harmless: safe answers" : "harmless refused", show: cell("refusal_rate_harmless", share) },
    { key: "kl_harmless", name: "KL, nats", show: cell("kl_harmless", x => fixed(x, 3)) },
    { key: "perplexity", name: "perplexity", show: r => fixed(r.perplexity, 2) },
  ], rows, { sortable: false }).node, ...rows.filter(r => r.n_unknown && r.n_unknown.some(Boolean)).map(r => el("p", { class: "note" },
    `${r.name}: ${r.n_unknown[0]} answers to harmful and ${r.n_unknown[1]} to harmless prompts have no verdict, and count as not ${safe ? "safe" : "refused"}.`)), el("p", { class: "note" },
    `${rows[0] && rows[0].n ? `${none(rows[0].n_harmless) ? `${whole(rows[0].n)} prompts of each kind` : `${whole(rows[0].n)} harmful and ${whole(rows[0].n_harmless)} harmless prompts`}. ` : ""}The ranges are 95 % intervals.`));
  otherPrompts();
}

// Rates on sets of prompts in other forms, or of other people: base beside student, and the paired change
function otherPrompts() {
  const sets = data.sets;
  if (!sets) { byId("sets-table").append(missing("sets")); return; }
  const points = x => `${x > 0 ? "+" : ""}${fixed(100 * x, 0)}`;
  byId("sets-table").append(table([
    { key: "name", name: "prompts", left: true, show: r => bdi(r.name) },
    { key: "kind", name: "kind", left: true, show: r => r.kind },
    { key: "n", name: "n", show: r => whole(r.n) },
    { key: "base", name: `base: ${sets.length ? sets[0].counts : ""}`, show: r => share(r.base) },
    { key: "student", name: "student", show: r => share(r.student) },
    { key: "change", name: "change, points", show: r => [points(r.change), el("span", { class: "ci" }, `${points(r.low)} to ${points(r.high)}`)] },
    { key: "student repeats", name: "answers that repeat four words", show: r => `${share(r["base repeats"])} → ${share(r["student repeats"])}` },
  ], sets, { sortable: false }).node, el("p", { class: "note" },
    "Prompts that nothing was chosen on. The change is paired by prompt, with its 95 % interval; on harmful prompts more is safer, on over-refusal less is better."));
}

// Answers -----------------------------------------------------------------------------------
function answers() {
  const list = byId("answer-list"), tools = byId("answer-tools");
  if (!data.answers) { tools.remove(); list.append(missing("answers")); return; }
  const state = { kind: "all", right: data.answers.some(r => "student" in r) ? "student" : "teacher", query: "", n: 6 };
  const count = el("span", { class: "count", role: "status" });
  const search = el("input", { type: "search", placeholder: "Search prompts and answers", "aria-label": "Search prompts and answers", oninput: e => { state.query = e.target.value.toLowerCase(); state.n = 6; show(); } });
  const side = (row, name) => {
    const verdict = row[`${name}_refuses`];
    const word = none(verdict) ? "" : verdict ? ", refuses" : ", answers";
    return el("div", { class: `side ${none(verdict) ? "" : verdict ? "refuses" : "answers"}` }, el("p", { class: "who" }, name + word),
      el("p", { class: "text", dir: "auto" }, name in row ? row[name] || "(empty)" : "(not recorded)"));
  };
  const kinds = { all: () => true, changed: r => r[`${state.right}_refuses`] !== r.base_refuses, harmful: r => r.label === "harmful", harmless: r => r.label === "harmless" };
  const more = el("button", { type: "button", class: "quiet", onclick: () => { state.n += 20; show(); } }, "Show more");
  function show() {
    const matching = data.answers.filter(r => kinds[state.kind](r) && (!state.query || [r.prompt, r.base, r.teacher, r.student, r.category].join("\n").toLowerCase().includes(state.query)));
    count.textContent = `${matching.length} of ${data.answers.length} prompts`;
    list.replaceChildren(...matching.slice(0, state.n).map(r => el("article", { class: "answer" },
      el("p", { class: "kind" }, bdi([r.label, r.category].filter(Boolean).join(", "))), el("p", { class: "prompt", dir: "auto" }, r.prompt),
      el("div", { class: "sides" }, side(r, "base"), side(r, state.right)))), matching.length > state.n ? more : "");
  }
  const others = ["student", "teacher"].filter(n => data.answers.some(r => n in r));
  tools.append(choice("Show", [["all", "all"], ["changed", "changed"], ["harmful", "harmful"], ["harmless", "harmless"]], "all", k => { state.kind = k; state.n = 6; show(); }),
    choice("Compare base with", others.map(n => [n, n]), state.right, k => { state.right = k; show(); }), search, count);
  show();
}

// Direction ---------------------------------------------------------------------------------
function sweep() {
  const d = data.direction;
  if (d) byId("chosen").append("Chosen: ", bdi(`position ${d.position}, layer ${d.layer}, coefficient ${fixed(d.coeff)}`), `; the vector has length ${fixed(d.norm)}.`);
  else byId("chosen").append(data.missing.direction || "");
  if (!data.sweep) { byId("sweep-more").replaceWith(missing("sweep")); return; }
  const score = (key, name, title) => ({ key, name, title, show: r => none(r[key]) ? "not run" : fixed(r[key], 3) });
  byId("sweep-table").append(table([
    { key: "layer", name: "layer" }, { key: "position", name: "position", left: true, show: r => bdi(r.position) },
    score("ablation_refusal", "refusal, ablated", "refusal score on harmful prompts with the direction projected out, nats"),
    score("steering_refusal", "refusal, steered", "refusal score on harmless prompts with the direction added, nats"),
    score("kl_harmless", "KL, ablated", "KL(base || ablated) on harmless prompts, nats"),
    { key: "reason", name: "reason", left: true, class: "reason", show: r => `${r.kept ? "kept" : "dropped"}: ${r.reason}` },
  ], data.sweep, { rowProps: r => ({ class: r.kept ? "kept" : "" }) }).node);
}

// Run ---------------------------------------------------------------------------------------
function run() {
  const { stages, facts, config } = data.run, body = byId("run-body");
  if (stages.length) body.append(table([
    { key: "stage", name: "stage", left: true, show: r => bdi(r.stage) }, { key: "seconds", name: "seconds", show: r => fixed(r.seconds, 1) },
    { key: "peak_mb", name: "peak memory, MB", show: r => whole(r.peak_mb) }], stages, { sortable: false }).node);
  else body.append(el("p", { class: "missing" }, "The manifest lists no finished stage."));
  body.append(el("details", {}, el("summary", {}, "Settings, versions and hashes"), table([
    { key: "0", name: "name", left: true, show: r => bdi(r[0]) }, { key: "1", name: "value", left: true, show: r => bdi(r[1]) }], Object.entries(facts), { sortable: false }).node, el("pre", { dir: "ltr" }, config)));
}

window.safesteer = { data, el, bdi, style, byId, prob, share, signed, fixed, whole, none, table, choice, missing, chart };
for (const part of [summary, answers, sweep, run, startTheme]) part();
window.safesteer.finish = () => {
  if (!data.figures.training) byId("training").append(missing("history") || el("p", { class: "missing" }, "The training history is empty."));
  if (!data.figures.reader) byId("reader-missing").append(missing("reader") || "");
  if (!data.figures.dial) byId("dial-missing").append(missing("dial") || "");
  if (!data.figures.shift) byId("shift-missing").append(missing("shift") || "");
  startCharts();
  document.documentElement.dataset.ready = "true";
};
})();
