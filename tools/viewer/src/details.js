// What is known of one value, one group, or the whole program.

import { button, bytes, count, el, fill } from "./dom.js";
import { titleOf } from "./layout.js";
import { summary } from "./tree.js";

export function details(panel, app, item) {
  if (!item) return fill(panel, ...overview(app));
  if (item.kind === "node") return fill(panel, ...valueDetails(app, item.node));
  return fill(panel, ...groupDetails(app, item));
}

const row = (name, ...value) => [el("dt", {}, name), el("dd", {}, ...value)];
const list = (...rows) => el("dl", {}, ...rows.flat());

export const link = (app, name, text = `%${name}`) => button(text, () => app.reveal(name), { class: "link", title: `go to %${name}` });

function valueDetails(app, n) {
  const { program } = app;
  const c = n.collective;
  const source = program.data.sources[`${n.file}:${n.line}`];
  const place = n.file ? `${n.file}:${n.line}` : "";
  return [
    el("h2", {}, c ? `${c.kind} over ${c.mesh_dim}` : `%${n.name}`),
    el("pre", { class: "line" }, `%${n.name}: ${n.type} = ${n.op === "input" ? n.args : `${n.op}(${n.args})`}`),
    c ? collectiveDetails(c, program.again.has(n.name)) : null,
    n.param ? paramDetails(n.param) : null,
    list(
      place ? row("source", el("code", { class: "where" }, place), el("div", {}, n.where)) : [],
      row("module", n.path || "the root"),
      row("phase", n.phase + (n.recompute ? `, recomputed in backward (${n.recompute})` : "")),
      n.made_by ? row("made by", n.made_by) : [],
      ...n.results.map((r, i) => row(n.results.length > 1 ? `result ${i}` : "layout", resultText(r))),
      n.bytes ? row("bytes per rank", count(n.bytes)) : [],
      n.flops ? row("operations", count(n.flops)) : [],
    ),
    source ? el("pre", { class: "source", "aria-label": "source line" }, source) : null,
    el("h3", {}, "Why it lies so"),
    ...chains(app, n),
    el("h3", {}, `Inputs (${n.inputs.length})`),
    names(app, n.inputs),
    el("h3", {}, `Users (${n.users.length})`),
    names(app, n.users),
  ];
}

function resultText(r) {
  const local = r.local_shape.join(" × ") || "scalar";
  if (!r.shape) return `${r.dtype}, ${local} on rank 0: a step inside one operator's local form`;
  return `${r.dtype}${r.layout}: ${r.shape.join(" × ") || "scalar"} in all, ${local} on rank 0`;
}

function collectiveDetails(c, again) {
  return list(
    row("bytes on the wire", `${count(c.bytes_on_wire)} per rank`),
    row("elements", `${count(c.numel)} of ${c.dtype.replace("torch.", "")}`),
    row("because of", c.why || "?"),
    again ? row("again", "backward computes this again, and moves as much once more") : [],
  );
}

function paramDetails(p) {
  return list(
    row("parameter", p.fqn, ...p.aliases.map((a) => el("div", {}, `= ${a}`))),
    row("plan", ...(p.keys.length ? p.keys.map((k) => el("div", {}, el("code", {}, k))) : ["no entry: whole on every rank"])),
    row("bytes", `${count(p.bytes_per_rank)} per rank, of ${count(p.bytes)}`),
    ...p.notes.map((note) => row("note", note)),
  );
}

function chains(app, n) {
  const found = app.program.explain(n.name);
  if (!found.length) return [el("p", {}, "Whole on every rank: no mesh dim splits it.")];
  return found.map(({ axis, steps }) =>
    el("details", { class: "chain", open: true }, el("summary", {}, app.swatch(axis), ` over ${axis}`),
      el("ol", {}, ...steps.map((s) => el("li", {}, s.name ? link(app, s.name) : null, ` ${s.text}`)))),
  );
}

function names(app, all) {
  if (!all.length) return el("p", {}, "none");
  const items = all.slice(0, 40).map((name) => {
    const node = app.now.byName.get(name);
    return el("li", {}, link(app, name), ` ${node ? node.type : ""}`);
  });
  if (all.length > 40) items.push(el("li", {}, `and ${all.length - 40} more`));
  return el("ul", { class: "names" }, ...items);
}

