// Elements and numbers. Data reaches the page as text nodes and attributes only.

export function el(tag, attributes = {}, ...children) {
  const out = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) out.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) out.setAttribute(key, value === true ? "" : value);
  }
  out.append(...children.filter((child) => child != null));
  return out;
}

export function fill(parent, ...children) {
  parent.replaceChildren(...children.filter((child) => child != null));
  return parent;
}

export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

export const count = (n) => n.toLocaleString("en-US");

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  let x = n;
  while (x >= 1024 && i < units.length - 1) {
    x /= 1024;
    i++;
  }
  return `${i && x < 100 ? x.toFixed(1) : Math.round(x)} ${units[i]}`;
}

export function seconds(s) {
  if (s >= 1) return `${s.toFixed(3)} s`;
  if (s >= 1e-3) return `${(s * 1e3).toFixed(3)} ms`;
  return `${(s * 1e6).toFixed(1)} µs`;
}

export function download(name, blob) {
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// A table whose heads sort it. columns: [title, value of a row, shown text or element of a row (optional), "n" for numbers]
export function table(columns, rows, options = {}) {
  const limit = options.limit ?? 300;
  const state = { by: -1, up: true, all: false };
  const body = el("tbody");
  const heads = columns.map(([title], i) =>
    el("th", { scope: "col", "aria-sort": "none" }, button(title, () => sortBy(i))),
  );
  const more = button("", () => ((state.all = true), draw()), { class: "more" });
  const box = el("div", { class: "table" }, el("table", {}, options.caption ? el("caption", {}, options.caption) : null, el("thead", {}, el("tr", {}, ...heads)), body), more);

  function sortBy(i) {
    state.up = state.by === i ? !state.up : columns[i][3] !== "n";
    state.by = i;
    heads.forEach((h, k) => h.setAttribute("aria-sort", k === i ? (state.up ? "ascending" : "descending") : "none"));
    draw();
  }
  function draw() {
    const value = state.by >= 0 ? columns[state.by][1] : null;
    const sorted = value ? [...rows].sort((a, b) => compare(value(a), value(b)) * (state.up ? 1 : -1)) : rows;
    const shown = state.all ? sorted : sorted.slice(0, limit);
    fill(body, ...shown.map((row) => line(row)));
    more.hidden = shown.length === rows.length;
    more.textContent = `show all ${count(rows.length)} rows`;
  }
  function line(row) {
    const cells = columns.map(([, value, show, kind]) => el("td", kind === "n" ? { class: "n" } : {}, show ? show(row) : String(value(row))));
    return el("tr", {}, ...cells);
  }
  draw();
  return box;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}
