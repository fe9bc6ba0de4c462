// A program as the page uses it: nodes with users, layouts and collectives, at any pass.

export const COLLECTIVES = ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"];

// A value: what the data says of it, and what the page adds.
class Node {
  constructor(n) {
    this.name = n.name;
    this.op = n.op;
    this.argsMade = n.args;
    this.moves = n.moves;
    this.type = n.type;
    this.results = n.results;
    this.inputs = n.inputs;
    this.path = n.path;
    this.phase = n.phase;
    this.where = n.where;
    this.file = n.file;
    this.line = n.line;
    this.made_by = n.made_by;
    this.recompute = n.recompute;
    this.origin = n.origin;
    this.bytes = n.bytes;
    this.flops = n.flops;
    this.replayed = n.replayed ?? false;
    this.layout = n.replayed ? layoutOfText(n.type) : layoutOf(n);
    this.index = 0;
    this.from = [];
    this.users = [];
    this.collective = this.param = this.group = null;
    this.isMove = false;
  }

  get args() {
    if (typeof this.argsMade === "function") this.argsMade = this.argsMade();
    return this.argsMade;
  }
}

export class Program {
  constructor({ title, data, timeline }) {
    Object.assign(this, { title, data, timeline });
    this.axes = data.mesh.map((dim) => dim.name);
    this.moves = new Map([...data.collectives].reverse().map((c) => [c.name, c]));
    this.again = new Set(data.collectives.filter((c) => this.moves.get(c.name) !== c).map((c) => c.name));
    this.inputs = new Map(data.inputs.map((i) => [i.node, i]));
    this.params = new Map(data.parameters.map((p) => [p.node, p]));
    this.stages = new Map();
    this.final = this.link((data.lateNodes ?? data.nodes).map((n) => new Node(n)));
  }

  get passes() {
    return this.data.passes;
  }

  // The program after `k` passes; the last is the program itself.
  at(k) {
    if (k >= this.passes.length) return this.final;
    if (!this.stages.has(k)) {
      this.stages.clear();
      this.stages.set(k, this.link(replayed(this.data, k, this.final)));
    }
    return this.stages.get(k);
  }

  // Numbers, users and collectives of a list of nodes.
  link(nodes) {
    const byName = new Map();
    nodes.forEach((n, i) => {
      n.index = i;
      n.collective = this.moves.get(n.name) ?? null;
      n.isMove = n.collective !== null || (n.replayed && n.moves !== "");
      n.param = this.params.get(n.name) ?? null;
      byName.set(n.name, n);
    });
    for (const n of nodes) {
      n.from = n.inputs.map((name) => byName.get(name)).filter(Boolean);
      for (const input of n.from) input.users.push(n.name);
    }
    return { nodes, byName };
  }

  // The lines of explain, as the compiler prints them.
  explain(name) {
    const { reasons } = this.data;
    const out = [];
    const axes = Object.keys(reasons[name]?.from ?? {});
    for (const axis of axes) out.push({ axis, steps: this.chain(name, axis) });
    return out;
  }

  chain(name, axis) {
    const { reasons } = this.data;
    const steps = [];
    for (let i = 0; i < 40; i++) {
      const at = reasons[name];
      const source = at.from[axis] ?? null;
      const how = at.rule ? ` (rule ${at.rule})` : "";
      let text;
      if (at.op === "input") text = `is ${this.inputs.get(name)?.is ?? "an input"}, laid out so by ${at.why || "its default"}`;
      else if (at.why) text = `was laid out so by ${at.why}`;
      else if (!source) text = `= ${at.op}${how}: the split begins here`;
      else text = `= ${at.op}${how}, from %${source}: ${reasons[source].layout}`;
      steps.push({ name, text });
      if (!source) return steps;
      name = source;
    }
    return [...steps, { name: null, text: "..." }];
  }
}

// Which mesh dims split a value and over which it is pending: of its first result.
const layouts = new WeakMap(); // equal results are one object

function layoutOf(node) {
  const first = node.results[0];
  if (!first || first.layout === null) return NO_LAYOUT;
  if (!layouts.has(first)) layouts.set(first, { split: Object.keys(first.split), pending: Object.keys(first.pending) });
  return layouts.get(first);
}

