// The tabs below the picture: collectives, parameters, passes, comparison.

import { button, bytes, count, el, fill, table } from "./dom.js";
import { link } from "./details.js";

export function totals(collectives) {
  const found = new Map();
  for (const c of collectives) {
    const key = JSON.stringify([c.kind, c.mesh_dim, c.phase]);
    const t = found.get(key) ?? { kind: c.kind, mesh_dim: c.mesh_dim, phase: c.phase, number: 0, bytes: 0 };
    t.number += 1;
    t.bytes += c.bytes_on_wire;
    found.set(key, t);
  }
  return [...found.values()];
}

export function collectivesPanel(app) {
  const { collectives } = app.program.data;
  const all = collectives.reduce((sum, c) => sum + c.bytes_on_wire, 0);
  const sums = table([
    ["kind", (t) => t.kind], ["mesh dim", (t) => t.mesh_dim, (t) => el("span", {}, app.swatch(t.mesh_dim), ` ${t.mesh_dim}`)], ["phase", (t) => t.phase],
    ["how many", (t) => t.number, (t) => count(t.number), "n"], ["bytes on the wire", (t) => t.bytes, (t) => count(t.bytes), "n"],
  ], totals(collectives), { caption: `Totals: ${count(collectives.length)} collectives, ${count(all)} bytes on the wire per rank` });
  const rows = table([
    ["collective", (c) => c.name, (c) => link(app, c.name)], ["kind", (c) => c.kind], ["mesh dim", (c) => c.mesh_dim], ["phase", (c) => c.phase],
    ["dtype", (c) => c.dtype.replace("torch.", "")], ["elements", (c) => c.numel, (c) => count(c.numel), "n"],
    ["bytes on the wire", (c) => c.bytes_on_wire, (c) => count(c.bytes_on_wire), "n"],
    ["module", (c) => c.fqn], ["where", (c) => c.where], ["because of", (c) => c.why],
  ], collectives, { caption: "In program order" });
  sums.id = "totals";
  rows.id = "collectives";
  return el("div", {}, sums, rows);
}

export function parametersPanel(app) {
  const { parameters, plan } = app.program.data;
  return el("div", {}, table([
    ["parameter", (p) => p.fqn, (p) => (p.node ? link(app, p.node, p.fqn) : p.fqn)], ["stored", (p) => p.layout],
    ["plan", (p) => p.keys.join("; ")], ["bytes per rank", (p) => p.bytes_per_rank, (p) => count(p.bytes_per_rank), "n"],
    ["bytes", (p) => p.bytes, (p) => count(p.bytes), "n"], ["notes", (p) => [...p.aliases.map((a) => `= ${a}`), ...p.notes].join("; ")],
  ], parameters, { caption: `${count(parameters.length)} parameters: ${count(plan.bytes_per_rank)} bytes per rank, of ${count(plan.bytes)}` }),
    el("details", {}, el("summary", {}, "The plan's report as text"), el("pre", {}, plan.text)));
}

export function passesPanel(app) {
  const step = app.stage > 0 ? app.program.passes[app.stage - 1] : null;
  if (!step) return el("p", {}, "The program as it was traced: no pass has run. Move the slider above the picture.");
  const before = new Map(app.lines(app.stage - 1));
  const text = (line) => (line ? `${line[0]}${line[0] ? " = " : ""}${line[1]}` : "");
  const changes = [
    ...step.removed.map((name) => ({ how: "removed", name, was: text(before.get(name)), is: "" })),
    ...step.added.map(([name, ...line]) => ({ how: "added", name, was: "", is: text(line) })),
    ...step.changed.map(([name, ...line]) => ({ how: "changed", name, was: text(before.get(name)), is: text(line) })),
  ];
  const counts = Object.entries(step.counts).map(([k, n]) => `${k} ${count(n)}`).join(", ");
  return el("div", {},
    el("p", { class: "about" }, el("strong", {}, `${app.stage}. ${step.name}`), ` (${step.stage}), ${(step.seconds * 1e3).toFixed(1)} ms${counts ? `; ${counts}` : ""}${step.order ? "; values changed places" : ""}`),
    ...step.notes.map((note) => el("p", { class: "note" }, note)),
    table([
      ["", (c) => c.how], ["value", (c) => c.name, (c) => (app.has(c.name) ? link(app, c.name) : `%${c.name}`)],
      ["before", (c) => c.was, (c) => el("code", {}, c.was)], ["after", (c) => c.is, (c) => el("code", {}, c.is)],
    ], changes, { limit: 200, caption: changes.length ? `${count(step.removed.length)} removed, ${count(step.added.length)} added, ${count(step.changed.length)} changed` : "This pass changed nothing." }));
}

