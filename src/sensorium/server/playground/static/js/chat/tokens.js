// The tokens of an answer with their probabilities: by hover, touch or arrow keys.

import { h } from "../lib/dom.js";

/** Return tokens as they are kept, from `logprobs.content` of a chunk. */
export function tokensOf(content) {
  return (content ?? []).map(({ token, logprob, top_logprobs: top }) => ({
    t: token,
    p: Math.exp(logprob),
    top: (top ?? []).map((other) => [other.token, Math.exp(other.logprob)]),
  }));
}

/** Return the view of an answer's tokens. Arrow keys walk through them; one at a time is told. */
export function tokensView(tokens) {
  const told = h("div", { class: "token-told", role: "status" });
  const spans = tokens.map((token, index) => {
    const span = h("span", { class: "token", data: { index } }, token.t);
    span.style.setProperty("--doubt", (1 - Math.min(1, token.p)).toFixed(3));
    return span;
  });
  let current = -1;
  const show = (index) => {
    spans[current]?.classList.remove("is-current");
    current = index;
    spans[current].classList.add("is-current");
    told.replaceChildren(...telling(tokens[current]));
  };
  const text = h("div", {
    class: "tokens", tabindex: "0", role: "group",
    "aria-label": "Tokens with their probabilities; arrow keys walk through them",
    onpointerover: (event) => event.target.dataset.index && show(Number(event.target.dataset.index)),
    onclick: (event) => event.target.dataset.index && show(Number(event.target.dataset.index)),
    onfocus: () => current < 0 && tokens.length && show(0),
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length }[event.key];
      if (!step || !tokens.length) return;
      event.preventDefault();
      show(Math.min(tokens.length - 1, Math.max(0, current + step)));
    },
  }, spans);
  return h("div", { class: "tokens-view" }, text, told);
}

function telling({ t, p, top }) {
  const rows = top.some(([other]) => other === t) ? top : [[t, p], ...top];
  return [h("ol", { class: "alternatives" }, rows.map(([token, share]) => {
    const bar = h("i", { "aria-hidden": "true" });
    bar.style.setProperty("--share", share.toFixed(4));
    return h("li", { class: token === t ? "is-chosen" : null }, h("code", {}, visible(token)), bar,
      h("span", {}, `${(100 * share).toFixed(share > 0.0995 ? 0 : 2)} %`));
  }))];
}

/** Return a token with its blanks made visible. */
function visible(token) {
  return token.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}
