// What a dictionary is, and whether it is good.
"use strict";

saeflow.overview = (() => {
  const { el, number, share, charts } = saeflow;
  const { rows, panel } = saeflow.latent;
  const METRICS = [
    ["l0", "active latents a token (L0)", number],
    ["loss_recovered_zero", "loss recovered of zero ablation", share],
    ["loss_recovered_mean", "loss recovered of mean ablation", share],
    ["ce_increase", "rise in loss, nats", number],
    ["kl", "KL divergence, nats", number],
    ["explained_variance", "explained variance", share],
    ["cosine", "cosine of output and target", number],
    ["recovery", "true features: 0 as random directions, 1 all", number],
    ["accuracy_replaced", "accuracy with it in place", share],
    ["dead_fraction", "dead latents in the evaluation", share],
  ];

  // `pick(changes)`: the address of the table of some latents, or in some order. `n`: {live, dead, dense} of them.
  function page(overview, frequency, n, dense, pick) {
    const { index, name } = overview;
    return [
      el(
        "p",
        { class: "lead" },
        [name.kind, name.amount, name.part].filter(Boolean).join(", "),
        `, at ${name.place}`,
        name.reads ? `, reading ${name.reads}` : "",
        name.model ? `, of ${name.model}. ` : ". ",
        `${number(index.n_latents)} latents, looked up on ${number(index.n_tokens)} `,
        `${index.split === "train" ? "training" : "held-out"} tokens of ${number(index.n_documents)} documents.`,
      ),
      el(
        "div",
        { class: "panels loose" },
        panel(
          "How often latents fire",
          `share of the ${number(index.n_tokens)} tokens, logarithmic`,
          charts.density(frequency, index.n_tokens, dense),
          el(
            "ul",
            { class: "counts" },
            el(
              "li",
              {},
              el("a", { href: pick({ show: "live" }) }, `${number(n.live)} fire`),
              ` (${share(n.live / index.n_latents)})`,
            ),
            el(
              "li",
              {},
              el("a", { href: pick({ show: "dead" }) }, `${number(n.dead)} never fire`),
              ` (${share(n.dead / index.n_latents)})`,
            ),
            el(
              "li",
              {},
              el(
                "a",
                { href: pick({ show: "dense" }) },
                `${number(n.dense)} fire on more than ${share(dense)} of tokens`,
              ),
            ),
            el(
              "li",
              {},
              "sorted by ",
              el("a", { href: pick({ sort: "-effect" }) }, "effect on the loss"),
              ", ",
              el("a", { href: pick({ sort: "-frequency" }) }, "frequency"),
              ", ",
              el("a", { href: pick({ sort: "-logit" }) }, "logits"),
            ),
          ),
        ),
        measured(overview.evaluation || overview.recovery),
      ),
      el(
        "div",
        { class: "panels broad" },
        rows(
          "Settings",
          "of the dictionary and all that it is made from",
          ["setting", "value"],
          Object.entries(overview.settings).map(([path, value]) => [
            path,
            el("bdi", {}, typeof value === "string" ? value : JSON.stringify(value)),
          ]),
        ),
        rows(
          "Made from",
          "every artifact down to the text",
          ["stage", "folder"],
          overview.made_from.map(([stage, key]) => [
            stage,
            el("a", { href: `../../${stage}/${encodeURI(key)}/` }, key),
          ]),
        ),
      ),
      el(
        "p",
        { class: "note" },
        Object.entries(index.left_out).map(([what, why]) => `Without ${what}: ${why}. `),
      ),
    ];
  }

  function measured(found) {
    if (!found) return panel("Measured", "There is no evaluation of this dictionary.");
    const body = METRICS.filter(([name]) => found[name] !== undefined && found[name] !== null).map(
      ([name, text, form]) => [
        text,
        form(found[name]),
        typeof found[`${name}_low`] === "number"
          ? `${form(found[`${name}_low`])} to ${form(found[`${name}_high`])}`
          : "",
      ],
    );
    const note = found.n_documents
      ? `on ${number(found.n_tokens)} held-out tokens; ${share(found.confidence)} intervals over ${number(found.n_documents)} documents`
      : "against the algorithm that the model has";
    return rows("Measured", note, ["", "value", "interval"], body);
  }

  return { page };
})();
