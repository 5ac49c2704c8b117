// What the scripts of a page share: its JSON, nodes from plain text, and which theme is shown.
"use strict";
window.safesteerDom = (() => {
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);

// el("p", {class: "note"}, "text", child): strings become text nodes, never markup.
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(c => c !== null && c !== undefined));
  return node;
}
const none = x => x === null || x === undefined;
const dark = () => {
  const set = document.documentElement.dataset.theme;
  return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
return { data, byId, el, none, dark };
})();