function groupDetails(app, item) {
  const group = item.kind === "run" ? item.groups[item.current] : item;
  const { moves, moved, held, values } = summary(group);
  return [
    el("h2", {}, group.path || titleOf(item)),
    item.kind === "run" ? runPicker(app, item) : null,
    button(app.graph.open.has(item.key) ? "close" : "open", () => (app.graph.toggle(item), app.graph.select(item))),
    list(
      row("phase", group.phase),
      row("values", count(values)),
      held ? row("parameters", `${count(held)} bytes per rank (${bytes(held)})`) : [],
      ...[...moves].map(([kind, n]) => row(kind, String(n))),
      moved ? row("bytes on the wire", count(moved)) : [],
    ),
    el("h3", {}, "Collectives in it"),
    names(app, group.nodes.filter((n) => n.collective).map((n) => n.name)),
    el("h3", {}, "Parameters in it"),
    names(app, group.nodes.filter((n) => n.param).map((n) => n.name)),
  ];
}

function runPicker(app, run) {
  const pick = el("select", { onchange: () => app.pickInstance(run, Number(pick.value)), "aria-label": "which of the equal modules to show" });
  run.groups.forEach((g, i) => pick.append(el("option", { value: i, selected: i === run.current }, g.path)));
  return el("p", {}, `${run.groups.length} equal modules; shown: `, pick);
}

function overview(app) {
  const { program } = app;
  const { data } = program;
  return [
    el("h2", {}, program.title),
    el("p", {}, "Choose a box. A click opens and closes a module; the wheel zooms, dragging moves; arrow keys go from box to box, Enter opens."),
    list(
      row("values", count(program.final.nodes.length)),
      row("collectives", count(data.collectives.length)),
      row("bytes on the wire", count(data.collectives.reduce((sum, c) => sum + c.bytes_on_wire, 0))),
      row("peak bytes per rank", el("span", { id: "peak" }, count(data.memory.peak_bytes))),
      row("parameters per rank", `${count(data.plan.bytes_per_rank)} bytes, of ${count(data.plan.bytes)}`),
      row("program", el("code", {}, data.hash)),
    ),
    ...[...data.plan.unmatched.map((k) => `plan key matches nothing: ${k}`), ...data.plan.warnings, ...data.notes].map((t) => el("p", { class: "note" }, t)),
  ];
}

// The ranks of a mesh as a grid, the last mesh dim across; those that take part with rank 0 in a collective are marked.
export function meshPicture(app, axis) {
  const dims = app.program.data.mesh;
  const size = dims.reduce((n, d) => n * d.size, 1);
  const across = dims.at(-1)?.size ?? 1;
  const stride = {};
  dims.reduceRight((n, d) => ((stride[d.name] = n), n * d.size), 1);
  const shown = Math.min(size, 64);
  const part = dims.some((d) => d.name === axis) ? null : /^(.*)\/(\d+)$/.exec(axis ?? ""); // dp/2: every two ranks of dp
  const along = part ? part[1] : axis;
  const cells = Array.from({ length: shown }, (_, r) => {
    const at = (d) => Math.floor(r / stride[d.name]) % d.size;
    const with0 = axis && dims.every((d) => at(d) === 0 || (d.name === along && (!part || at(d) < Number(part[2]))));
    return el("span", { class: with0 ? "rank on" : "rank", title: dims.map((d) => `${d.name}=${at(d)}`).join(" ") }, String(r));
  });
  const grid = el("div", { class: "ranks", role: "img", "aria-label": `${size} ranks: ${dims.map((d) => `${d.name}=${d.size}`).join(", ")}` }, ...cells);
  grid.style.gridTemplateColumns = `repeat(${Math.min(across, 16)}, auto)`;
  const legend = dims.map((d) => el("li", {}, app.swatch(d.name), ` ${d.name}=${d.size}`));
  return [grid, size > shown ? el("p", {}, `and ${count(size - shown)} ranks more`) : null, el("ul", { class: "legend" }, ...legend)];
}
