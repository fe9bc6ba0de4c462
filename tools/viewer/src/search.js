// Finds values by words: each must occur in the name, FQN, operator, collective, phase or layout.

import { count, el, fill } from "./dom.js";
import { link } from "./details.js";

const FIELDS = {
  name: (n) => n.name,
  op: (n) => n.op,
  path: (n) => n.path,
  layout: (n) => n.type,
  kind: (n) => (n.collective ? n.collective.kind : n.moves),
  dim: (n) => n.collective?.mesh_dim ?? "",
  phase: (n) => n.phase,
  where: (n) => n.where,
  pass: (n) => n.made_by,
  param: (n) => n.param?.fqn ?? "",
};

export function find(nodes, text) {
  const words = text.trim().split(/\s+/).filter(Boolean).map(test);
  return words.length ? nodes.filter((n) => words.every((word) => word(n))) : [];
}

// `relu`, `kind:all_reduce`, `dim:tp`, `layout:@tp`, or a regular expression between slashes.
function test(word) {
  const [, field, rest] = /^(\w+):(.+)$/.exec(word) ?? [];
  if (field === "collective") return (n) => n.collective?.kind.includes(rest) ?? false;
  if (word === "collective") return (n) => n.isMove;
  const match = matcher(FIELDS[field] ? rest : word);
  if (FIELDS[field]) return (n) => match(FIELDS[field](n));
  const fields = Object.values(FIELDS);
  return (n) => fields.some((f) => match(f(n))) || (n.op === "input" && match(n.args));
}

function matcher(text) {
  const pattern = /^\/(.+)\/$/.exec(text)?.[1];
  if (pattern) {
    try {
      const regex = new RegExp(pattern, "i");
      return (value) => regex.test(value);
    } catch {
      return () => false;
    }
  }
  const low = text.toLowerCase();
  return (value) => value.toLowerCase().includes(low);
}

export class Search {
  constructor(app, input, status, results) {
    Object.assign(this, { app, input, status, results, found: [], at: -1 });
    let waiting = 0;
    input.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.run(), 80);
    });
    input.addEventListener("keydown", (e) => {
      if (e.key === "Enter") {
        clearTimeout(waiting);
        if (this.text !== input.value) this.run();
        this.go(e.shiftKey ? -1 : 1);
      } else if (e.key === "Escape") {
        input.value = "";
        this.run();
      }
    });
  }

  run() {
    const { app, input } = this;
    this.text = input.value;
    this.found = find(app.now.nodes, input.value);
    this.at = -1;
    this.status.textContent = input.value ? `${count(this.found.length)} of ${count(app.now.nodes.length)}` : "";
    this.results.hidden = !input.value;
    const shown = this.found.slice(0, 200).map((n) => el("li", {}, link(app, n.name), ` ${n.collective ? `${n.collective.kind} over ${n.collective.mesh_dim}` : n.op} `, el("small", {}, n.path)));
    fill(this.results, ...shown);
    this.mark();
  }

  // Closed boxes that hold something found are marked too.
  mark() {
    const { graph } = this.app;
    graph.marks.found = graph.boxesOf(this.found);
    graph.draw();
  }

  go(step) {
    if (!this.found.length) return;
    this.at = (this.at + step + this.found.length) % this.found.length;
    this.status.textContent = `${this.at + 1} of ${count(this.found.length)}`;
    this.app.reveal(this.found[this.at].name);
  }
}
