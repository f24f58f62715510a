// All dictionaries at one place: how sparse and how faithful they are, and how much of each is in each.
"use strict";

// `all`: the overview of a comparison. `short(d)`: what a dictionary is called, `dashboard(d)`: the address of its
// dashboard, `to(changes)`: that of another view of this page.
saeflow.place = (all, { short, dashboard, to }) => {
  const { el, number, share, charts, latent } = saeflow;
  const some = all.dictionaries;

  function overview() {
    const measured = some.filter(d => d.measured.loss_recovered_zero !== null && d.measured.l0 > 0);
    const points = measured.map(d => ({
      x: d.measured.l0,
      y: d.measured.loss_recovered_zero,
      low: d.measured.loss_recovered_zero_low,
      high: d.measured.loss_recovered_zero_high,
      name: short(d),
      series: d.name.series,
      href: dashboard(d),
    }));
    return [
      el(
        "div",
        { class: "panels broad" },
        points.length > 1
          ? latent.panel(
              "How sparse, how faithful",
              "each point a dictionary, with its interval over held-out documents; a click opens its dashboard",
              charts.scatter(points, {
                x: "active latents a token (L0)",
                y: "loss recovered",
                form: share,
                label: "Loss recovered against L0",
              }),
            )
          : null,
        latent.rows(
          "Dictionaries",
          "",
          ["dictionary", "L0", "loss recovered", "latents that fire", "of"],
          some.map(d => [
            el("a", { href: dashboard(d) }, short(d)),
            number(d.measured.l0),
            share(d.measured.loss_recovered_zero),
            number(d.index.n_live),
            number(d.index.n_latents),
          ]),
        ),
      ),
      latent.panel(
        "How much of one is in another",
        "mean over the latents of a row's dictionary that fire of the largest cosine with a decoder row of the " +
          "column's; a click shows latent by latent",
        matrix(),
      ),
    ];
  }

  function matrix() {
    const cell = (i, j) => {
      if (i === j) return el("td", { class: "none" }, "");
      const pair = all.pairs[`${i}-${j}`],
        value = pair.mean_largest_cosine;
      const told = all.alike.map(a => `${share(pair[`share_${a}`])} at ${a} or more`).join(", ");
      return el(
        "td",
        {
          style: `--s:${Math.max(0, value || 0).toFixed(2)}`,
          class: "heat",
          title: `${told}; ${share(pair.share_mutual)} each other's nearest`,
        },
        el(
          "a",
          { href: to({ one: some[i].key, other: some[j].key, latent: "" }) },
          value === null ? "–" : value.toFixed(2),
        ),
      );
    };
    return el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "small matrix" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("td", {}),
            some.map((d, j) => el("th", { scope: "col", title: short(d) }, String(j + 1))),
          ),
        ),
        el(
          "tbody",
          {},
          some.map((d, i) =>
            el(
              "tr",
              {},
              el("th", { scope: "row", class: "text" }, `${i + 1}  ${short(d)}`),
              some.map((_, j) => cell(i, j)),
            ),
          ),
        ),
      ),
    );
  }

  return overview();
};
