// The picture as a tree of words: for screen readers, and to go from module to module by keyboard.

import { el, fill } from "./dom.js";
import { labels } from "./layout.js";

export class Outline {
  constructor(app, box) {
    Object.assign(this, { app, box });
    box.addEventListener("keydown", (e) => this.key(e));
    box.addEventListener("click", (e) => {
      const row = e.target.closest("[role=treeitem]");
      if (row) this.pick(row, e.target.closest(".twist") !== null);
    });
  }

  draw() {
    const { graph } = this.app;
    this.items = new Map();
    const focused = this.box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    fill(this.box, ...graph.tree.root.items.map((item) => this.row(item, 1)));
    const rows = [...this.box.querySelectorAll("[role=treeitem]")];
    const current = rows.find((r) => r.dataset.key === focused) ?? rows.find((r) => r.getAttribute("aria-selected") === "true") ?? rows[0];
    if (current) current.tabIndex = 0;
    if (focused && current) current.focus();
  }

  row(item, level) {
    const { graph } = this.app;
    this.items.set(item.key, item);
    const open = item.kind !== "node" && graph.open.has(item.key);
    const [title, ...rest] = labels(item);
    const twist = el("span", { class: "twist", "aria-hidden": "true" }, item.kind === "node" ? "·" : open ? "▾" : "▸");
    const text = item.kind === "node" ? `${title}` : title;
    const head = el("span", { class: item.kind === "node" && item.node.isMove ? "row move" : "row" }, twist, text, el("small", {}, ` ${rest.join(", ")}`));
    const out = el("div", {
      role: "treeitem", "aria-level": level, "aria-selected": String(graph.marks.selected === item.key), tabindex: "-1",
      "aria-expanded": item.kind === "node" ? null : String(open), "aria-label": [title, ...rest].join(", "),
    }, head);
    out.dataset.key = item.key;
    if (open) {
      const inside = item.kind === "run" ? item.groups[item.current] : item;
      out.append(el("div", { role: "group" }, ...inside.items.map((i) => this.row(i, level + 1))));
    }
    return out;
  }

  pick(row, twist) {
    const item = this.items.get(row.dataset.key);
    if (twist || item.kind !== "node") this.app.graph.toggle(item);
    this.app.graph.select(item, true);
  }

  // Only marks which row is chosen.
  mark(key) {
    for (const row of this.box.querySelectorAll("[aria-selected=true]")) row.setAttribute("aria-selected", "false");
    const row = [...this.box.querySelectorAll("[role=treeitem]")].find((r) => r.dataset.key === key);
    if (!row) return;
    row.setAttribute("aria-selected", "true");
    row.firstElementChild.scrollIntoView({ block: "nearest" });
  }

  key(e) {
    const row = e.target.closest("[role=treeitem]");
    if (!row) return;
    const rows = [...this.box.querySelectorAll("[role=treeitem]")];
    const i = rows.indexOf(row);
    const item = this.items.get(row.dataset.key);
    const { graph } = this.app;
    const open = graph.open.has(item.key);
    const focus = (r) => {
      if (!r) return;
      row.tabIndex = -1;
      r.tabIndex = 0;
      r.focus();
    };
    const keys = {
      ArrowDown: () => focus(rows[i + 1]),
      ArrowUp: () => focus(rows[i - 1]),
      Home: () => focus(rows[0]),
      End: () => focus(rows.at(-1)),
      ArrowRight: () => (item.kind !== "node" && !open ? graph.toggle(item, true) : focus(rows[i + 1])),
      ArrowLeft: () => (open ? graph.toggle(item, false) : focus(row.parentElement.closest("[role=treeitem]"))),
      Enter: () => this.pick(row, false),
      " ": () => this.pick(row, false),
    };
    if (!keys[e.key]) return;
    keys[e.key]();
    e.preventDefault();
    e.stopPropagation();
  }
}
