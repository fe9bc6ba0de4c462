// One way to draw a scene, for two pens: the canvas on the page, and SVG text for export.

import { labels, titleOf } from "./layout.js";

const FONT = "12px system-ui, sans-serif";
const SMALL = "11px ui-monospace, Menlo, Consolas, monospace";

export class CanvasPen {
  constructor(context) {
    this.c = context;
  }
  rect(x, y, w, h, { fill, stroke, width = 1, dash = [], round = 4 }) {
    const { c } = this;
    c.beginPath();
    c.roundRect(x, y, w, h, round);
    if (fill) {
      c.fillStyle = fill;
      c.fill();
    }
    if (stroke) {
      c.strokeStyle = stroke;
      c.lineWidth = width;
      c.setLineDash(dash);
      c.stroke();
      c.setLineDash([]);
    }
  }
  line(points, { stroke, width = 1, dash = [], curve = true }) {
    const { c } = this;
    c.beginPath();
    trace(points, curve, { M: (x, y) => c.moveTo(x, y), L: (x, y) => c.lineTo(x, y), Q: (a, b, x, y) => c.quadraticCurveTo(a, b, x, y) });
    c.strokeStyle = stroke;
    c.lineWidth = width;
    c.setLineDash(dash);
    c.stroke();
    c.setLineDash([]);
  }
  text(text, x, y, { fill, font = FONT, bold = false, most }) {
    this.c.fillStyle = fill;
    this.c.font = bold ? `600 ${font}` : font;
    most === undefined ? this.c.fillText(text, x, y) : this.c.fillText(text, x, y, most);
  }
}

