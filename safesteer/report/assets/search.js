// Builds the page of a search from the JSON in #data. Text only ever enters through textContent.
"use strict";
(() => {
const { data, byId, el, none, dark } = window.safesteerDom;
const share = x => none(x) ? "–" : `${(100 * x).toFixed(0)} %`;
const nats = x => none(x) ? "–" : x.toFixed(3);
const value = x => none(x) ? "–" : typeof x === "number" ? String(Number(x.toPrecision(4))) : String(x);
const setting = name => el("bdi", { class: "token", dir: "ltr" }, name);
const DONE = "complete";

// columns: [name, show(row), left]
function table(columns, rows, props = () => ({})) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, columns.map(([name, , left]) => el("th", { scope: "col", class: left ? "l" : "" }, name)))),
    el("tbody", {}, rows.map(row => el("tr", props(row), columns.map(([, show, left]) => el("td", { class: left ? "l" : "" }, show(row))))))));
}

// One trial ---------------------------------------------------------------------------------
function side(who, refuses, text) {
  return el("div", { class: `side ${refuses ? "refuses" : "answers"}` }, el("p", { class: "who" }, `${who}, ${refuses ? "refuses" : "answers"}`),
    el("p", { class: "text", dir: "auto" }, text || "(empty)"));
}
function show(number) {
  const trial = data.trials.find(t => t.trial === number), made = data.made[number], answers = data.answers[number];
  byId("trial-name").textContent = `Trial ${number}${trial.chosen ? ", chosen" : ""}`;
  byId("trial-facts").textContent = `Refuses ${share(trial.harmful)} of harmful prompts and ${share(trial.over_refusal)} of their twins; KL ${nats(trial.kl)} nats per token. `
    + `${trial.n_pairs} prompts of each kind${none(trial.seconds) ? "" : `, ${Math.round(trial.seconds)} s`}. ${trial.reason || ""}`;
  byId("settings").replaceChildren(table([["setting", r => setting(r[0]), true], ["trial", r => value(r[1])], ["recipe", r => value(data.start[r[0]])]],
    Object.entries(trial.settings)));
  byId("made").replaceChildren(...(made ? [el("h3", {}, "Direction"), el("p", { class: "token" }, made.direction), el("h3", {}, `S: ${made.tokens.length} tokens`),
    el("p", {}, made.tokens.slice(0, 40).map(text => el("bdi", { class: "chip token" }, text || "∅")))] : []));
  byId("answers").replaceChildren(...(answers || []).map(r => el("article", { class: "answer" }, el("p", { class: "kind" }, r.label),
    el("p", { class: "prompt", dir: "auto" }, r.prompt), el("div", { class: "sides" }, side("base", r.base_refuses, r.base), side("student", r.student_refuses, r.student)))));
  if (!answers) byId("answers").append(el("p", { class: "missing" }, "Answers are kept of complete trials."));
  for (const button of document.querySelectorAll("#trial-table button")) button.toggleAttribute("aria-current", button.textContent === String(number));
  document.documentElement.dataset.trial = String(number);
}

// Tables ------------------------------------------------------------------------------------
const open = t => none(t.harmful) ? String(t.trial) : el("button", { type: "button", class: "open", onclick: () => { show(t.trial); byId("trial").scrollIntoView(); } }, String(t.trial));
byId("trial-table").append(table([["trial", open, true], ["harmful refused", t => share(t.harmful)], ["twins refused", t => share(t.over_refusal)], ["KL, nats per token", t => nats(t.kl)],
  ["prompts", t => value(t.n_pairs)], ["layer", t => value(t.layer)], ["state", t => t.chosen ? "chosen" : t.on_front ? "on the front" : t.state, true], ["reason", t => t.reason, true],
  ...data.space.map(entry => [setting(entry.name), t => value(t.settings[entry.name])])], data.trials, t => ({ class: t.on_front ? "kept" : "" })));
const WHAT = { harmful: "harmful refused", over_refusal: "twins refused", kl: "KL, nats per token" };
const by = (r, key) => r.objective === "kl" ? nats(r[key]) : share(r[key]);
byId("luck-table").append(table([["rule", r => r.rule, true], ["trial", r => String(r.trial)], ["objective", r => WHAT[r.objective], true], ["on val", r => by(r, "on_val")],
  ["luck", r => by(r, "optimism")], ["corrected", r => [by(r, "corrected"), el("span", { class: "ci" }, `${by(r, "low")} to ${by(r, "high")}`)]]], data.luck));
byId("space-table").append(table([["setting", r => setting(r.name), true], ["from", r => value(r.low)], ["to", r => value(r.high)], ["why", r => r.reason, true]], data.space));

// Figure ------------------------------------------------------------------------------------
const node = byId("figure");
function draw() {
  byId("theme").textContent = dark() ? "Light" : "Dark";
  const layout = { ...data.figure.layout, template: data.templates[dark() ? "dark" : "light"], autosize: true };
  return window.Plotly.react(node, data.figure.data, layout, { responsive: true, displayModeBar: false });
}
document.head.append(el("script", {}, byId("plotly").textContent));
node.style.minHeight = `${data.figure.layout.height}px`;
byId("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; draw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
show((data.trials.find(t => t.chosen) || data.trials.find(t => t.state === DONE)).trial);
draw().then(() => {
  node.on("plotly_click", event => { const point = event.points.find(p => !none(p.customdata)); if (point) show(point.customdata); });
  document.documentElement.dataset.ready = "true";
});
})();
