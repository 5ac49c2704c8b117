// The widget: asks the notebook's kernel, by messages with a number.
export default {
  render({ model, el }) {
    let next = 0;
    const waiting = new Map();
    const heard = (message, buffers) => { const take = waiting.get(message.id); if (take) take(message, buffers); };
    model.on("msg:custom", heard);
    const send = (call, body) => { next += 1; model.send({ id: next, call, body }); return next; };
    const ask = (call, body, type) => new Promise((resolve, reject) => {
      const id = send(call, body);
      waiting.set(id, (message, buffers) => { waiting.delete(id); if (message.error) reject(new Error(message.error)); else resolve(type ? new Blob([buffers[0]], { type }) : message.value); });
    });
    const answers = (view, onEvent) => {
      const id = send("answers", view);
      waiting.set(id, message => { if (message.error) onEvent({ error: message.error }); else onEvent(message.event); if (message.error || message.event.end) waiting.delete(id); });
      return () => { waiting.delete(id); send("stop"); };
    };
    const root = document.createElement("div");
    el.append(root);
    const end = mountLens(root, { facts: () => ask("facts"), prompt: p => ask("prompt", p), answers, direction: view => ask("direction", view, "application/octet-stream"), page: state => ask("page", state, "text/html") }, null);
    return () => { end(); model.off("msg:custom", heard); };
  },
};
