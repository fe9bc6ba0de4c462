// Memory over the schedule, and one rank's timeline: canvases with tables beside them.

import { button, bytes, count, el, fill, seconds, table } from "./dom.js";
import { link } from "./details.js";

function sized(canvas) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: w, clientHeight: h } = canvas;
  canvas.width = w * ratio;
  canvas.height = h * ratio;
  const c = canvas.getContext("2d");
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  c.font = "11px system-ui, sans-serif";
  return { c, w, h };
}

// Steps of all halves in a row: {name, phase, alive, half, step}.
export function schedule(data) {
  return data.memory.halves.flatMap((half) => [
    { name: null, phase: half.phase, alive: half.start, half, step: -1 },
    ...half.order.map((name, i) => ({ name, phase: half.phase, alive: half.alive[i], half, step: i })),
  ]);
}

export function memoryPanel(app) {
  const { data } = app.program;
  const steps = schedule(data);
  const peak = steps.reduce((best, s, i) => (s.alive > steps[best].alive ? i : best), 0);
  const canvas = el("canvas", { class: "chart", role: "img", tabindex: "0", "aria-label": `bytes alive over ${steps.length} steps; peak ${count(steps[peak].alive)} bytes` });
  const about = el("p", { class: "about" });
  const living = el("div", { class: "half" });
  let at = peak;
  const show = (i) => {
    at = Math.max(0, Math.min(steps.length - 1, i));
    const s = steps[at];
    const alive = s.half.values.filter(([, n, from, to]) => n && from <= s.step && s.step <= to).sort((a, b) => b[1] - a[1]);
    fill(about, at === peak ? "Peak: " : `Step ${at}: `, el("strong", { class: at === peak ? "peak" : "" }, count(s.alive)), ` bytes per rank (${bytes(s.alive)}) in ${s.phase}, `, s.name ? el("span", {}, "while ", app.has(s.name) ? link(app, s.name) : `%${s.name}`, " runs") : "before the first operator");
    const whole = (name) => app.program.final.byName.get(name);
    fill(living, table([
      ["alive then", (v) => v[0], (v) => (app.has(v[0]) ? link(app, v[0]) : v[0])],
      ["bytes", (v) => v[1], (v) => count(v[1]), "n"],
      ["layout", (v) => whole(v[0])?.type ?? ""],
      ["module", (v) => whole(v[0])?.path ?? ""],
    ], alive, { limit: 60, caption: `${count(alive.length)} values` }));
    draw();
  };
  const draw = () => {
    const { c, w, h } = sized(canvas);
    if (!w) return;
    const { theme } = app;
    const x = (i) => (i / Math.max(1, steps.length - 1)) * (w - 20) + 10;
    const y = (v) => h - 18 - (v / (steps[peak].alive || 1)) * (h - 40);
    steps.forEach((s, i) => {
      if (i && steps[i - 1].phase !== s.phase) rule(c, x(i), h, theme.frame);
    });
    c.beginPath();
    c.moveTo(x(0), y(0));
    steps.forEach((s, i) => (c.lineTo(x(i), y(s.alive)), c.lineTo(x(i + 1), y(s.alive))));
    c.lineTo(x(steps.length - 1), y(0));
    c.fillStyle = theme["move-fill"];
    c.fill();
    c.strokeStyle = theme.move;
    c.stroke();
    rule(c, x(at), h, theme.accent);
    c.fillStyle = theme.text;
    c.fillText(`▼ peak ${bytes(steps[peak].alive)}`, Math.min(Math.max(4, x(peak) - 6), w - 110), y(steps[peak].alive) - 6);
    for (const [i, s] of steps.entries()) if (s.step === -1) c.fillText(s.phase, x(i) + 3, h - 4);
  };
  canvas.addEventListener("click", (e) => show(Math.round(((e.offsetX - 10) / (canvas.clientWidth - 20)) * (steps.length - 1))));
  canvas.addEventListener("keydown", (e) => {
    if (e.key === "ArrowLeft" || e.key === "ArrowRight") show(at + (e.key === "ArrowLeft" ? -1 : 1) * (e.shiftKey ? 20 : 1));
  });
  new ResizeObserver(draw).observe(canvas);
  show(peak);
  return el("div", { class: "split" }, el("div", { class: "half" }, about, canvas, el("p", {}, "Click, or the arrow keys, choose a step.")), living);
}

function rule(c, x, h, colour) {
  c.strokeStyle = colour;
  c.beginPath();
  c.moveTo(x, 14);
  c.lineTo(x, h - 14);
  c.stroke();
}

const LANES = ["compute", "communication", "exposed"];

function unpackEvents({ node, wire, begin, lasts }, nodes) {
  let at = 0;
  let when = 0;
  return node.map((d, i) => {
    at += d;
    when += begin[i];
    return { name: nodes[at].name, lane: wire[i], begin: when, end: when + lasts[i] };
  });
}

// {events, total, phases} of the estimate, and of what was measured where there is that.
export function timelineSets(timeline, nodes) {
  const waits = timeline.waits.map(([i, from, to]) => ({ name: nodes[i].name, lane: 2, begin: from, end: to }));
  const estimate = { events: [...unpackEvents(timeline.events, nodes), ...waits], phases: timeline.phases };
  estimate.total = Math.max(1, ...Object.values(timeline.phases).flat());
  if (!timeline.measured) return { estimate };
  const events = unpackEvents(timeline.measured.events, nodes);
  return { estimate, measured: { events, phases: {}, total: events.reduce((most, e) => Math.max(most, e.end), 1) } };
}

