// Nodes folded by module: phases, then the parts of FQNs; equal numbered siblings are one run; long lists are cut.

const MOST = 80; // children of one group; beyond, they are cut into parts
const PART = 40;
const ORDER = ["forward", "backward", "optimizer"];

export class Group {
  constructor(key, label, parent) {
    Object.assign(this, { kind: "group", key, label, parent, items: [], nodes: [], phase: parent?.phase ?? "", path: "" });
  }
}

// Equal groups, of which one is shown for all.
class Run {
  constructor(parent, groups) {
    Object.assign(this, { kind: "run", key: `${groups[0].key}×`, parent, groups, current: 0, phase: parent.phase });
    for (const g of groups) g.run = this;
  }
  show(group) {
    this.current = this.groups.indexOf(group);
  }
}

export function buildTree(nodes) {
  const root = new Group("", "program", null);
  const phases = [...new Set(nodes.map((n) => n.phase))].sort((a, b) => rank(a) - rank(b));
  const groups = new Map();
  for (const phase of phases) {
    const group = new Group(phase, phase, root);
    group.phase = phase;
    groups.set(phase, group);
    root.items.push(group);
  }
  const places = new Map();
  for (const node of nodes) {
    const key = `${node.phase}/${node.path}`;
    if (!places.has(key)) places.set(key, chain(node, groups, root));
    const around = places.get(key);
    for (const group of around) group.nodes.push(node);
    node.group = around.at(-1);
    node.group.items.push({ kind: "node", key: node.name, node });
  }
  for (const group of [...root.items]) finish(group);
  return { root, groups };
}

const rank = (phase) => (ORDER.indexOf(phase) + ORDER.length + 1) % (ORDER.length + 1);

// The groups around a node, outermost first; made where they are not there yet.
function chain(node, groups, root) {
  let group = groups.get(node.phase);
  const out = [root, group];
  let path = "";
  for (const part of node.path ? node.path.split(".") : []) {
    path = path ? `${path}.${part}` : part;
    const key = `${node.phase}/${path}`;
    let next = groups.get(key);
    if (!next) {
      next = new Group(key, part, group);
      next.path = path;
      groups.set(key, next);
      group.items.push(next);
    }
    group = next;
    out.push(group);
  }
  return out;
}

function finish(group) {
  for (const item of group.items) if (item.kind === "group") finish(item);
  group.items = runsOf(group);
  group.items = parts(group, group.items);
}

// Numbered children with the same contents, shown as one.
function runsOf(group) {
  const alike = new Map();
  for (const item of group.items) {
    if (item.kind !== "group" || !/^\d+$/.test(item.label)) continue;
    const s = signature(item);
    if (!alike.has(s)) alike.set(s, []);
    alike.get(s).push(item);
  }
  const out = [];
  for (const item of group.items) {
    const same = item.kind === "group" ? alike.get(item.signature) : null;
    if (!same || same.length < 2) out.push(item);
    else if (same[0] === item) {
      out.push(new Run(group, same));
    }
  }
  return out;
}

function parts(group, items) {
  if (items.length <= MOST) return items;
  const size = Math.max(PART, Math.ceil(items.length / MOST));
  const out = [];
  const total = Math.ceil(items.length / size);
  for (let i = 0; i < items.length; i += size) {
    const part = new Group(`${group.key}#${i}`, `part ${out.length + 1} of ${total}`, group);
    part.path = group.path;
    part.isPart = true;
    part.items = items.slice(i, i + size);
    for (const item of part.items) adopt(item, part);
    part.items = parts(part, part.items);
    out.push(part);
  }
  return out;
}

function adopt(item, part) {
  if (item.kind === "node") {
    item.node.group = part;
    part.nodes.push(item.node);
    return;
  }
  item.parent = part;
  const members = item.kind === "run" ? item.groups : [item];
  for (const g of members) {
    g.parent = part;
    part.nodes.push(...g.nodes);
  }
}

const numbers = new Map();
const words = new Map();
const number = (table, text) => table.get(text) ?? (table.set(text, table.size), table.size - 1);

// Where a node stands in a list, or -1.
function positions(nodes) {
  const low = nodes.reduce((m, n) => Math.min(m, n.index), Infinity);
  const high = nodes.reduce((m, n) => Math.max(m, n.index), -1);
  const at = new Int32Array(Math.max(0, high - low + 1)).fill(-1);
  nodes.forEach((n, i) => (at[n.index - low] = i));
  return (n) => at[n.index - low] ?? -1;
}

// Equal for groups that hold the same operators with the same layouts, wired alike.
export function signature(group) {
  if (group.signature !== undefined) return group.signature;
  const at = positions(group.nodes);
  const codes = [];
  for (const n of group.nodes) {
    codes.push(number(words, `${n.op}|${n.type}|${n.path.slice(group.path.length)}`));
    for (const input of n.from) codes.push(-2 - at(input));
  }
  return (group.signature = number(numbers, codes.join()));
}

// What a group holds, in short.
export function summary(group) {
  if (group.summary) return group.summary;
  const moves = new Map();
  let moved = 0;
  for (const n of group.nodes) {
    if (!n.isMove) continue;
    if (n.collective) moved += n.collective.bytes_on_wire;
    moves.set(n.moves, (moves.get(n.moves) ?? 0) + 1);
  }
  const held = group.nodes.reduce((sum, n) => sum + (n.param?.bytes_per_rank ?? 0), 0);
  return (group.summary = { moves, moved, held, values: group.nodes.length });
}

export const ancestors = (item) => {
  const out = [];
  for (let g = item; g; g = g.parent) out.push(g);
  return out;
};
