// What every page has: light and dark, help, keys, and a state that is kept in the address.
"use strict";

saeflow.shell = (() => {
  const { el } = saeflow;
  const THEMES = ["", "light", "dark"]; // the first: as the system is

  function remembered() {
    try {
      return localStorage.getItem("saeflow-theme") || "";
    } catch {
      return ""; // where pages from disk may keep nothing
    }
  }

  function setTheme(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    try {
      localStorage.setItem("saeflow-theme", theme);
    } catch {
      // it is then for this page alone
    }
  }

  setTheme(remembered()); // before anything is drawn

  // Adds the switch and the help to the header. `keys`: [key, what it does].
  function start(keys) {
    const name = theme => `${{ "": "as the system", light: "light", dark: "dark" }[theme]}`;
    const theme = el("button", { type: "button", id: "theme" });
    const say = () => {
      theme.textContent = `◐ ${name(document.documentElement.dataset.theme || "")}`;
      theme.setAttribute("aria-label", `Colours: ${name(document.documentElement.dataset.theme || "")}; change`);
    };
    theme.addEventListener("click", () => {
      const now = document.documentElement.dataset.theme || "";
      setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
      say();
    });
    say();
    const rows = [
      ...keys,
      ["t", "colours: as the system, light, dark"],
      ["?", "this help"],
      ["Esc", "close, clear, back"],
    ];
    const close = el("button", { type: "button", onclick: () => help.close() }, "Close");
    const help = el(
      "dialog",
      { id: "help", "aria-label": "Keys" },
      el("h2", {}, "Keys"),
      el(
        "table",
        {},
        el(
          "tbody",
          {},
          rows.map(([key, does]) => el("tr", {}, el("th", { scope: "row" }, el("kbd", {}, key)), el("td", {}, does))),
        ),
      ),
      close,
    );
    const ask = el("button", { type: "button", "aria-label": "Help: keys", onclick: () => help.showModal() }, "?");
    document.querySelector("header").append(el("div", { class: "tools" }, theme, ask));
    document.body.append(help);
    return { theme, help };
  }

  // Keys outside of fields; `on` maps a key to what it does. Escape works in fields too.
  function listen(on, shell) {
    const all = { t: () => shell.theme.click(), "?": () => shell.help.showModal(), ...on };
    document.addEventListener("keydown", event => {
      const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
      if (event.ctrlKey || event.metaKey || event.altKey || shell.help.open) return;
      if (typing && event.key !== "Escape") return;
      if (all[event.key] && all[event.key](event) !== false) event.preventDefault();
    });
  }

  // A state in the address. `show(state, before)` draws it. A change is drawn at once; the address follows a little
  // later where it replaces the last one, since browsers refuse many changes a second.
  function state(show) {
    let now = saeflow.parseAddress(location.hash);
    let timer = null;
    let written = null; // the address that comes from here, of which the browser may tell when the state is elsewhere
    const same = (a, b) => saeflow.address(a) === saeflow.address(b);

    function set(changes, push = false) {
      const before = now;
      now = { ...now, ...changes };
      for (const [key, value] of Object.entries(now)) {
        if (value === "" || value === null || value === undefined) delete now[key];
        else now[key] = String(value);
      }
      if (same(before, now)) return;
      clearTimeout(timer);
      if (push) write(address => (location.hash = address));
      else timer = setTimeout(() => write(address => location.replace(address)), 150);
      show(now, before);
    }

    function write(how) {
      written = saeflow.address(now);
      how(written);
    }

    addEventListener("hashchange", () => {
      const next = saeflow.parseAddress(location.hash);
      if (written !== null && saeflow.address(next) === written) return;
      written = null;
      if (same(next, now)) return;
      clearTimeout(timer);
      const before = now;
      now = next;
      show(now, before);
    });
    return { set, get: () => now, begin: () => show(now, {}) };
  }

  // Says on the page what went wrong.
  function complain(place, error) {
    place.replaceChildren(el("p", { class: "error", role: "alert" }, error.message || String(error)));
  }

  return { start, listen, state, complain };
})();
