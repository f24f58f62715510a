// A table of any number of rows, of which those in sight are there.
"use strict";

saeflow.Grid = class {
  // `columns`: [{id, name, title, width, cell(row) -> its text, by(row) -> what to sort by, text, left, narrow, spare}]:
  // of `text` what is sorted by is text, `left` is only shown so, `narrow` stays on a narrow screen, and `spare` goes
  // first where there is no room. What is more than a text has blank() -> an element and put(element, row), not `cell`.
  // `open(row)`: what a click on a row does; `href(row)`: its link.
  constructor({ columns, open, href, sorted, label }) {
    const { el } = saeflow;
    Object.assign(this, { columns, open, href, order: new Uint32Array(0), chosen: -1, first: -1, keys: new Map() });
    this.height = 30;
    this.heads = columns.map(column =>
      el(
        "th",
        { scope: "col", "aria-sort": "none", class: saeflow.Grid.look(column) },
        el("button", { type: "button", title: column.title, onclick: () => sorted(column.id) }, column.name),
      ),
    );
    this.above = el("tr", { "aria-hidden": "true" }, el("td"));
    this.below = this.above.cloneNode(true);
    this.body = el("tbody", {}, this.above, this.below);
    this.table = el(
      "table",
      { class: "grid", "aria-label": label },
      el(
        "colgroup",
        {},
        columns.map(c => el("col", { style: `width:${c.width}`, class: saeflow.Grid.look(c) })),
      ),
      el("thead", {}, el("tr", {}, this.heads)),
      this.body,
    );
    this.box = el("div", { class: "scroll", tabindex: "0", "aria-label": label, role: "region" }, this.table);
    this.rows = [];
    this.body.addEventListener("click", event => {
      const row = event.target.closest("tr[data-row]");
      if (!row || event.target.closest("a")) return; // a link finds its way alone
      this.open(Number(row.dataset.row));
    });
    let waiting = false;
    this.box.addEventListener(
      "scroll",
      () => {
        if (waiting) return;
        waiting = true;
        requestAnimationFrame(() => {
          waiting = false;
          this.draw();
        });
      },
      { passive: true },
    );
    new ResizeObserver(() => this.draw(true)).observe(this.box);
  }

  static look = column =>
    [column.narrow ? "" : "wide", column.spare ? "spare" : "", column.text || column.left ? "text" : ""]
      .join(" ")
      .trim() || null;

  // Row numbers in order by a column, those that have nothing there last. `sort`: a column's id, with - for the reverse.
  sort(rows, sort) {
    const down = sort.startsWith("-"),
      id = sort.replace(/^-/, "");
    const column = this.columns.find(c => c.id === id) || this.columns[0];
    this.columns.forEach((c, i) =>
      this.heads[i].setAttribute("aria-sort", c !== column ? "none" : down ? "descending" : "ascending"),
    );
    const by = this.ranks(column);
    const order = Uint32Array.from(rows);
    const none = v => Number.isNaN(v);
    order.sort((a, b) => {
      const x = by[a],
        y = by[b];
      if (none(x) || none(y)) return none(x) - none(y) || a - b;
      return (down ? y - x : x - y) || a - b;
    });
    this.order = order;
    this.table.setAttribute("aria-rowcount", order.length + 1);
    this.draw(true);
  }

  // Of every row a number to sort by; of texts their place in the alphabet.
  ranks(column) {
    if (this.keys.has(column.id)) return this.keys.get(column.id);
    const values = Array.from({ length: this.count }, (_, i) => column.by(i));
    let ranks = values;
    if (column.text) {
      const place = new Map(
        [...new Set(values)]
          .filter(v => v !== "")
          .sort(new Intl.Collator("en").compare)
          .map((v, i) => [v, i]),
      );
      ranks = values.map(v => (v === "" ? NaN : place.get(v)));
    }
    const found = Float64Array.from(ranks);
    this.keys.set(column.id, found);
    return found;
  }

  // Shows the rows in sight. Those that stay keep their elements: at a usual speed a few are filled anew.
  draw(all = false) {
    const height = this.height,
      n = this.order.length;
    const shown = Math.min(n, Math.ceil((this.box.clientHeight || 600) / height) + 12);
    const first = Math.max(0, Math.min(n - shown, Math.floor(this.box.scrollTop / height) - 6));
    if (first === this.first && !all) return;
    while (this.rows.length < shown) this.rows.push(this.blank());
    while (this.rows.length > shown) this.rows.pop().element.remove();
    const moved = first - this.first;
    if (!all && Math.abs(moved) < shown) {
      const turned = moved > 0 ? this.rows.splice(0, moved) : this.rows.splice(moved);
      const place = moved > 0 ? this.below : this.rows[0].element;
      for (const row of turned) place.before(row.element);
      if (moved > 0) this.rows.push(...turned);
      else this.rows.unshift(...turned);
    }
    this.first = first;
    this.rows.forEach((row, i) => this.put(row, first + i, all));
    this.above.style.height = `${first * height}px`;
    this.below.style.height = `${(n - first - shown) * height}px`;
  }

  blank() {
    const cells = this.columns.map((column, i) =>
      i
        ? saeflow.el(
            "td",
            { class: saeflow.Grid.look(column) },
            column.blank ? column.blank() : document.createTextNode(""),
          )
        : saeflow.el("th", { scope: "row" }, saeflow.el("a", {}, "")),
    );
    const element = saeflow.el("tr", {}, cells);
    this.below.before(element);
    return { element, shown: cells.map(cell => cell.firstChild), row: -1, place: -1, chosen: false };
  }

  // Fills a row with the `i`-th of the order; `all`: links may be others.
  put(line, i, all) {
    const row = this.order[i],
      chosen = row === this.chosen;
    if (line.chosen !== chosen) {
      line.chosen = chosen;
      line.element.classList.toggle("chosen", chosen);
      if (chosen) line.element.setAttribute("aria-current", "true");
      else line.element.removeAttribute("aria-current");
    }
    if (line.place !== i) line.element.setAttribute("aria-rowindex", (line.place = i) + 2);
    if (all || line.row !== row) line.shown[0].href = this.href(row);
    if (line.row === row) return;
    line.row = row;
    line.element.dataset.row = row;
    this.columns.forEach((column, c) => {
      if (column.put) column.put(line.shown[c], row);
      else line.shown[c].textContent = column.cell(row);
    });
  }

  // Marks a row, and brings it into sight.
  choose(row) {
    this.chosen = row;
    const place = this.order.indexOf(row);
    if (place >= 0) {
      const top = place * this.height,
        head = this.height + 8;
      const { scrollTop, clientHeight } = this.box;
      if (top < scrollTop) this.box.scrollTop = top;
      else if (top + this.height + head > scrollTop + clientHeight)
        this.box.scrollTop = top + this.height + head - clientHeight;
    }
    this.draw(true);
  }

  // The row that is `by` rows further down than the chosen one, or the first.
  step(by) {
    const n = this.order.length;
    if (!n) return -1;
    const place = this.order.indexOf(this.chosen);
    return this.order[place < 0 ? 0 : Math.max(0, Math.min(n - 1, place + by))];
  }
};
