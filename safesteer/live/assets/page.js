// The local page: asks the server that it came from, with the token of its address.
(() => {
const held = document.getElementById("saved"), saved = held ? JSON.parse(held.textContent) : null;
const token = new URLSearchParams(location.search).get("token");
async function ask(path, body, as = "json") {
  const options = { headers: { "x-safesteer-token": token, "content-type": "application/json" } };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  let reply;
  try { reply = await fetch(path, options); } catch { throw new Error("The server does not answer: is `safesteer explore` still running?"); }
  if (!reply.ok) throw new Error((await reply.json()).error);
  return reply[as]();
}
function answers(view, onEvent) {
  const aborted = new AbortController();
  (async () => {
    let reply;
    try { reply = await fetch("answers", { method: "POST", body: JSON.stringify(view), signal: aborted.signal, headers: { "x-safesteer-token": token, "content-type": "application/json" } }); }
    catch { if (!aborted.signal.aborted) onEvent({ error: "The server does not answer: is `safesteer explore` still running?" }); return; }
    if (!reply.ok) { onEvent(await reply.json()); return; }
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", ended = false;
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) { const event = JSON.parse(part.slice(6)); ended = ended || event.end || event.error; onEvent(event); }
      }
      if (!ended) onEvent({ error: "The server stopped in the middle of the answer." });
    } catch { if (!aborted.signal.aborted) onEvent({ error: "The server stopped in the middle of the answer." }); }
  })();
  return () => aborted.abort();
}
const source = saved ? null : { facts: () => ask("facts"), prompt: p => ask("prompt", { prompt: p }), answers, direction: view => ask("direction", view, "blob"), page: state => ask("page", state, "blob") };
mountLens(document.getElementById("lens"), source, saved);
})();
