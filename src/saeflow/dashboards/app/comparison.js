// Dictionaries at one place beside each other: where they lie, how much of each is in each, and latents that match.
"use strict";

(async () => {
  const { el, number, share, row, tokens, latent, shell } = saeflow;
  const page = document.querySelector("#page"),
    main = document.querySelector("main");
  const one = document.querySelector("#one"),
    other = document.querySelector("#other"),
    query = document.querySelector("#query");
  const found = document.querySelector("#found");
  const bar = shell.start([
    ["j or ↓", "next latent"],
    ["k or ↑", "the one before"],
    ["/", "go to a latent"],
    ["o", "overview"],
    ["x", "exchange the two"],
  ]);
  tokens.hints();
  let all;
  try {
    all = await saeflow.load("data/overview.js");
  } catch (error) {
    shell.complain(page, error);
    return;
  }
  const some = all.dictionaries,
    number_of = new Map(some.map((d, i) => [d.key, i]));
  const me = decodeURIComponent(location.pathname.split("/").at(-2));
  const folder = d => `../../dashboards/${encodeURIComponent(d.key)}/`;
  const dashboard = (d, i) => `${folder(d)}index.html${saeflow.address({ latent: i, among: me })}`;
  const short = d => d.name.label;
  const title = `Dictionaries at ${some[0].name.place}${some[0].name.model ? ` of ${some[0].name.model}` : ""}`;
  document.title = title;
  document.querySelector("#title").textContent = title;
  one.append(...some.map(d => el("option", { value: d.key }, short(d))));
  other.append(el("option", { value: "" }, "all others"), ...some.map(d => el("option", { value: d.key }, short(d))));
  const to = changes => saeflow.address({ ...state.get(), ...changes });
  const wide = new Map(); // tables of dashboards

  // ------------------------------------------------------------------ matches
  async function matches(i, j) {
    const data = await saeflow.load(`data/match-${Math.min(i, j)}-${Math.max(i, j)}.js`);
    return i < j ? data : { there: data.back, back: data.there };
  }

  async function table(i) {
    if (!wide.has(i)) wide.set(i, saeflow.load(`${folder(some[i])}data/table.js`));
    return wide.get(i);
  }

  let pair = null; // what the grid shows: {i, j, there, back, mine, theirs}
  let grid = null;

  function columns() {
    const { i, j, there, back, mine, theirs } = pair,
      match = r => there.latent[r * there.k];
    const fires = (data, d, r) => data.fired[r] / some[d].index.n_tokens;
    return [
      { id: "latent", name: "latent", width: "5rem", cell: r => String(r), by: r => r, narrow: true },
      {
        id: "cosine",
        name: "cosine",
        title: "of the decoder rows of the two",
        width: "5.4rem",
        cell: r => there.cosine[r * there.k].toFixed(3),
        by: r => there.cosine[r * there.k],
        narrow: true,
      },
      { id: "match", name: "match", width: "5rem", cell: r => String(match(r)), by: match, narrow: true },
      {
        id: "mutual",
        name: "mutual",
        title: "whether it is the nearest of its nearest",
        width: "5.4rem",
        cell: r => (back.latent[match(r) * back.k] === r ? "yes" : "no"),
        by: r => Number(back.latent[match(r) * back.k] === r),
      },
      {
        id: "frequency",
        name: "fires",
        width: "5rem",
        cell: r => share(fires(mine, i, r)),
        by: r => fires(mine, i, r),
      },
      {
        id: "other_frequency",
        name: "match fires",
        width: "7rem",
        cell: r => share(fires(theirs, j, match(r))),
        by: r => fires(theirs, j, match(r)),
      },
      {
        id: "text",
        name: "strongest on",
        width: "auto",
        text: true,
        blank: tokens.snippet,
        put: (cell, r) => tokens.fillSnippet(cell, mine, r),
        by: () => NaN,
        narrow: true,
      },
      {
        id: "other_text",
        name: "match strongest on",
        width: "auto",
        text: true,
        blank: tokens.snippet,
        put: (cell, r) => tokens.fillSnippet(cell, theirs, match(r)),
        by: () => NaN,
      },
    ];
  }

  async function showPair(i, j, now) {
    if (!pair || pair.i !== i || pair.j !== j) {
      const [{ there, back }, mine, theirs] = await Promise.all([matches(i, j), table(i), table(j)]);
      pair = { i, j, there, back, mine, theirs };
      if (grid) grid.box.remove();
      grid = new saeflow.Grid({
        columns: columns(),
        label: "Matched latents",
        open: r => state.set({ latent: r }, true),
        href: r => to({ latent: r }),
        sorted: id => state.set({ sort: state.get().sort === `-${id}` ? id : `-${id}` }),
      });
      grid.count = some[i].index.n_latents;
      document.querySelector("#list").append(grid.box);
      grid.sorting = null;
    }
    const sort = now.sort || "-cosine";
    if (grid.sorting !== sort) {
      const rows = [];
      for (let r = 0; r < grid.count; r++) if (pair.there.latent[r * pair.there.k] >= 0) rows.push(r);
      grid.sort(rows, sort);
      grid.sorting = sort;
      found.textContent = `${number(rows.length)} fire`;
    }
    grid.choose(/^\d+$/.test(now.latent) ? Number(now.latent) : -1);
  }

  // Nearest of a latent in every other dictionary.
  async function inOthers(i, r) {
    const rows = await Promise.all(
      some
        .map((_, j) => j)
        .filter(j => j !== i)
        .map(async j => {
          const { there } = await matches(i, j),
            places = row(there.latent, r),
            cosine = row(there.cosine, r);
          const links = [...places].flatMap((m, n) =>
            m < 0
              ? []
              : [
                  n ? ", " : "",
                  el(
                    "a",
                    { href: to({ one: some[i].key, other: some[j].key, latent: r, match: n || "" }) },
                    `${m} (${cosine[n].toFixed(2)})`,
                  ),
                ],
          );
          return { best: cosine[0], cells: [short(some[j]), el("span", {}, links.length ? links : "–")] };
        }),
    );
    rows.sort((a, b) => (b.best || -2) - (a.best || -2));
    return [
      await column(i, r),
      el(
        "div",
        {},
        latent.rows(
          `Latent ${r} in the other dictionaries`,
          "its nearest by decoder row, with the cosine",
          ["dictionary", "latents"],
          rows.map(row => row.cells),
        ),
      ),
    ];
  }

  async function column(i, r, more = null) {
    const d = some[i],
      overview = await saeflow.load(`${folder(d)}data/overview.js`);
    const content = latent.page(overview, r, await latent.read(folder(d), overview, r), {
      href: o => dashboard(d, o),
      partner: null,
    });
    return el(
      "article",
      {},
      el("h2", {}, el("a", { href: dashboard(d, r) }, `Latent ${r}`)),
      el("p", { class: "note" }, short(d)),
      more,
      content.flat(Infinity).filter(Boolean),
    );
  }

  async function beside(i, j, r, now) {
    const { there } = await matches(i, j),
      places = [...row(there.latent, r)],
      n = Math.min(Number(now.match) || 0, places.length - 1);
    if (!(r < some[i].index.n_latents))
      throw new Error(`There is no latent ${now.latent}: this dictionary has 0 to ${some[i].index.n_latents - 1}.`);
    const choice = el(
      "p",
      { class: "note" },
      "nearest: ",
      places.map((m, k) =>
        m < 0
          ? null
          : [
              el(
                "a",
                { href: to({ match: k || "" }), "aria-current": k === n ? "true" : null },
                `${m}, cosine ${there.cosine[r * there.k + k].toFixed(3)}`,
              ),
              " ",
            ],
      ),
    );
    return [
      await column(i, r, el("p", { class: "note" }, "\u00a0")),
      places[n] < 0
        ? el("article", {}, el("p", {}, "It never fires on the tokens looked at, so it has no match."))
        : await column(j, places[n], choice),
    ];
  }

  // ------------------------------------------------------------------ what is shown
  let asked = 0;

  async function draw(now) {
    const turn = ++asked;
    const i = number_of.get(now.one),
      j = number_of.get(now.other);
    main.dataset.view = i === undefined ? "overview" : now.latent ? "latent" : "list";
    one.value = now.one || some[0].key;
    other.value = now.other || "";
    document.querySelector("#list").hidden = i === undefined || j === undefined || i === j;
    try {
      let content;
      if (i === undefined || (j === undefined && !now.latent) || i === j)
        content = saeflow.place(all, { short, dashboard, to });
      else if (j === undefined) content = [el("div", { class: "beside" }, await inOthers(i, Number(now.latent)))];
      else {
        await showPair(i, j, now);
        if (turn !== asked) return;
        content = now.latent
          ? [el("div", { class: "beside" }, await beside(i, j, Number(now.latent), now))]
          : [summary(i, j)];
      }
      if (turn !== asked) return;
      page.replaceChildren(...content.flat(Infinity).filter(Boolean));
    } catch (error) {
      if (turn === asked) shell.complain(page, error);
    }
    page.scrollTop = 0;
  }

  function summary(i, j) {
    const told = (a, b) => {
      const pair = all.pairs[`${a}-${b}`];
      return [
        short(some[a]),
        number(pair.n_live),
        number(pair.mean_largest_cosine),
        ...all.alike.map(x => share(pair[`share_${x}`])),
        share(pair.share_mutual),
      ];
    };
    return latent.rows(
      "How much of one is in the other",
      "of the latents that fire: mean of the largest cosines with a decoder row of the other; shares of which that is " +
        "at least so much; share that are each other's nearest",
      ["dictionary", "fire", "mean", ...all.alike.map(x => `≥ ${x}`), "mutual"],
      [told(i, j), told(j, i)],
    );
  }

  const state = shell.state(draw);
  const chosen = () => state.set({ one: one.value, other: other.value, latent: "", match: "" }, true);
  one.addEventListener("change", chosen);
  other.addEventListener("change", chosen);
  document.querySelector("#search").addEventListener("submit", event => {
    event.preventDefault();
    state.set({ one: one.value, latent: query.value.trim(), match: "" }, true);
  });
  document.querySelector("#to-overview").addEventListener("click", event => {
    event.preventDefault();
    state.set({ one: "", other: "", latent: "", match: "" }, true);
  });
  const go = by => {
    const next = grid ? grid.step(by) : -1;
    if (next >= 0) state.set({ latent: next, match: "" });
  };
  const inPage = event => page.contains(event.target);
  shell.listen(
    {
      j: () => go(1),
      k: () => go(-1),
      ArrowDown: event => (inPage(event) ? false : go(1)),
      ArrowUp: event => (inPage(event) ? false : go(-1)),
      "/": () => query.focus(),
      o: () => state.set({ one: "", other: "", latent: "", match: "" }, true),
      x: () => {
        const { one: a, other: b } = state.get();
        if (a && b) state.set({ one: b, other: a, latent: "", match: "" }, true);
      },
      Escape: () => {
        if (/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) document.activeElement.blur();
        else state.set(state.get().latent ? { latent: "", match: "" } : { one: "", other: "" }, true);
      },
    },
    bar,
  );
  state.begin();
})();