const NO_LAYOUT = { split: [], pending: [] };

function layoutOfText(type) {
  const [, dims = "", tail = ""] = /\[(.*?)\]([^,)]*)/.exec(type) ?? [];
  const split = [...dims.matchAll(/@([^\s,)]+)/g)].flatMap((m) => m[1].split("."));
  const pending = tail.split("+").slice(1).map((p) => /\((.*)$/.exec(p)?.[1] ?? p);
  return { split, pending };
}

const REFERENCE = /%(\w+)/g;

// Lines after k passes, as nodes. What no longer exists at the end lies where its neighbours lie.
function replayed(data, k, final) {
  let lines = new Map(data.traced.map(([name, type, body]) => [name, [type, body]]));
  for (const step of data.passes.slice(0, k)) lines = after(lines, step);
  const nodes = [];
  const later = new Map(final.nodes.filter((n) => n.origin).map((n) => [n.origin, n]));
  for (const [name, [type, body]] of lines) {
    if (name !== "return") nodes.push(nodeOf(name, type, body, lines, final.byName.get(name) ?? later.get(name)));
  }
  const byName = new Map(nodes.map((n) => [n.name, n]));
  const users = usersOf(nodes);
  for (const n of [...nodes].reverse()) settle(n, users.get(n.name) ?? []);
  for (const n of nodes) {
    settle(n, n.inputs.map((i) => byName.get(i)));
    n.path ??= "";
    n.phase ??= "forward";
  }
  return nodes;
}

export function after(lines, step) {
  const changed = new Map(step.changed.map(([name, ...line]) => [name, line]));
  const gone = new Set(step.removed);
  const follows = new Map();
  for (const [name, type, body, last] of step.added) {
    if (!follows.has(last)) follows.set(last, []);
    follows.get(last).push([name, [type, body]]);
  }
  const out = new Map();
  const put = (name, line) => {
    if (line) out.set(name, line);
    for (const [n, l] of follows.get(name) ?? []) put(n, l);
  };
  put("", null);
  for (const [name, line] of lines) if (!gone.has(name)) put(name, changed.get(name) ?? line);
  return step.order ? new Map(step.order.map((name) => [name, out.get(name)])) : out;
}

// known: the node of the end that this one is, or becomes.
function nodeOf(name, type, body, lines, known) {
  const [text, made_by = ""] = splitLast(body, "  # ");
  const open = text.indexOf("(");
  const isInput = open < 0 || known?.op === "input";
  const op = isInput ? "input" : text.slice(0, open);
  const short = op.replace("shardc.", "");
  const moves = COLLECTIVES.includes(short) ? short : op === "shardc.start" ? (COLLECTIVES.find((c) => text.includes(`, ${c}, `)) ?? "") : "";
  const args = isInput ? text : text.slice(open + 1, -1);
  const inputs = isInput ? [] : [...new Set([...args.matchAll(REFERENCE)].map((m) => m[1]))].filter((n) => lines.has(n));
  const keep = known && !isInput ? { where: known.where, file: known.file, line: known.line } : { where: "", file: "", line: 0 };
  const rest = { results: [], bytes: 0, flops: 0, recompute: "", origin: "", path: known?.path, phase: known?.phase };
  return new Node({ name, op, args, moves, type, made_by, inputs, ...keep, ...rest, replayed: true });
}

function splitLast(text, mark) {
  const at = text.lastIndexOf(mark);
  return at < 0 ? [text] : [text.slice(0, at), text.slice(at + mark.length)];
}

function usersOf(nodes) {
  const users = new Map();
  for (const n of nodes) for (const i of n.inputs) (users.get(i) ?? users.set(i, []).get(i)).push(n);
  return users;
}

function settle(n, near) {
  n.path ??= near.find((m) => m?.path !== undefined)?.path;
  if (near.length && near.every((m) => m?.phase === "backward")) n.phase ??= "backward";
  n.phase ??= near.find((m) => m?.phase && m.phase !== "backward")?.phase;
}
