// Where boxes stand: dagre lays out the items of each expanded group, inside out.

import * as dagre from "@dagrejs/dagre";
import { summary } from "./tree.js";
import { bytes, count } from "./dom.js";

const CHAR = 7;
const HEAD = 26;
const PAD = 12;

// What a box says: [title, second line, third line].
export function labels(item) {
  if (item.kind === "node") return nodeLabels(item.node);
  const group = item.kind === "run" ? item.groups[item.current] : item;
  const { moves, moved, held, values } = summary(group);
  const kinds = [...moves].map(([kind, n]) => `${n} ${kind}`).join(", ");
  const lines = [short(titleOf(item)), `${count(values)} values${held ? `, ${bytes(held)} of parameters` : ""}`];
  if (kinds) lines.push(kinds + (moved ? `: ${bytes(moved)}` : ""));
  return lines;
}

export function titleOf(item) {
  if (item.kind === "node") return item.node.name;
  if (item.kind !== "run") return item.label;
  const numbers = item.groups.map((g) => Number(g.label));
  const step = Math.sign(numbers.at(-1) - numbers[0]);
  const row = numbers.every((n, i) => n === numbers[0] + i * step);
  const names = row ? `${numbers[0]} … ${numbers.at(-1)}` : numbers.length > 4 ? `${numbers.slice(0, 3).join(", ")} … ${numbers.at(-1)}` : numbers.join(", ");
  return `${names}  ×${numbers.length}`;
}

const short = (text, most = 46) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function nodeLabels(n) {
  if (n.param) return [`param ${n.path && n.param.fqn.startsWith(`${n.path}.`) ? n.param.fqn.slice(n.path.length + 1) : n.param.fqn}`, short(n.type)];
  if (n.op === "input") return [n.args.length > 34 ? `…${n.args.slice(-33)}` : n.args, short(n.type)];
  if (!n.isMove) return [short(n.op.replace("aten.", "")), short(n.type)];
  const c = n.collective;
  const what = n.op === "shardc.start" ? `start ${n.moves}` : n.moves;
  return c ? [`${what} over ${c.mesh_dim}`, short(n.type), `${bytes(c.bytes_on_wire)} on the wire`] : [what, short(n.type)];
}

function sizeOf(item) {
  const lines = labels(item);
  const longest = Math.max(...lines.map((line) => line.length));
  const w = Math.min(360, Math.max(item.kind === "node" ? 80 : 130, longest * CHAR + 24));
  return { w: Math.ceil(w / 10) * 10, h: 12 + lines.length * 15 };
}

// Edges between the items of one group, each once with how many values pass.
function edgesOf(group) {
  if (group.edges) return group.edges;
  const total = group.nodes.reduce((most, n) => Math.max(most, n.index), 0) + 1;
  const at = new Int32Array(total).fill(-1);
  group.items.forEach((item, i) => {
    const nodes = item.kind === "node" ? [item.node] : item.kind === "run" ? item.groups.flatMap((g) => g.nodes) : item.nodes;
    for (const n of nodes) at[n.index] = i;
  });
  const found = new Map();
  const size = group.items.length;
  for (const n of group.nodes) {
    const to = at[n.index];
    for (const input of n.from) {
      const from = at[input.index] ?? -1;
      if (from < 0 || to < 0 || from === to) continue;
      found.set(from * size + to, (found.get(from * size + to) ?? 0) + 1);
    }
  }
  return (group.edges = [...found].map(([k, n]) => [Math.floor(k / size), k % size, n]));
}

const shown = (item) => (item.kind === "run" ? item.groups[item.current] : item);

