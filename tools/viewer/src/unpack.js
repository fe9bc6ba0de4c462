// Undoes tools/pack.py: columns and distances become a program as docs/viewer.md describes it.

const MARK = "\x01";

const sums = (list) => {
  let at = 0;
  return list.map((d) => (at += d));
};

// A list of [count, item, ...] runs, read one run at a time.
const runs = (flat) => {
  let at = 0;
  return () => {
    const n = flat[at];
    const out = flat.slice(at + 1, at + 1 + n);
    at += n + 1;
    return out;
  };
};

export async function unpackText(base64) {
  const text = atob(base64.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

export function unpack(packed) {
  if (!packed.packed) return packed;
  const { names, strings, packed: _, ...data } = packed;
  const fill = (text, own, refs) => {
    let i = 0;
    return text.includes(MARK) ? text.replaceAll(MARK, () => "%" + names[own - refs[i++]]) : text;
  };
  const lines = (columns) => {
    const own = sums(columns.name);
    const refs = runs(columns.refs);
    return own.map((n, i) => {
      const row = [names[n], strings[columns.type[i]], fill(strings[columns.body[i]], n, refs())];
      if (columns.after.length) row.push(columns.after[i] ? names[n - columns.after[i]] : "");
      return row;
    });
  };
  const some = (list) => sums(list).map((n) => names[n]);
  const passes = packed.passes.map((step) =>
    lazily({ ...step }, {
      removed: () => some(step.removed),
      changed: () => lines(step.changed),
      added: () => lines(step.added),
      ...(step.order ? { order: () => some(step.order) } : {}),
    }),
  );
  const unpacked = lazily({ ...data, passes }, {
    returned: () => fill(strings[packed.returned[0]], packed.nodes.name[0] ?? 0, packed.returned[1]),
    reasons: () => unpackReasons(packed.reasons, names, strings),
    traced: () => lines(packed.traced),
    memory: () => ({ ...packed.memory, halves: packed.memory.halves.map((half) => unpackHalf(half, names)) }),
  });
  // Not kept: the page makes its own nodes of them, and asks for the text of their arguments when it is shown.
  const nodes = (late) => unpackNodes(packed.nodes, names, strings, fill, late);
  Object.defineProperty(unpacked, "nodes", { get: () => nodes(false), enumerable: true });
  Object.defineProperty(unpacked, "lateNodes", { get: () => nodes(true) });
  return unpacked;
}

// Properties that are made when first asked for: most of a large program is never looked at.
function lazily(object, makers) {
  for (const [key, make] of Object.entries(makers)) {
    const get = () => {
      const value = make();
      Object.defineProperty(object, key, { value, enumerable: true });
      return value;
    };
    Object.defineProperty(object, key, { get, enumerable: true, configurable: true });
  }
  return object;
}

function unpackNodes(columns, names, strings, fill, late) {
  const results = new Map();
  const result = (k) => {
    if (!results.has(k)) results.set(k, JSON.parse(strings[k]));
    return results.get(k);
  };
  const refs = runs(columns.args_refs);
  const inputs = runs(columns.inputs);
  const text = (key, i) => strings[columns[key][i]];
  const argsOf = (own, i) => {
    const found = refs();
    const make = () => fill(text("args", i), own, found);
    return late && found.length ? make : make();
  };
  return sums(columns.name).map((own, i) => ({
    name: names[own],
    op: text("op", i),
    args: argsOf(own, i),
    moves: text("moves", i),
    type: text("type", i),
    results: result(columns.results[i]),
    inputs: inputs().map((d) => names[own - d]),
    path: text("path", i),
    phase: text("phase", i),
    where: text("where", i),
    file: text("file", i),
    line: columns.line[i],
    made_by: text("made_by", i),
    recompute: text("recompute", i),
    origin: columns.origin[i] ? names[own - columns.origin[i]] : "",
    view: columns.view[i] === 1,
    bytes: columns.bytes[i],
    flops: columns.flops[i],
  }));
}

function unpackReasons(columns, names, strings) {
  const out = {};
  const axes = new Map();
  let at = 0;
  sums(columns.name).forEach((own, i) => {
    const k = columns.axes[i];
    if (!axes.has(k)) axes.set(k, JSON.parse(strings[k]));
    const from = {};
    for (const axis of axes.get(k)) {
      const d = columns.from[at++];
      from[axis] = d ? names[own - d] : null;
    }
    const text = (key) => strings[columns[key][i]];
    out[names[own]] = { op: text("op"), layout: text("layout"), rule: text("rule"), why: text("why"), from };
  });
  return out;
}

function unpackHalf(half, names) {
  const own = sums(half.name);
  const begin = sums(half.begin);
  const values = own.map((n, i) => [names[n], half.bytes[i], begin[i], begin[i] + half.lasts[i]]);
  const order = sums(half.order).map((n) => names[n]);
  const steps = new Array(order.length + 1).fill(0);
  for (const [, bytes, from, to] of values) {
    if (from >= 0) steps[from] += bytes; // else it is in `start` already
    steps[to + 1] -= bytes;
  }
  let held = half.start;
  const alive = order.map((_, i) => (held += steps[i]));
  return { phase: half.phase, order, start: half.start, alive, values };
}
