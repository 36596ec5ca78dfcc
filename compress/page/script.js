// Sorts and filters tables, points at layers, remembers the colours. The page is whole without it.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };

  // -- light and dark
  const root = document.documentElement;
  const toggle = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const kept = (value) => {
    try { // a page opened from a file may have no storage
      if (value) localStorage.setItem("compress-theme", value);
      return localStorage.getItem("compress-theme");
    } catch { return null; }
  };
  const theme = (value) => {
    if (value) root.dataset.theme = value;
    const dark = (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
    toggle.textContent = dark ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `Change to ${dark ? "light" : "dark"} colours`);
    return dark;
  };
  theme(["light", "dark"].find((name) => name === kept()));
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    const next = theme() ? "light" : "dark";
    theme(next);
    kept(next);
  });
  system.addEventListener("change", () => theme());

  // -- tables: a heading sorts one way, the other way, then back to the order of the model
  const collator = new Intl.Collator(undefined, { numeric: true });
  const value = (row, column, number) => {
    const cell = row.cells[column];
    if (!number) return cell.dataset.value ?? cell.textContent;
    return cell.dataset.value === undefined || cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const sort = (table, column, direction, number) => {
    const rows = all("tbody tr", table);
    const before = (a, b) => Number(a.dataset.at) - Number(b.dataset.at);
    const sign = direction === "descending" ? -1 : 1;
    rows.sort((a, b) => {
      if (direction === "none") return before(a, b);
      const [x, y] = [value(a, column, number), value(b, column, number)];
      if (x === null || y === null) return (x === null) - (y === null) || before(a, b);
      return sign * (number ? x - y || 0 : collator.compare(x, y)) || before(a, b);
    });
    table.tBodies[0].append(...rows);
  };
  for (const table of all("table[id]")) {
    all("tbody tr", table).forEach((row, i) => { row.dataset.at = i; });
    const headings = all("thead th", table);
    headings.forEach((heading, column) => {
      const number = heading.dataset.sorts === "number";
      const button = make("button", { type: "button" }, ...heading.childNodes);
      heading.append(button);
      heading.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const ways = number ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
        const next = ways[(ways.indexOf(heading.getAttribute("aria-sort")) + 1) % 3];
        headings.forEach((other) => other.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", next);
        sort(table, column, next, number);
      });
    });
  }

  // -- filters: all words somewhere in the row; bars of layers left out fade
  for (const controls of all(".controls[data-table]")) {
    const ident = controls.dataset.table;
    const rows = all("tbody tr", document.getElementById(ident));
    const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
    const bars = all(`[data-table="${ident}"] [data-layer]`);
    const find = controls.querySelector("input");
    const action = controls.querySelector("select");
    const count = controls.querySelector(".count");
    controls.hidden = false;
    const filter = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      const out = new Set();
      rows.forEach((row, i) => {
        const fits = words.every((word) => texts[i].includes(word))
          && (!action || !action.value || row.cells[1].textContent === action.value);
        row.hidden = !fits;
        if (fits) shown += 1;
        else out.add(row.dataset.at);
      });
      bars.forEach((bar) => bar.classList.toggle("dim", out.has(bar.dataset.layer)));
      count.textContent = shown === rows.length ? `${shown} layers` : `${shown} of ${rows.length} layers`;
    };
    find.addEventListener("input", filter);
    if (action) action.addEventListener("change", filter);
  }

  // -- one cursor for both plots of layers: by pointer, or by the arrow keys
  for (const figure of all(".layers-plot")) {
    const readout = figure.querySelector(".readout");
    const resting = [...readout.childNodes];
    const rows = all("tbody tr", document.getElementById(figure.dataset.table));
    const titles = all("thead th", document.getElementById(figure.dataset.table)).map((h) => h.textContent);
    const plots = all(".plot", figure);
    const columns = plots.map((plot) => all("[data-layer]", plot));
    let at = -1;
    const words = (row) => [...row.cells].slice(1)
      .map((cell, i) => [titles[i + 1], cell.textContent]).filter(([, text]) => text);
    const point = (next) => {
      if (next === at) return;
      for (const bars of columns) {
        if (at >= 0) bars[at].classList.remove("on");
        if (next >= 0) bars[next].classList.add("on");
      }
      if (at >= 0) rows[at].classList.remove("shown");
      at = next;
      if (at < 0) { readout.replaceChildren(...resting); return; }
      rows[at].classList.add("shown");
      const said = words(rows[at]);
      const name = make("b", {}, rows[at].cells[0].textContent);
      readout.replaceChildren(name, " ", said.map(([title, text]) => `${title} ${text}`).join(" · "));
      plots[0].setAttribute("aria-valuenow", at + 1);
      plots[0].setAttribute("aria-valuetext", readout.textContent);
    };
    plots.forEach((plot, i) => {
      const area = plot.querySelector("svg");
      plot.addEventListener("pointermove", (event) => {
        const box = area.getBoundingClientRect();
        const share = (event.clientX - box.left) / box.width;
        point(share < 0 || share > 1 ? -1 : Math.min(rows.length - 1, Math.floor(share * rows.length)));
      });
      plot.addEventListener("pointerleave", () => point(-1));
      if (i) return;
      const said = { role: "slider", tabindex: 0, "aria-label": "Layer", "aria-valuemin": 1, "aria-valuemax": rows.length, "aria-valuenow": 1 };
      Object.entries(said).forEach(([key, text]) => plot.setAttribute(key, text));
      plot.addEventListener("keydown", (event) => {
        const steps = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + 10, PageDown: at - 10, Home: 0, End: rows.length - 1 };
        if (event.key === "Escape") point(-1);
        if (!(event.key in steps)) return;
        event.preventDefault();
        point(Math.min(rows.length - 1, Math.max(0, steps[event.key])));
      });
      plot.addEventListener("blur", () => point(-1));
    });
  }

  // -- what can be taken away
  for (const text of all("[data-copies]")) {
    const button = make("button", { type: "button" }, "Copy");
    const frame = make("div", { className: "copied" });
    text.replaceWith(frame);
    frame.append(text, button);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text); // no clipboard here: one key does the rest
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
  const save = document.getElementById("save");
  save.hidden = false;
  save.addEventListener("click", () => {
    const data = JSON.parse(document.getElementById("data").textContent);
    const link = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2), "\n"], { type: "application/json" }));
    make("a", { href: link, download: "report.json" }).click();
    setTimeout(() => URL.revokeObjectURL(link), 1000);
  });

  // -- paper shows what is folded away
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    folded.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
})();