const escape = (text) => String(text).replace(/[&<>"']/g, (ch) => `&#${ch.charCodeAt(0)};`).replace(/[\0-\x08\x0b-\x1f]/g, "?");

export class SvgPen {
  constructor() {
    this.parts = [];
  }
  rect(x, y, w, h, { fill = "none", stroke = "none", width = 1, dash = [], round = 4 }) {
    this.parts.push(`<rect x="${x}" y="${y}" width="${w}" height="${h}" rx="${round}" fill="${fill}" stroke="${stroke}" stroke-width="${width}" stroke-dasharray="${dash.join(" ")}"/>`);
  }
  line(points, { stroke, width = 1, dash = [], curve = true }) {
    const d = [];
    trace(points, curve, { M: (...p) => d.push("M", ...p), L: (...p) => d.push("L", ...p), Q: (...p) => d.push("Q", ...p) });
    this.parts.push(`<path d="${d.join(" ")}" fill="none" stroke="${stroke}" stroke-width="${width}" stroke-dasharray="${dash.join(" ")}"/>`);
  }
  text(text, x, y, { fill, font = FONT, bold = false }) {
    this.parts.push(`<text x="${x}" y="${y}" fill="${fill}" style="font:${bold ? "600 " : ""}${font}">${escape(text)}</text>`);
  }
  done(w, h, background) {
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="0 0 ${w} ${h}"><rect width="100%" height="100%" fill="${background}"/>${this.parts.join("")}</svg>`;
  }
}

function trace(points, curve, { M, L, Q }) {
  const [first, ...rest] = points;
  M(first.x, first.y);
  if (!curve || rest.length < 2) return rest.forEach((p) => L(p.x, p.y));
  for (let i = 0; i < rest.length - 1; i++) {
    const p = rest[i];
    const q = rest[i + 1];
    const last = i === rest.length - 2;
    Q(p.x, p.y, last ? q.x : (p.x + q.x) / 2, last ? q.y : (p.y + q.y) / 2);
  }
}

// Draws what lies within `view` (in scene units). theme: colours by name. marks: {selected, near, found, changed}: sets of keys.
export function drawScene(pen, scene, theme, marks, view, detail = true) {
  const seen = (x, y, w, h) => x < view.x + view.w && x + w > view.x && y < view.y + view.h && y + h > view.y;
  for (const box of scene.boxes) if (box.open && seen(box.x, box.y, box.w, box.h)) drawFrame(pen, box, theme, marks);
  for (const e of scene.edges) {
    const xs = e.points.map((p) => p.x);
    const ys = e.points.map((p) => p.y);
    const x = Math.min(...xs);
    const y = Math.min(...ys);
    if (!seen(x, y, Math.max(...xs) - x + 1, Math.max(...ys) - y + 1)) continue;
    pen.line(e.points, { stroke: theme.edge, width: Math.min(4, 1 + Math.log2(e.n) / 2), dash: e.far ? [3, 3] : [] });
    arrow(pen, e.points.at(-2), e.points.at(-1), theme.edge);
  }
  for (const box of scene.boxes) if (!box.open && seen(box.x, box.y, box.w, box.h)) drawBox(pen, box, theme, marks, detail);
  for (const { from, to } of marks.links ?? []) {
    const points = linkPoints(from, to);
    pen.line(points, { stroke: theme.accent, width: 2, dash: [5, 3] });
    arrow(pen, points.at(-2), points.at(-1), theme.accent);
  }
}

function linkPoints(a, b) {
  const from = { x: a.x + a.w / 2, y: a.y + a.h };
  const to = { x: b.x + b.w / 2, y: b.y };
  if (to.y > from.y) return [from, { x: from.x, y: (from.y + to.y) / 2 }, { x: to.x, y: (from.y + to.y) / 2 }, to];
  const right = b.x > a.x;
  const p = { x: right ? a.x + a.w : a.x, y: a.y + a.h / 2 };
  const q = { x: right ? b.x : b.x + b.w, y: b.y + b.h / 2 };
  return [p, { x: (p.x + q.x) / 2, y: p.y }, { x: (p.x + q.x) / 2, y: q.y }, q];
}

function arrow(pen, from, to, stroke) {
  const a = Math.atan2(to.y - from.y, to.x - from.x);
  const wing = (d) => ({ x: to.x - 7 * Math.cos(a + d), y: to.y - 7 * Math.sin(a + d) });
  pen.line([wing(0.45), to, wing(-0.45)], { stroke, width: 1.2, curve: false });
}

const DASH = { forward: [], backward: [7, 3], optimizer: [2, 3] };

function drawFrame(pen, box, theme, marks) {
  const phase = box.item.phase;
  const picked = marks.selected === box.item.key;
  pen.rect(box.x, box.y, box.w, box.h, {
    fill: theme[`phase-${phase}`] ?? theme.panel, stroke: picked ? theme.accent : theme.frame,
    width: picked ? 2.5 : 1, dash: DASH[phase] ?? [], round: 7,
  });
  const run = box.item.kind === "run" ? `, here ${box.item.groups[box.item.current].path}` : "";
  pen.text(`▾ ${titleOf(box.item)}${run}`, box.x + 10, box.y + 17, { fill: theme.text, bold: true });
}

function drawBox(pen, box, theme, marks, detail) {
  const { item, x, y, w, h } = box;
  const move = item.kind === "node" && item.node.isMove;
  const collective = move;
  if (item.kind === "run") for (const d of [6, 3]) pen.rect(x + d, y - d, w, h, { fill: theme.box, stroke: theme.frame });
  const stroke = collective ? theme.move : theme.frame;
  const round = collective ? h / 2 : item.kind === "node" ? 3 : 6;
  pen.rect(x, y, w, h, { fill: collective ? theme["move-fill"] : theme.box, stroke, width: collective ? 2 : 1, dash: DASH[item.phase ?? item.node?.phase] ?? [], round });
  if (item.kind === "node") bands(pen, box, theme, collective);
  outline(pen, box, theme, marks, round);
  if (!detail) return;
  const left = x + (collective ? h / 2.6 : item.kind === "node" ? 14 : 12);
  labels(item).forEach((line, i) => {
    const mono = i > 0 && item.kind === "node";
    const title = i === 0 && item.kind !== "node" ? `▸ ${line}` : line;
    const moves = i === 2 && item.kind !== "node";
    const fill = moves ? theme.move : i ? theme.muted : theme.text;
    pen.text(title, left, y + 17 + i * 15, { fill, font: mono ? SMALL : FONT, bold: moves || (i === 0 && (item.kind !== "node" || move)), most: x + w - left - 6 });
  });
}

// Left: the mesh dims that split the value, each a band of its colour. Right: those over which it is pending.
function bands(pen, { item, x, y, w, h }, theme, inside) {
  const { split, pending } = item.node.layout;
  const bar = (axes, at) =>
    axes.forEach((axis, i) => {
      const part = (inside ? h / 2 : h - 2) / axes.length;
      pen.rect(at, y + (inside ? h / 4 : 1) + i * part, 6, part - 0.5, { fill: theme.axes[axis] ?? theme.axes[axis.replace(/\/\d+$/, "")] ?? theme.muted, round: 1 });
    });
  if (split.length) bar(split, inside ? x + 8 : x + 1);
  if (pending.length) {
    bar(pending, inside ? x + w - 14 : x + w - 7);
    pen.text("Σ", x + w - (inside ? 24 : 17), y + 15, { fill: theme.text, font: SMALL });
  }
}

function outline(pen, { item, x, y, w, h }, theme, marks, round) {
  const around = (d, stroke, width) => pen.rect(x - d, y - d, w + 2 * d, h + 2 * d, { stroke, width, round: round + d });
  if (marks.changed?.has(item.key)) around(2, theme.changed, 2);
  if (marks.found?.has(item.key)) around(3, theme.found, 2.5);
  if (marks.near?.has(item.key)) around(2, theme.accent, 1.5);
  if (marks.selected === item.key) around(3, theme.accent, 3);
}