export function timelinePanel(app) {
  const { timeline } = app.program;
  if (!timeline) return el("p", {}, "A program opened from a file has no timeline; `shardc view` makes one.");
  const sets = timelineSets(timeline, app.program.final.nodes);
  const chart = new TimelineChart(app, `timeline of rank 0: ${seconds(timeline.seconds)}, of which ${seconds(timeline.exposed)} exposed communication`);
  chart.show(sets.estimate);
  const choices = Object.keys(sets).length > 1 ? Object.keys(sets).map((name) => button(name, () => chart.show(sets[name]))) : [];
  return el("div", {}, facts(timeline), el("p", { class: "about" }, ...choices), chart.canvas, chart.tip, sets.measured ? beside(app, sets, timeline.measured) : null);
}

function facts({ links, ...t }) {
  const carried = Object.entries(links.links).map(([dim, l]) => `${dim} over ${l.link} at ${l.bytes_per_second / 1e9} GB/s`);
  return el("div", { class: "about" },
    el("strong", {}, `Estimated step: ${seconds(t.seconds)}`),
    `, communication ${seconds(t.communication)}, of which exposed ${seconds(t.exposed)}. Device ${links.device}; ${carried.join("; ")}. `,
    el("details", {}, el("summary", {}, "What this leaves out"), el("ul", {}, ...links.left_out.map((x) => el("li", {}, x))), el("p", {}, `Rates: ${links.source}.`)));
}

// What was measured, value by value, beside what was estimated.
function beside(app, sets, { matched, expected }) {
  const lasts = (events) => new Map(events.filter((e) => e.lane < 2).map((e) => [e.name, e.end - e.begin]));
  const guessed = lasts(sets.estimate.events);
  const rows = [...lasts(sets.measured.events)].map(([name, ns]) => ({ name, ns, guess: guessed.get(name) ?? 0, node: app.program.final.byName.get(name) }));
  rows.sort((a, b) => b.ns - a.ns);
  const out = table([
    ["value", (r) => r.name, (r) => link(app, r.name)], ["operator", (r) => r.node.op], ["module", (r) => r.node.path],
    ["measured", (r) => r.ns, (r) => seconds(r.ns / 1e9), "n"], ["estimated", (r) => r.guess, (r) => seconds(r.guess / 1e9), "n"],
  ], rows, { limit: 100, caption: `Measured: ${count(matched)} of ${count(expected)} operators found in the trace` });
  out.id = "measured";
  return out;
}

class TimelineChart {
  constructor(app, label) {
    this.app = app;
    this.canvas = el("canvas", { class: "chart", role: "img", tabindex: "0", "aria-label": label });
    this.tip = el("p", { class: "about", "aria-live": "polite" }, "Wheel zooms, dragging moves, a click goes to the value.");
    const { canvas } = this;
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      this.zoom(Math.exp(e.deltaY / 400), this.time(e.offsetX));
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => {
      if (e.key === "+" || e.key === "-") this.zoom(e.key === "+" ? 0.7 : 1.4, (this.from + this.to) / 2);
    });
    canvas.addEventListener("mousemove", (e) => this.over(e));
    canvas.addEventListener("click", (e) => this.hit(e) && app.reveal(this.hit(e).name));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  show(set) {
    Object.assign(this, { set, from: 0, to: set.total });
    this.draw();
  }

  zoom(factor, t) {
    this.from = Math.max(0, t - (t - this.from) * factor);
    this.to = Math.min(this.set.total, t + (this.to - t) * factor);
    this.draw();
  }

  x(t, w) {
    return LEFT + ((t - this.from) / (this.to - this.from)) * (w - LEFT - 10);
  }

  time(px) {
    return this.from + ((px - LEFT) / (this.canvas.clientWidth - LEFT - 10)) * (this.to - this.from);
  }

  hit(e) {
    const t = this.time(e.offsetX);
    const lane = Math.floor((e.offsetY - 4) / ((this.canvas.clientHeight - 26) / 3));
    return this.set.events.find((ev) => ev.lane === lane && ev.begin <= t && t <= ev.end);
  }

  over(e) {
    const found = this.hit(e);
    if (found) this.tip.textContent = `%${found.name}: ${seconds((found.end - found.begin) / 1e9)} from ${seconds(found.begin / 1e9)}`;
    if (e.buttons !== 1) return;
    const d = this.time(0) - this.time(e.movementX);
    if (this.from + d < 0 || this.to + d > this.set.total) return;
    this.from += d;
    this.to += d;
    this.draw();
  }

  draw() {
    const { c, w, h } = sized(this.canvas);
    if (!w) return;
    const { theme } = this.app;
    const lane = (h - 26) / 3;
    c.save();
    c.beginPath();
    c.rect(LEFT, 0, w, h);
    c.clip();
    const colours = [theme.compute, theme.move, theme.exposed];
    const last = [-1, -1, -1];
    for (const e of this.set.events) {
      const a = this.x(e.begin, w);
      const b = Math.max(a + 0.6, this.x(e.end, w));
      if (b < LEFT || a > w || b < last[e.lane] + 0.4) continue;
      last[e.lane] = b;
      c.fillStyle = colours[e.lane];
      c.fillRect(a, 4 + e.lane * lane, Math.max(0.6, b - a - (b - a > 3 ? 0.7 : 0)), lane - 8);
    }
    for (const [name, [from]] of Object.entries(this.set.phases)) {
      rule(c, this.x(from, w), h, theme.frame);
      c.fillStyle = theme.text;
      c.fillText(`${name}, from ${seconds(from / 1e9)}`, this.x(from, w) + 3, h - 4);
    }
    c.restore();
    c.fillStyle = theme.text;
    LANES.forEach((name, i) => c.fillText(name, 6, 4 + i * lane + lane / 2));
  }
}

const LEFT = 96; // where the lanes begin, right of their names
