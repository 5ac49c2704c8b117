// The sections about tokens: the table with its stories, the token view, coverage and stability.
"use strict";
(() => {
const { data, el, bdi, style, byId, prob, share, signed, fixed, whole, none, table, choice, missing, chart } = window.safesteer;
const token = text => bdi(text, { class: "token", dir: "ltr" });

// Safety tokens -----------------------------------------------------------------------------
function places(rows) {
  return el("ol", { class: "places" }, rows.map(p => el("li", {},
    el("div", { class: "context" }, bdi(p.prompt), el("br"), el("span", { class: "answered" }, "→ ", bdi(p.answer_so_far || "(start of the answer)"), " ", el("mark", {}, bdi(p.token, { dir: "ltr" })))),
    el("div", { class: "facts" }, `${p.step ? `step ${p.step}: ` : ""}base ${prob(p.p_base)}${p.rank_base ? ` (rank ${whole(p.rank_base)})` : ""}, steered ${prob(p.p_steered)}${p.rank_steered ? ` (rank ${whole(p.rank_steered)})` : ""}`))));
}
function rails(rows) { // signed bars on one scale, zero where the smallest value needs it
  rows = rows.filter(r => r[1] !== null);
  const values = rows.map(r => r[1]), low = Math.min(0, ...values), high = Math.max(0, ...values), span = high - low || 1;
  return el("div", { class: "bars" }, rows.map(([name, value, colour]) => {
    const from = (Math.min(0, value) - low) / span, width = Math.abs(value) / span;
    const bar = style(el("i"), { left: `${100 * from}%`, width: `${100 * width}%`, background: `rgb(var(--${colour}))` });
    return [el("span", {}, name), el("span", { class: "rail" }, bar), el("span", {}, signed(value))];
  }));
}
function story(t) {
  const most = Math.max(1, ...t.votes_by_position), s = t.story;
  const block = (title, ...children) => el("div", {}, el("h3", {}, title), ...children);
  const wide = node => { node.className = "wide"; return node; };
  const steps = el("div", { class: "steps", role: "img", "aria-label": `Votes by step: ${t.votes_by_position.join(", ")}` }, t.votes_by_position.map((n, i) =>
    el("div", {}, String(n), style(el("i"), { height: `${(62 * n) / most}%` }), String(i + 1))));
  const parts = [block("Votes by step of the answer", steps)];
  if (!s) return el("div", { class: "story" }, parts, wide(block("Where steering raised it most", places(t.contexts.map(c => ({ ...c, token: t.text }))))), missing("attribution"));
  const sentence = s.direct === null ? "The direction is not added, so it has no part of its own." : s.direct <= 0 ? "The direction itself does not raise this token." : s.change <= 0 ? "The direction itself raises this token, but later layers lower it again." :
    s.direct / s.change > 0.5 ? "Most of the rise comes from the direction itself." : "Most of the rise comes from later layers, which respond to the direction.";
  parts.push(
    block("Change of its logit by steering, nats", rails([["direction itself", s.direct, "raise"], ["later layers", s.later_layers, "violet"], ["total change", s.change, "teal"]]),
      el("p", { class: "note" }, `${sentence} Measured at the last prompt position, relative to the mean over the vocabulary.`)),
    block("Which positions voted for it", s.votes ? el("p", {}, `Of the ${whole(s.n_positions)} positions analysed here, ${whole(s.votes)} voted for it, on ${s.n_prompts_voting} of ${s.n_prompts} prompts. Steering raises its mean probability there from ${prob(s.p_base)} to ${prob(s.p_steered)}; its median rank goes from ${whole(s.rank_base)} to ${whole(s.rank_steered)}.`) : el("p", {}, `No votes among the ${whole(s.n_positions)} positions analysed here, which are fewer than selection used.`)),
    block("Group", el("p", {}, `${t.group} (${s.reason})`), el("h3", {}, "Nearest tokens in the unembedding, by cosine"), el("div", {}, s.neighbours.map(([text, cosine]) => el("span", { class: "chip" }, token(text), ` ${fixed(cosine)}`)))));
  if (s.places.length) parts.push(wide(block("Where steering raised it most", places(s.places.map(p => ({ ...p, token: t.text }))))));
  if (s.votes_by_prompt.length) parts.push(wide(block("Votes per prompt", el("ul", { class: "prompts" }, s.votes_by_prompt.map(([p, n]) => el("li", {}, el("span", { dir: "auto", title: p }, p), el("span", {}, whole(n))))))));
  return el("div", { class: "story" }, parts);
}
function tokens() {
  const tools = byId("token-tools"), place = byId("token-table");
  if (!data.tokens) { tools.remove(); byId("votes-more").remove(); place.append(missing("tokens")); return; }
  const rows = data.tokens.rows, open = new Set(), state = { query: "", group: "all" };
  const count = el("span", { class: "count", role: "status" });
  const groups = [...new Set(rows.map(r => r.group).filter(Boolean))];
  const toggle = row => { open.has(row.id) ? open.delete(row.id) : open.add(row.id); show(row.id); };
  const columns = [
    { key: "text", name: "token", left: true, show: r => el("button", { type: "button", class: "open", "data-token": r.id, "aria-expanded": String(open.has(r.id)) }, token(r.text)) },
    { key: "number", name: "#", title: "order of selection", off: true },
    { key: "votes", name: "votes", title: "number of positions that voted for it", show: r => whole(r.votes) },
    { key: "lift", name: "lift, nats", title: "mean of log p(steered) − log p(base)", show: r => signed(r.lift) },
    { key: "p_base", name: "p base", title: "mean probability under the base model", off: true, show: r => prob(r.p_base) },
    { key: "p_steered", name: "p steered", title: "mean probability under the steered model", off: true, show: r => prob(r.p_steered) }];
  if (groups.length) columns.splice(2, 0, { key: "group", name: "group", left: true, off: true });
  const made = table(columns, rows, {
    limit: 20,
    rowProps: r => ({ class: "main", "data-row": r.id, onclick: () => toggle(r) }),
    more: body => { for (const tr of [...body.children]) { const r = rows.find(x => String(x.id) === tr.dataset.row); if (open.has(r.id)) tr.after(el("tr", { class: "detail" }, el("td", { colspan: columns.length }, story(r)))); } } });
  made.node.classList.add("token-table");
  function show(focus) {
    const shown = rows.filter(r => (state.group === "all" || r.group === state.group) && (!state.query || r.text.replaceAll("␣", " ").toLowerCase().includes(state.query)));
    count.textContent = `${shown.length} of ${rows.length} tokens`;
    made.set(shown);
    if (focus !== undefined) { const b = place.querySelector(`[data-token="${focus}"]`); if (b) b.focus({ preventScroll: true }); }
  }
  const search = el("input", { type: "search", placeholder: "Search tokens", "aria-label": "Search tokens", oninput: e => { state.query = e.target.value.toLowerCase(); show(); } });
  if (groups.length) tools.append(choice("Group", [["all", "all"], ...groups.map(g => [g, g])], "all", g => { state.group = g; show(); }));
  tools.append(search, count);
  place.append(made.node, el("p", { class: "note" }, `Means over ${whole(data.tokens.n_positions)} positions of answers sampled from the steered model.`));
  show();
}

// Token view --------------------------------------------------------------------------------
const MODELS = ["base", "teacher", "student"];
function unpack([id, p, rank, lift, kl, klShare, inS, tops], vocabulary) {
  const alternatives = tops.map(flat => flat.filter((_, i) => i % 2 === 0).map((alt, i) => ({ id: alt, text: vocabulary[alt], p: flat[2 * i + 1] })));
  return { id, text: vocabulary[id], p, rank, lift, kl, share: klShare, inS: !!inS, tops: alternatives };
}
function view() {
  const body = byId("view-body");
  if (!data.traces) { body.append(missing("attribution") || el("p", { class: "missing" }, "This run has no answers to read token by token.")); return; }
  const { rows, vocabulary } = data.traces;
  const state = { at: 0, colour: "lift", model: 1, token: 0 };
  let read = [], marks = [];
  const flow = el("div", { class: "flow", role: "group", "aria-label": "Answer, token by token", dir: "ltr" });
  const prompt = el("p", { class: "prompt", dir: "auto" }), scale = el("div", { class: "scale" }), reading = el("div", { class: "reading" });
  const lift = t => state.model === 1 ? t.lift : state.model === 2 && t.p[2] ? Math.log(Math.max(t.p[2], 1e-30) / Math.max(t.p[0], 1e-30)) : 0;
  const most = () => Math.max(0.5, ...read.map(t => t.kl));
  const colours = {
    lift: { name: "lift", of: t => [lift(t) >= 0 ? "raise" : "lower", Math.min(Math.abs(lift(t)) / 4, 1)], low: "−4 nats", high: "+4 nats", bar: "linear-gradient(90deg, rgba(var(--lower), .7), transparent, rgba(var(--raise), .7))" },
    kl: { name: "KL", of: t => ["violet", t.kl / most()], low: "0", high: () => `${fixed(most())} nats`, bar: "linear-gradient(90deg, transparent, rgba(var(--violet), .7))" },
    share: { name: "KL share on S", of: t => ["violet", t.share], low: "0 %", high: "100 %", bar: "linear-gradient(90deg, transparent, rgba(var(--violet), .7))" },
    s: { name: "in S", of: t => ["teal", t.inS ? 0.8 : 0], low: "not in S", high: "in S", bar: "linear-gradient(90deg, transparent 50%, rgba(var(--teal), .6) 50%)" },
    p: { name: "probability", of: t => ["teal", t.p[state.model] || 0], low: "0 %", high: "100 %", bar: "linear-gradient(90deg, transparent, rgba(var(--teal), .7))" } };
  function paint() {
    const colour = colours[state.colour];
    marks.forEach((m, i) => { const [hue, strength] = colour.of(read[i]); style(m, { backgroundColor: `rgba(var(--${hue}), ${(0.7 * strength).toFixed(3)})` }); });
    const high = typeof colour.high === "function" ? colour.high() : colour.high;
    const model = MODELS[state.model];
    const note = state.colour === "lift" ? (state.model === 0 ? "Lift compares with the base model: select teacher or student." : `${model} compared with base; underlined: in S`) : state.colour === "p" ? `${model}; underlined: in S` : "teacher compared with base; underlined: in S";
    scale.replaceChildren(colour.low, style(el("i"), { background: colour.bar }), high, el("span", {}, note));
  }
  function tell() {
    const t = read[state.token];
    marks.forEach((m, i) => { m.classList.toggle("on", i === state.token); m.tabIndex = i === state.token ? 0 : -1; });
    const fact = (name, value) => [el("dt", {}, name), el("dd", {}, value)];
    const facts = el("div", {}, el("h3", {}, `Token ${state.token + 1} of ${read.length}`), el("p", { class: "big" }, token(t.text)), el("dl", {},
      fact("lift, teacher", `${signed(t.lift)} nats`), fact("KL at this position", `${fixed(t.kl, 3)} nats`), fact("share of KL on S", share(t.share)), fact("in S", t.inS ? "yes" : "no"), fact("token id", String(t.id))));
    const tops = el("div", { class: "tops" }, MODELS.map((name, m) => none(t.p[m]) ? null : el("div", { class: m === state.model ? "chosen" : "", "data-model": name },
      el("h3", {}, name), el("p", { class: "actual" }, el("b", { class: "p" }, prob(t.p[m])), `, rank ${whole(t.rank[m])}`),
      el("ol", {}, t.tops[m].map(a => el("li", { class: a.id === t.id ? "this" : "" }, token(a.text), el("span", {}, prob(a.p))))))));
    reading.dataset.token = state.token;
    reading.replaceChildren(facts, tops);
  }
  function choose(i, focus) { state.token = Math.max(0, Math.min(read.length - 1, i)); tell(); if (focus) marks[state.token].focus(); }
  function open(i) {
    state.at = i; state.token = 0;
    const row = rows[i];
    read = row.tokens.map(t => unpack(t, vocabulary));
    prompt.replaceChildren(`${row.author || "answer"}${row.label ? `, ${row.label} prompt` : ""}: `, bdi(row.prompt));
    marks = read.map((t, n) => {
      const shown = t.text.replaceAll("␣", " ");
      const label = `${t.text}, ${MODELS.filter((_, m) => !none(t.p[m])).map((name, m) => `${name} ${prob(t.p[m])}`).join(", ")}`;
      return el("span", { class: `tok ${t.inS ? "in-s" : ""}`, role: "button", tabindex: "-1", "data-i": n, "data-id": t.id, "aria-label": label, dir: "auto",
        onmouseenter: () => choose(n), onfocus: () => choose(n), onclick: () => choose(n, true) }, shown);
    });
    // A break after the sign of a line break, outside the mark: the answer keeps its lines.
    flow.replaceChildren(...marks.flatMap((m, n) => read[n].text.includes("⏎") ? [m, el("br")] : [m, el("wbr")]));
    paint(); tell();
  }
  flow.addEventListener("keydown", e => {
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8, Home: -1e6, End: 1e6 }[e.key];
    if (move) { e.preventDefault(); choose(state.token + move, true); }
  });
  const names = rows.map((r, i) => el("option", { value: i }, `${r.author || "answer"}: ${r.prompt.length > 90 ? `${r.prompt.slice(0, 90)}…` : r.prompt}`));
  const pick = el("select", { class: "long", id: "trace", "aria-label": "Answer", onchange: e => open(Number(e.target.value)) }, names);
  const models = MODELS.filter((_, m) => rows.some(r => r.tokens.some(t => !none(t[1][m]))));
  body.append(el("div", { class: "tools" }, pick, choice("Colour by", Object.entries(colours).map(([key, c]) => [key, c.name]), "lift", k => { state.colour = k; paint(); }),
    choice("Model", models.map(m => [String(MODELS.indexOf(m)), m]), "1", m => { state.model = Number(m); paint(); tell(); })), el("div", { class: "reader" }, prompt, flow, scale), reading);
  open(0);
}

// Coverage and stability --------------------------------------------------------------------
function coverage() {
  const body = byId("coverage-body"), c = data.coverage;
  if (!c) { body.append(missing("attribution")); return; }
  const kl = name => ({ name, key: name, sort: r => r[name] && r[name].kl_share, show: r => share(r[name] && r[name].kl_share) });
  body.append(el("p", { class: "lead" }, `Share of KL(teacher || base) that lies on the ${c.k} tokens of S, compared with other sets of the same size.`),
    table([{ key: "name", name: "text", left: true, show: r => bdi(r.name) }, { ...kl("S"), name: "S" }, { ...kl("best possible"), name: "best possible" }, { ...kl("random candidates"), name: "random candidates" },
      { ...kl("matched in base probability"), name: "matched", off: true }, { ...kl("random"), off: true }, { name: "p of S, teacher", title: "mean total probability of the tokens of S", sort: r => r.S.mass_teacher, show: r => share(r.S.mass_teacher), off: true }, { name: "p of S, base", title: "mean total probability of the tokens of S", sort: r => r.S.mass_base, show: r => share(r.S.mass_base), off: true },
      { key: "kl", name: "KL, nats", title: "mean KL(teacher || base) per position", show: r => fixed(r.kl) }], c.texts).node);
  const figure = (title, name) => data.figures[name] ? el("div", {}, el("h3", {}, title), chart(name, title)) : null;
  body.append(el("div", { class: "charts" }, c.texts.map((text, i) => figure(`Coverage: ${text.name}, ${whole(text.n_positions)} positions`, `coverage-${i}`)),
    figure("Coverage of S by step of the answer", "steps")),
    figure(`Stability: are the same tokens selected again from part of the samples (${c.n_prompts} prompts)?`, "stability"));
  if (c.answer_shares.length) body.append(el("h3", {}, "Answers that contain a token of S"), table([
    { key: "answers", name: "answers", left: true, show: r => bdi(r.answers) }, { key: "share", name: "with a token of S", show: r => [share(r.share), el("span", { class: "ci" }, `${share(r.low)} to ${share(r.high)}`)] },
    { key: "share_matched", name: "matched sets", show: r => share(r.share_matched) }, { key: "n", name: "answers judged", show: r => whole(r.n) }], c.answer_shares).node);
}

for (const part of [tokens, view, coverage]) part();
window.safesteer.finish();
})();
