// The dashboard of a dictionary: its table of latents, and beside it the overview or the page of one latent.
"use strict";

(async () => {
  const { el, number, share, listed, tokens, latent, shell } = saeflow;
  const DENSE = 0.1; // of tokens
  const page = document.querySelector("#page"),
    main = document.querySelector("main");
  const query = document.querySelector("#query"),
    where = document.querySelector("#where"),
    show = document.querySelector("#show");
  const found = document.querySelector("#found");

  const keys = [
    ["j or ↓", "next latent"],
    ["k or ↑", "the one before"],
    ["/", "search"],
    ["o", "overview"],
    ["l", "the table"],
    ["c", "copy the address"],
  ];
  const bar = shell.start(keys);
  tokens.hints();
  let overview, data;
  try {
    [overview, data] = await Promise.all([saeflow.load("data/overview.js"), saeflow.load("data/table.js")]);
  } catch (error) {
    shell.complain(page, error);
    return;
  }
  const n = overview.index.n_latents;
  const frequency = Float64Array.from(data.fired, count => count / overview.index.n_tokens);
  const counts = { live: 0, dead: 0, dense: 0 };
  for (const f of frequency) {
    counts[f > 0 ? "live" : "dead"]++;
    counts.dense += f > DENSE;
  }
  document.title = overview.name.title;
  document.querySelector("#title").textContent = overview.name.title;

  // ------------------------------------------------------------------ the table
  const first = (column, i) =>
    column.offsets[i] < column.offsets[i + 1] ? data.texts[column.values[column.offsets[i]]] : "";
  const label = i => (data.label[i] < data.labels.length ? data.labels[data.label[i]] : "");
  const labelled = data.labels.length > 0;

  const columns = [
    { id: "latent", name: "latent", width: "5rem", cell: i => String(i), by: i => i, narrow: true },
    {
      id: "frequency",
      name: "fires",
      title: "share of tokens on which it fires",
      width: "6rem",
      cell: i => (frequency[i] ? share(frequency[i]) : "never"),
      by: i => frequency[i],
      narrow: true,
    },
    {
      id: "max",
      name: "largest",
      title: "largest activation",
      width: "5.2rem",
      cell: i => number(data.max[i]),
      by: i => data.max[i],
    },
    {
      id: "effect",
      name: "effect",
      title: "mean rise in loss where it is ablated, nats",
      width: "5.4rem",
      cell: i => number(data.effect[i], 2),
      by: i => data.effect[i],
    },
    {
      id: "token",
      name: "token",
      title: "on which it fires most often",
      width: "6rem",
      text: true,
      spare: true,
      cell: i => tokens.alone(first(data.tokens, i)).replace("⟨empty⟩", ""),
      by: i => first(data.tokens, i),
    },
    {
      id: "logit",
      name: "raises",
      title: "the token whose logit it raises most; sorted by how much",
      width: "6rem",
      left: true,
      spare: true,
      cell: i => tokens.alone(first(data.raised, i)).replace("⟨empty⟩", ""),
      by: i => data.raised_by[i],
    },
    {
      id: "text",
      name: "strongest on",
      title: "the text around its largest activation",
      width: "auto",
      text: true,
      blank: tokens.snippet,
      put: (cell, i) => tokens.fillSnippet(cell, data, i),
      by: i => snippetText(i),
      narrow: true,
    },
  ];
  if (labelled)
    columns.splice(1, 0, {
      id: "label",
      name: "label",
      title: "what it follows, by the model's algorithm",
      width: "8rem",
      text: true,
      narrow: true,
      cell: i => tokens.visible(label(i)),
      by: label,
    });
  const snippetText = i =>
    data.snippet_of[i + 1] === data.snippet_of[i]
      ? ""
      : [...listed(data.snippet, data.snippet_of[i])].map(t => data.texts[t]).join("");

  const grid = new saeflow.Grid({
    columns,
    label: "Latents",
    open: i => state.set({ latent: i, list: "" }, true),
    href: i => to({ latent: i, list: "" }),
    sorted: id => state.set({ sort: turned(id) }),
  });
  grid.count = n;
  document.querySelector("#list").append(grid.box);

  // Of a column that is sorted by already the reverse; else numbers from the largest, texts and latents from the first.
  function turned(id) {
    const now = state.get().sort,
      upwards = columns.some(c => c.id === id && (c.text || id === "latent"));
    return now === id || (now !== `-${id}` && !upwards) ? `-${id}` : id;
  }

  const to = changes => saeflow.address({ ...state.get(), ...changes });
  const among = () => `../../comparisons/${encodeURIComponent(state.get().among)}/index.html`;
  document.querySelector("#to-overview").addEventListener("click", event => {
    event.preventDefault();
    state.set({ latent: "", list: "" }, true);
  });
  document.querySelector("#to-list").addEventListener("click", event => {
    event.preventDefault();
    state.set({ latent: "", list: 1 }, true);
  });

  // ------------------------------------------------------------------ search
  // Latents that a search finds, and that are of those shown.
  function searched({ q = "", in: place = "", show: some = "" }) {
    const text = q.toLowerCase();
    const hit = text
      ? Uint8Array.from(data.texts, t =>
          t.toLowerCase().includes(text) || tokens.alone(t).toLowerCase().includes(text) ? 1 : 0,
        )
      : null;
    const inLabel = data.labels.map(l => l.toLowerCase().includes(text));
    const among = column => i => {
      for (const t of listed(column, i)) if (hit[t]) return true;
      return false;
    };
    const tests = {
      token: among(data.tokens),
      raised: among(data.raised),
      lowered: among(data.lowered),
      label: i => Boolean(inLabel[data.label[i]]),
      latent: i => String(i) === text.trim(),
    };
    const wanted = place ? [tests[place]].filter(Boolean) : Object.values(tests);
    const kept =
      {
        live: i => frequency[i] > 0,
        dead: i => frequency[i] === 0,
        dense: i => frequency[i] > DENSE,
        labelled: i => label(i) !== "",
      }[some] || (() => true);
    const rows = [];
    for (let i = 0; i < n; i++) if (kept(i) && (!hit || wanted.some(test => test(i)))) rows.push(i);
    return rows;
  }

  const typed = () => state.set({ q: query.value, in: where.value, show: show.value });
  let typing = null;
  query.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(typed, 80);
  });
  where.addEventListener("change", typed);
  show.addEventListener("change", typed);
  document.querySelector("#search").addEventListener("submit", event => {
    event.preventDefault();
    clearTimeout(typing);
    typed();
    if (grid.order.length) state.set({ latent: grid.order[0], list: "" }, true);
  });

  // ------------------------------------------------------------------ what is shown
  let asked = 0; // of several pages that are asked for, the last is shown

  async function draw(now, before) {
    if (!grid.order.length || ["q", "in", "show", "sort"].some(key => now[key] !== before[key])) {
      if (document.activeElement !== query) query.value = now.q || "";
      where.value = now.in || "";
      show.value = now.show || "";
      const rows = searched(now);
      grid.sort(rows, now.sort || "latent");
      grid.box.scrollTop = 0;
      found.textContent = `${number(rows.length)} of ${number(n)}`;
    }
    const chosen = /^\d+$/.test(now.latent || "") ? Number(now.latent) : -1;
    main.dataset.view = chosen >= 0 || now.latent ? "latent" : now.list ? "list" : "overview";
    for (const [id, view] of [
      ["#to-overview", "overview"],
      ["#to-list", "list"],
    ]) {
      const link = document.querySelector(id);
      if (main.dataset.view === view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const compare = document.querySelector("#to-comparison");
    compare.hidden = !now.among;
    if (now.among) compare.href = among();
    grid.choose(chosen);
    if (String(now.latent) === String(before.latent) && page.childElementCount) return;
    const turn = ++asked;
    try {
      const content = now.latent
        ? await pageOf(chosen, now.latent)
        : saeflow.overview.page(overview, frequency, counts, DENSE, changes =>
            to({ q: "", latent: "", list: 1, ...changes }),
          );
      if (turn !== asked) return;
      page.replaceChildren(...content.flat(Infinity).filter(Boolean));
    } catch (error) {
      if (turn === asked) shell.complain(page, error);
    }
    page.scrollTop = 0;
  }

  async function pageOf(i, named) {
    if (i < 0 || i >= n) throw new Error(`There is no latent ${named}: this dictionary has 0 to ${n - 1}.`);
    const partner = overview.partner && (other => `../${overview.partner}/index.html#latent=${other}`);
    const links = { href: other => to({ latent: other }), partner };
    const copy = el("button", { type: "button", id: "copy", onclick: copied }, "Copy address");
    const step = (by, text) => el("button", { type: "button", onclick: () => go(by) }, text);
    return [
      el(
        "div",
        { class: "head" },
        el("h2", {}, `Latent ${i}`),
        el(
          "div",
          { class: "tools" },
          step(-1, "← before"),
          step(1, "next →"),
          copy,
          state.get().among
            ? el(
                "a",
                { class: "button", href: `${among()}${saeflow.address({ one: folder(), latent: i })}` },
                "Compare",
              )
            : null,
        ),
      ),
      ...latent.page(overview, i, await latent.read("", overview, i), links),
    ];
  }

  const folder = () => decodeURIComponent(location.pathname.split("/").at(-2));

  async function copied(event) {
    const button = event ? event.currentTarget : document.querySelector("#copy");
    const text = new URL(saeflow.address({ latent: state.get().latent }), location.href).href;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      prompt("The address of this latent", text);
    }
  }

  function go(by) {
    const next = grid.step(by);
    if (next >= 0) state.set({ latent: next, list: "" });
  }

  const state = shell.state(draw);
  shell.listen(
    {
      j: () => go(1),
      k: () => go(-1),
      ArrowDown: event => (inPage(event) ? false : go(1)),
      ArrowUp: event => (inPage(event) ? false : go(-1)),
      "/": () => {
        if (main.dataset.view !== "list" && getComputedStyle(document.querySelector("#list")).display === "none")
          state.set({ latent: "", list: 1 }, true);
        query.focus();
        query.select();
      },
      o: () => state.set({ latent: "", list: "" }, true),
      l: () => state.set({ latent: "", list: 1 }, true),
      c: () => {
        const button = document.querySelector("#copy");
        if (button) button.click();
      },
      Escape: escape,
    },
    bar,
  );

  const inPage = event => page.contains(event.target);

  // Of a search that is typed in its text, then the field; else of a latent its page.
  function escape() {
    if (document.activeElement === query && query.value) {
      query.value = "";
      typed();
    } else if (
      document.activeElement !== document.body &&
      document.activeElement !== page &&
      /^(INPUT|SELECT)$/.test(document.activeElement.tagName)
    )
      document.activeElement.blur();
    else if (state.get().latent) state.set({ latent: "", list: 1 }, true);
    else state.set({ q: "", show: "", in: "", list: "" });
  }

  state.begin();
})();