// {w, h, boxes, edges} of a group's inside, with places relative to its corner. open: keys of expanded items.
export function layout(group, open) {
  const state = stateOf(group, open);
  if (group.laid?.state === state) return group.laid;
  const inner = group.items.map((item) => (item.kind !== "node" && open.has(item.key) ? layout(shown(item), open) : null));
  const sizes = group.items.map((item, i) => (inner[i] ? framed(inner[i], item) : sizeOf(item)));
  if (group.parent === null) return (group.laid = { state, ...besides(group, sizes, inner), group });
  const { near, far } = spans(edgesOf(group), group.items.length);
  const g = new dagre.graphlib.Graph();
  g.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 28, edgesep: 8 });
  g.setDefaultEdgeLabel(() => ({}));
  sizes.forEach(({ w, h }, i) => g.setNode(String(i), { width: w, height: h }));
  for (const [a, b] of near) g.setEdge(String(a), String(b), {});
  dagre.layout(g);
  const boxes = group.items.map((item, i) => {
    const { x, y, width, height } = g.node(String(i));
    return { item, x: x - width / 2, y: y - height / 2, w: width, h: height, inner: inner[i] };
  });
  const lines = near.map(([a, b, n]) => ({ points: g.edge(String(a), String(b)).points, n, from: group.items[a], to: group.items[b] }));
  const w = Math.max(g.graph().width ?? 0, 0) + (far.length ? 2 * ASIDE : 0);
  for (const [a, b, n] of far) lines.push({ points: aside(boxes[a], boxes[b], w - ASIDE), n, far: true });
  group.laid = { state, w, h: Math.max(g.graph().height ?? 0, 0), boxes, edges: lines, group };
  return group.laid;
}

// Edges over many ranks cost the layout most and say least: it gets the near ones only, and the far ones go by the
// side. What is far below stays below, as the near edges on the longest way lead there too.
function spans(edges, size) {
  const ranks = new Int32Array(size);
  const out = Array.from({ length: size }, () => []);
  for (const edge of edges) out[edge[0]].push(edge);
  for (let a = 0; a < size; a++) for (const [, b] of out[a]) if (b > a) ranks[b] = Math.max(ranks[b], ranks[a] + 1);
  const span = ([a, b]) => ranks[b] - ranks[a];
  const near = edges.filter((e) => span(e) <= FAR);
  const tied = new Set(near.flatMap(([a, b]) => [a, b]));
  const far = [];
  for (const edge of edges) {
    if (span(edge) <= FAR) continue;
    if (tied.has(edge[0]) && tied.has(edge[1])) far.push(edge);
    else near.push(edge);
    tied.add(edge[0]).add(edge[1]);
  }
  return { near, far };
}

const FAR = 7; // ranks
const ASIDE = 14;

function aside(a, b, x) {
  const from = { x: a.x + a.w, y: a.y + a.h - 8 };
  const to = { x: b.x + b.w, y: b.y + 8 };
  return [from, { x, y: from.y + 10 }, { x, y: to.y - 10 }, to];
}

// Phases stand side by side.
function besides(group, sizes, inner) {
  let x = 0;
  const boxes = group.items.map((item, i) => {
    const box = { item, x, y: 0, ...sizes[i], inner: inner[i] };
    x += box.w + 60;
    return box;
  });
  return { w: Math.max(0, x - 60), h: Math.max(0, ...sizes.map((s) => s.h)), boxes, edges: [] };
}

const framed = (inner, item) => ({ w: Math.max(inner.w + 2 * PAD, (titleOf(item).length + (item.kind === "run" ? shown(item).path.length + 6 : 0)) * CHAR + 40), h: inner.h + HEAD + PAD });

function stateOf(group, open) {
  const keys = [];
  for (const item of group.items) {
    if (item.kind === "node" || !open.has(item.key)) continue;
    keys.push(`${item.key}:${item.current ?? ""}(${stateOf(shown(item), open)})`);
  }
  return keys.join();
}

// All boxes and edges in one frame: outer ones first. depth: how many groups are around a box.
export function flatten(laid, x = 0, y = 0, depth = 0, out = { boxes: [], edges: [], byKey: new Map() }) {
  for (const e of laid.edges) out.edges.push({ ...e, points: e.points.map((p) => ({ x: p.x + x, y: p.y + y })) });
  for (const b of laid.boxes) {
    const box = { item: b.item, x: b.x + x, y: b.y + y, w: b.w, h: b.h, open: Boolean(b.inner), depth };
    out.boxes.push(box);
    out.byKey.set(b.item.key, box);
    if (b.inner) flatten(b.inner, box.x + (b.w - b.inner.w) / 2, box.y + HEAD, depth + 1, out);
  }
  return out;
}
