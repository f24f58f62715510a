// All that there is of one latent.
"use strict";

saeflow.latent = (() => {
  const { el, number, share, listed, row, tokens, charts } = saeflow;

  // The piece of data that has latent `i`, from the folder of a dashboard.
  async function read(folder, overview, i) {
    const size = overview.index.latents_per_group,
      group = String(Math.floor(i / size)).padStart(4, "0");
    return { data: await saeflow.load(`${folder}data/latents-${group}.js`), at: i % size };
  }

  const texts = (data, column, i) => [...listed(data[column], i)].map(t => data.texts[t]);

  // Its page. `links`: `href(latent)` within its dictionary, `partner(latent)` in the other side of its pair, or null.
  function page(overview, i, { data, at }, links) {
    const index = overview.index,
      value = name => data[name][at];
    const label = data.label[at];
    const low = Math.min(0, value("min") || 0),
      high = Math.max(0, value("max") || 0);
    const largest = Math.max(Math.abs(low), high);
    const found = examples(data, at, largest);
    const fires = value("fired") > 0;
    return [
      el(
        "p",
        { class: "facts" },
        label
          ? [el("strong", { class: "label" }, tokens.visible(label)), ` (F1 ${number(value("label_f1"))}) · `]
          : null,
        fires
          ? [
              el("strong", {}, share(value("frequency"))),
              ` of tokens (${number(value("fired"))} of ${number(index.n_tokens)}, in ` +
                `${number(value("n_documents"))} documents, ${number(value("n_distinct_tokens"))} different tokens)`,
            ]
          : `It never fires on the ${number(index.n_tokens)} tokens looked at.`,
      ),
      facts(overview, value, fires),
      el(
        "div",
        { class: "panels" },
        fires
          ? panel(
              "Activations",
              "where it fires, by size",
              charts.histogram([...row(data.profiles.histogram, at)], low, high),
              el("p", { class: "note" }, "firings by position in a row"),
              charts.positions([...row(data.profiles.positions, at)], overview.position_begin, index.context_size),
            )
          : null,
        logits("Logits it raises", texts(data, "raised", at), listed(data.raised_by, at), index),
        logits("Logits it lowers", texts(data, "lowered", at), listed(data.lowered_by, at), index),
      ),
      found.top.length
        ? [
            el("h3", {}, "Strongest activations"),
            tokens.legend(largest, low < 0),
            el("ol", { class: "examples" }, found.top),
            intervals(found.intervals, index.intervals, low, high),
          ]
        : null,
      el(
        "div",
        { class: "panels loose" },
        often(data, at),
        near(
          "Nearest by decoder",
          "by the cosine of decoder rows",
          "cosine",
          data.near_decoder,
          data.near_decoder_cosine,
          at,
          links.href,
        ),
        near(
          "Nearest by firing",
          "tokens with both over tokens with either",
          "Jaccard",
          data.near_firing,
          data.near_firing_jaccard,
          at,
          links.href,
        ),
        near(
          "Partners on the other side of the pair",
          "by the Jacobian, over all tokens",
          "mean |J|",
          data.near_jacobian,
          data.near_jacobian_mean,
          at,
          links.partner,
        ),
        heads(data, at),
      ),
    ];
  }

  function facts(overview, value, fires) {
    const effect = Number.isNaN(value("effect"))
      ? overview.index.left_out.effect || "not measured"
      : `${number(value("effect"))} ± ${number(value("effect_error"), 2)} nats ` +
        `(standard error, ${number(value("effect_tokens"))} tokens)`;
    const pairs = [["loss where it is ablated", effect]];
    if (fires) {
      pairs.unshift(
        ["largest", number(value("max"), 4)],
        ["mean ± std", `${number(value("mean"))} ± ${number(value("std"))}`],
        ["quantiles 10, 50, 90, 99 %", ["q10", "q50", "q90", "q99"].map(q => number(value(q))).join(", ")],
        ["mean position", number(value("mean_position"))],
      );
    }
    pairs.push(["decoder norm", number(value("decoder_norm"))]);
    if (!Number.isNaN(value("head"))) pairs.push(["head", number(value("head"))]);
    return el(
      "dl",
      { class: "facts" },
      pairs.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))),
    );
  }

  const panel = (title, note, ...content) =>
    el("section", { class: "panel" }, el("h3", {}, title), note ? el("p", { class: "note" }, note) : null, content);

  // A small table; the first column of each row is its head.
  function rows(title, note, heads, body) {
    if (!body.length) return null;
    return panel(
      title,
      note,
      el(
        "table",
        { class: "small" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            heads.map((head, i) => el("th", { scope: "col", class: i ? null : "text" }, head)),
          ),
        ),
        el(
          "tbody",
          {},
          body.map(([first, ...rest]) =>
            el(
              "tr",
              {},
              el("th", { scope: "row", class: "text" }, first),
              rest.map(cell => el("td", { class: typeof cell === "string" ? null : "long" }, cell)),
            ),
          ),
        ),
      ),
    );
  }

  function logits(title, names, values, index) {
    if (!names.length) return index.left_out.raised ? panel(title, index.left_out.raised) : null;
    return rows(
      title,
      "a unit of activation",
      ["token", "logits"],
      names.map((name, i) => [tokens.chip(name), number(values[i])]),
    );
  }

  function often(data, at) {
    const names = texts(data, "tokens", at),
      [fired, part, mean] = ["token_fired", "token_share", "token_mean"].map(c => listed(data[c], at));
    return rows(
      "Tokens it fires on",
      "most often first; share: of the token's occurrences",
      ["token", "firings", "share", "mean"],
      names.map((name, i) => [tokens.chip(name), number(fired[i]), share(part[i]), number(mean[i])]),
    );
  }

  function near(title, note, measured, latents, values, at, href) {
    const others = listed(latents, at),
      measure = listed(values, at);
    return rows(
      title,
      note,
      ["latent", measured],
      [...others].map((other, i) => [
        href ? el("a", { href: href(other) }, String(other)) : String(other),
        number(measure[i]),
      ]),
    );
  }

  function heads(data, at) {
    if (!data.profiles.head_share) return null;
    const parts = [...row(data.profiles.head_share, at)];
    return panel(
      "Heads",
      "share of the norms of its decoder row's parts",
      charts.bars(
        parts.map(p => Math.round(1000 * p) / 10),
        {
          label: `Share of each of ${parts.length} heads, in percent; the largest is head ${parts.indexOf(Math.max(...parts))}`,
          name: i => `head ${i}, percent`,
          height: 80,
          ticks: parts
            .map((_, i) => [(i + 0.5) / parts.length, String(i)])
            .filter((_, i) => parts.length <= 16 || i % 4 === 0),
        },
      ),
    );
  }

  // Lines of text: the strongest, and by interval.
  function examples(data, at, largest) {
    const shown = data.examples,
      found = { top: [], intervals: new Map() };
    const sparse = activations(data);
    for (let e = shown.offsets[at]; e < shown.offsets[at + 1]; e++) {
      const begin = data.token_ids.offsets[e],
        end = data.token_ids.offsets[e + 1];
      const read = [...data.token_ids.values.subarray(begin, end)].map(t => data.texts[t]);
      const values = sparse.subarray(begin, end);
      const where =
        `document ${shown.document[e]}, row ${shown.row[e]}, position ${shown.position[e]}; ` +
        `stronger than ${share(shown.quantile[e])} of its firings`;
      const item = el(
        "li",
        { title: where },
        el("span", { class: "value" }, number(shown.value[e])),
        tokens.line(read, values, shown.at[e], largest),
      );
      if (shown.interval[e] < 0) found.top.push(item);
      else found.intervals.set(shown.interval[e], [...(found.intervals.get(shown.interval[e]) || []), item]);
    }
    return found;
  }

  const dense = new WeakMap();

  // Of all tokens of a piece's examples the activations, 0 of most.
  function activations(data) {
    if (!dense.has(data)) {
      const all = new Float32Array(data.token_ids.values.length);
      data.examples.active.forEach((place, i) => {
        all[place] = data.examples.active_value[i];
      });
      dense.set(data, all);
    }
    return dense.get(data);
  }

  function intervals(found, n, low, high) {
    const edge = i => number(low + ((high - low) * i) / n);
    const parts = [...found.keys()]
      .sort((a, b) => b - a)
      .map(i => [el("h4", {}, `${edge(i)} to ${edge(i + 1)}`), el("ol", { class: "examples" }, found.get(i))]);
    return parts.length
      ? [
          el("h3", {}, "Through its range"),
          el(
            "p",
            { class: "note" },
            `random examples from each ${n > 1 ? `of ${n} equal parts` : "part"} of the range, the strongest first`,
          ),
          parts,
        ]
      : null;
  }

  return { read, page, rows, panel };
})();
