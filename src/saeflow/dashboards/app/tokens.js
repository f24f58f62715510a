// Tokens as people read them: what is not seen is made visible, activations are shown by shade and by underline.
"use strict";

saeflow.tokens = (() => {
  const { el, number, listed } = saeflow;
  const LONGEST = 160; // characters of a token that are shown; all of them on hovering
  const NAMED = { "\n": "↵", "\t": "⇥" };
  // controls, marks of direction, separators, joiners, private use and lone halves of pairs: nothing of them is seen
  const UNSEEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\u00a0\ufe00-\ufe0f]/gu;

  const code = c => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  const visible = text => text.replace(UNSEEN, c => NAMED[c] || code(c));

  // As one of a list: spaces are shown too.
  const alone = text => (text === "" ? "⟨empty⟩" : visible(text).replace(/ /g, "␣"));

  function shortened(text) {
    const signs = [...text];
    return signs.length > LONGEST ? `${signs.slice(0, LONGEST).join("")}…` : text;
  }

  function chip(text) {
    const shown = alone(text);
    return el("bdi", { class: "token", title: shown.length > 40 ? shown : null }, shortened(shown));
  }

  // A cell for the text around the largest activation of a latent, of which the end is seen before it.
  const snippet = () =>
    el("span", { class: "snippet" }, el("span", { class: "before" }, el("bdi")), el("b", { class: "peak" }), el("bdi"));

  // Fills it with row `i` of a table's snippets.
  function fillSnippet(cell, data, i) {
    const place = data.snippet_of[i],
      there = data.snippet_of[i + 1] > place,
      at = there ? data.snippet_at[place] : 0;
    const texts = there ? Array.from(listed(data.snippet, place), t => shortened(visible(data.texts[t]))) : [];
    const [before, peak, after] = cell.children;
    before.firstChild.textContent = texts.slice(0, at).join("");
    peak.textContent = texts[at] ?? "";
    after.textContent = texts.slice(at + 1).join("");
  }

  // A line of text: `texts` of its tokens, `values` of these, and which of them the line is about.
  function line(texts, values, at, largest) {
    const spans = texts.map((text, i) => {
      const value = values[i],
        shown = shortened(visible(text));
      if (!value) return el("bdi", { class: "t" }, shown);
      const strength = Math.min(1, Math.abs(value) / (largest || 1));
      const level = Math.max(1, Math.ceil(4 * strength));
      const attributes = {
        class: `t on l${level}${value < 0 ? " below" : ""}${i === at ? " at" : ""}`,
        style: `--s:${(0.12 + 0.88 * strength).toFixed(2)}`,
        "data-value": number(value, 4),
        "data-token": alone(text),
      };
      return el("bdi", attributes, shown);
    });
    return el("span", { class: "text" }, spans);
  }

  // What shades and underlines mean.
  function legend(largest, below) {
    const steps = [0.25, 0.5, 0.75, 1].map((strength, i) =>
      el(
        "bdi",
        { class: `t on l${i + 1}`, style: `--s:${(0.12 + 0.88 * strength).toFixed(2)}` },
        `${i ? number(largest * (strength - 0.25)) : "0"} – ${number(largest * strength)}`,
      ),
    );
    const cold = el("bdi", { class: "t on below l2", style: "--s:.5" }, "below 0");
    return el(
      "p",
      { class: "legend" },
      "activation: ",
      steps,
      below ? cold : null,
      el(
        "span",
        {},
        " ",
        el("bdi", { class: "t on at l4", style: "--s:1" }, "framed"),
        " the one that the line is about. Point at a token, or tap it, to read its value.",
      ),
    );
  }

  // A small label beside the token that the pointer is at, or that was tapped.
  function hints() {
    const hint = el("div", { id: "hint", role: "status", hidden: true });
    document.body.append(hint);
    const show = event => {
      const token = event.target.closest ? event.target.closest("[data-value]") : null;
      hint.hidden = !token;
      if (!token) return;
      hint.replaceChildren(el("bdi", {}, shortened(token.dataset.token)), ` ${token.dataset.value}`);
      const box = token.getBoundingClientRect();
      hint.style.top = `${Math.max(4, box.top - hint.offsetHeight - 4)}px`;
      hint.style.left = `${Math.max(4, Math.min(box.left, innerWidth - hint.offsetWidth - 4))}px`;
    };
    document.addEventListener("pointerover", show);
    document.addEventListener("click", show);
    document.addEventListener(
      "scroll",
      () => {
        hint.hidden = true;
      },
      { capture: true, passive: true },
    );
  }

  return { visible, alone, chip, snippet, fillSnippet, line, legend, hints };
})();
