// Small drawings. Each says in words what it shows, and its numbers on pointing at them.
"use strict";

saeflow.charts = (() => {
  const { el, svg, number } = saeflow;

  // Bars of equal width from `low` to `high`. `parts`: counts; `ticks`: [place from 0 to 1, text].
  function bars(parts, { label, name, ticks, hue, log, height = 130, width: W = 220 }) {
    const H = height,
      foot = 18,
      most = Math.max(1, ...parts);
    const scale = n => (log ? Math.log1p(n) / Math.log1p(most) : n / most) * (H - foot - 14);
    const width = W / parts.length;
    const shapes = [...parts].map((n, i) => {
      const h = n ? Math.max(1, scale(n)) : 0;
      return svg(
        "rect",
        {
          x: i * width + 0.5,
          y: H - foot - h,
          width: Math.max(0.5, width - 1),
          height: h,
          class: hue ? hue(i) : "bar",
        },
        svg("title", {}, `${name(i)}: ${number(n)}`),
      );
    });
    const texts = ticks.map(([place, text]) =>
      svg(
        "text",
        { x: place * W, y: H - 4, "text-anchor": place < 0.05 ? "start" : place > 0.95 ? "end" : "middle" },
        text,
      ),
    );
    return el(
      "figure",
      { class: "chart" },
      svg(
        "svg",
        { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label },
        svg("line", { x1: 0, x2: W, y1: H - foot, y2: H - foot, class: "axis" }),
        shapes,
        texts,
        svg("text", { x: 0, y: 10, class: "most" }, `${log ? "logarithmic, " : ""}at most ${number(most)}`),
      ),
    );
  }

  // The range of a latent's activations, in equal bins.
  function histogram(counts, low, high) {
    const n = counts.length,
      edge = i => low + ((high - low) * i) / n;
    return bars(counts, {
      label:
        `Histogram of activations where it fires, from ${number(low)} to ${number(high)} in ${n} bins; ` +
        `the fullest has ${number(Math.max(...counts))} tokens`,
      name: i => `${number(edge(i))} to ${number(edge(i + 1))}`,
      ticks: [0, 0.5, 1].map(place => [place, number(low + place * (high - low))]),
      log: true,
    });
  }

  // Share of firings by position in a row.
  function positions(counts, begins, end) {
    return bars(counts, {
      label: `Firings by position in a row of ${end} tokens, in ${counts.length} bins`,
      name: i => `positions ${begins[i]} to ${(begins[i + 1] ?? end) - 1}`,
      ticks: [
        [0, "0"],
        [0.5, "position"],
        [1, String(end - 1)],
      ],
      height: 80,
    });
  }

  // How many latents fire how often, by powers of ten; those that never do stand apart.
  function density(frequency, n_tokens, dense) {
    const per = 4,
      lowest = Math.floor(Math.log10(1 / n_tokens)),
      bins = -lowest * per;
    const counts = new Array(bins).fill(0);
    for (const f of frequency)
      if (f > 0) counts[Math.min(bins - 1, Math.floor((Math.log10(f) - lowest) * per + 1e-9))]++;
    const ends = i => [10 ** (lowest + i / per), 10 ** (lowest + (i + 1) / per)];
    return bars(counts, {
      label: `Latents by how often they fire, from 1e${lowest} to 1 of the tokens, ${per} bins a power of ten`,
      name: i =>
        `latents on ${ends(i)
          .map(f => number(f, 2))
          .join(" to ")} of the tokens`,
      ticks: Array.from({ length: -lowest + 1 }, (_, i) => [i / -lowest, i === -lowest ? "1" : `1e${lowest + i}`]),
      hue: i => (ends(i)[0] >= dense ? "bar many" : "bar"),
      height: 150,
      width: 300,
    });
  }

  // Points with intervals: [{x, y, low, high, name, href, series}]; `form(y)` is how a value is written.
  function scatter(points, { x, y, form, label }) {
    const W = 640,
      H = 340,
      left = 56,
      foot = 40,
      top = 12,
      right = 12;
    const series = [...new Set(points.map(p => p.series))];
    const range = values => {
      const low = Math.min(...values),
        high = Math.max(...values),
        room = (high - low || Math.abs(high) || 1) * 0.06;
      return [low - room, high + room];
    };
    const xs = range(points.map(p => Math.log10(p.x))),
      ys = range(points.flatMap(p => [p.low ?? p.y, p.high ?? p.y]));
    const px = v => left + ((Math.log10(v) - xs[0]) / (xs[1] - xs[0])) * (W - left - right);
    const py = v => top + ((ys[1] - v) / (ys[1] - ys[0])) * (H - top - foot);
    const shapes = series.map((_, n) => {
      const mine = points.filter(p => p.series === series[n]).sort((a, b) => a.x - b.x);
      const path = mine.map((p, i) => `${i ? "L" : "M"}${px(p.x).toFixed(1)} ${py(p.y).toFixed(1)}`).join("");
      return [
        svg("path", { d: path, class: `front s${n % 6}` }),
        mine.map(p =>
          svg(
            "a",
            { href: p.href },
            svg(
              "title",
              {},
              `${p.name}: ${x} ${number(p.x)}, ${y} ${form(p.y)}${p.low === null ? "" : ` (${form(p.low)} to ${form(p.high)})`}`,
            ),
            p.low === null
              ? null
              : svg("line", { x1: px(p.x), x2: px(p.x), y1: py(p.low), y2: py(p.high), class: `front s${n % 6}` }),
            mark(n, px(p.x), py(p.y)),
          ),
        ),
      ];
    });
    const ticks = steps(ys).map(v => [
      svg("line", { x1: left, x2: W - right, y1: py(v), y2: py(v), class: "grid" }),
      svg("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, form(v)),
    ]);
    const below = [1, 2, 5]
      .flatMap(m => [0, 1, 2, 3, 4].map(e => m * 10 ** e))
      .filter(v => Math.log10(v) >= xs[0] && Math.log10(v) <= xs[1])
      .map(v => svg("text", { x: px(v), y: H - foot + 16, "text-anchor": "middle" }, number(v)));
    const legend = el(
      "ul",
      { class: "series" },
      series.map((name, n) =>
        el(
          "li",
          {},
          svg("svg", { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" }, mark(n, 8, 8)),
          name,
        ),
      ),
    );
    return el(
      "figure",
      { class: "chart wide" },
      svg(
        "svg",
        { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": label },
        ticks,
        below,
        svg("text", { x: (left + W) / 2, y: H - 4, "text-anchor": "middle" }, `${x} (logarithmic)`),
        svg("text", { x: 14, y: H / 2, transform: `rotate(-90 14 ${H / 2})`, "text-anchor": "middle" }, y),
        shapes,
      ),
      legend,
    );
  }

  // Series differ in shape as well as in colour.
  function mark(n, x, y) {
    const r = 5,
      kinds = [
        `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
        `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
        `M${x} ${y - r - 1}L${x + r + 1} ${y + r}H${x - r - 1}Z`,
        `M${x} ${y - r - 2}L${x + r + 1} ${y}L${x} ${y + r + 2}L${x - r - 1} ${y}Z`,
        `M${x} ${y + r + 1}L${x + r + 1} ${y - r}H${x - r - 1}Z`,
        `M${x - r} ${y - 2}h3v-3h4v3h3v4h-3v3h-4v-3h-3Z`,
      ];
    return svg("path", { d: kinds[n % kinds.length], class: `mark s${n % 6}` });
  }

  function steps([low, high]) {
    const raw = (high - low) / 5,
      power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw);
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(Number(v.toPrecision(6)));
    return found;
  }

  return { bars, histogram, positions, density, scatter };
})();