// What differs between two programs, values being joined by name.
export function difference(a, b) {
  const values = [];
  const names = new Map([...a.final.byName, ...b.final.byName].map(([name]) => [name, null]));
  for (const name of names.keys()) {
    const x = a.final.byName.get(name);
    const y = b.final.byName.get(name);
    if (x?.type !== y?.type || x?.op !== y?.op) values.push({ name, a: shown(x), b: shown(y), path: (x ?? y).path, phase: (x ?? y).phase });
  }
  const moves = new Map();
  for (const [side, program] of [["a", a], ["b", b]]) {
    for (const c of program.data.collectives) {
      const key = JSON.stringify([c.kind, c.mesh_dim, c.phase, c.fqn]);
      const at = moves.get(key) ?? { ...c, a: { number: 0, bytes: 0 }, b: { number: 0, bytes: 0 } };
      at[side].number += 1;
      at[side].bytes += c.bytes_on_wire;
      moves.set(key, at);
    }
  }
  const collectives = [...moves.values()].filter((m) => m.a.number !== m.b.number || m.a.bytes !== m.b.bytes);
  return { values, collectives };
}

const shown = (n) => (n ? `${n.type} = ${n.op}` : "");

export function comparePanel(app) {
  const box = el("div", {});
  const input = el("input", { type: "file", accept: ".json", "aria-label": "a dumped program to compare with", onchange: () => input.files[0] && app.load(input.files[0]) });
  const head = el("p", { class: "about" }, "Compare with a program dumped by program.dump(): ", input);
  const others = app.programs.filter((p) => p !== app.program);
  if (!others.length) return fill(box, head);
  const [a, b] = [app.program, others[0]];
  const { values, collectives } = difference(a, b);
  app.mark(values.map((v) => v.name));
  const sum = (p, of) => p.data.collectives.reduce((n, c) => n + of(c), 0);
  const facts = [
    ["collectives", (p) => p.data.collectives.length], ["bytes on the wire", (p) => sum(p, (c) => c.bytes_on_wire)],
    ["peak bytes per rank", (p) => p.data.memory.peak_bytes], ["bytes of parameters per rank", (p) => p.data.plan.bytes_per_rank],
  ].map(([name, of]) => ({ name, a: of(a), b: of(b) }));
  const sides = totals([...a.data.collectives, ...b.data.collectives]).map((t) => {
    const of = (p) => totals(p.data.collectives).find((u) => u.kind === t.kind && u.mesh_dim === t.mesh_dim && u.phase === t.phase)?.bytes ?? 0;
    return { name: `${t.kind} over ${t.mesh_dim}, ${t.phase}: bytes`, a: of(a), b: of(b) };
  });
  const go = (v) => (app.has(v.name) ? link(app, v.name) : `%${v.name}`);
  const number = (side) => (m) => `${m[side].number}: ${bytes(m[side].bytes)}`;
  const compared = table([
    ["", (f) => f.name], [`A: ${a.title}`, (f) => f.a, (f) => count(f.a), "n"], [`B: ${b.title}`, (f) => f.b, (f) => count(f.b), "n"],
    ["B - A", (f) => f.b - f.a, (f) => count(f.b - f.a), "n"],
  ], [...facts, ...sides], { caption: "Side by side" });
  const moved = table([
    ["collective", (m) => m.kind], ["mesh dim", (m) => m.mesh_dim], ["phase", (m) => m.phase], ["module", (m) => m.fqn],
    ["A", (m) => m.a.bytes, number("a"), "n"], ["B", (m) => m.b.bytes, number("b"), "n"],
  ], collectives, { caption: `${count(collectives.length)} places where collectives differ` });
  const laid = table([
    ["value", (v) => v.name, go], ["phase", (v) => v.phase], ["module", (v) => v.path],
    ["A", (v) => v.a, (v) => el("code", {}, v.a || "not there")], ["B", (v) => v.b, (v) => el("code", {}, v.b || "not there")],
  ], values, { limit: 200, caption: `${count(values.length)} values that differ, or are only in one` });
  moved.id = "moves-differ";
  laid.id = "values-differ";
  return fill(box, head, el("p", {}, "In the picture, what differs is outlined. ", button(`show B (${b.title}) in the picture`, () => app.use(b))), compared, moved, laid);
}
