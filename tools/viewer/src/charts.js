// Memory over the schedule, and one rank's timeline: canvases with tables beside them.

import { bytes, count, el, fill, seconds, table } from "./dom.js";
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

export function unpackTimeline(timeline, nodes) {
  const { node, wire, begin, lasts } = timeline.events;
  let at = 0;
  let when = 0;
  const events = node.map((d, i) => {
    at += d;
    when += begin[i];
    return { name: nodes[at].name, lane: wire[i], begin: when, end: when + lasts[i] };
  });
  const waits = timeline.waits.map(([i, from, to]) => ({ name: nodes[i].name, lane: 2, begin: from, end: to }));
  return [...events, ...waits];
}

export function timelinePanel(app) {
  const { timeline, data } = app.program;
  if (!timeline) return el("p", {}, "A program opened from a file has no timeline; `shardc view` makes one.");
  const events = unpackTimeline(timeline, data.nodes);
  const total = Math.max(1, ...Object.values(timeline.phases).flat());
  const view = { from: 0, to: total };
  const canvas = el("canvas", { class: "chart", role: "img", tabindex: "0", "aria-label": `timeline of rank 0: ${seconds(timeline.seconds)}, of which ${seconds(timeline.exposed)} exposed communication` });
  const tip = el("p", { class: "about", "aria-live": "polite" }, "Wheel zooms, dragging moves, a click goes to the value.");
  const x = (t, w) => 96 + ((t - view.from) / (view.to - view.from)) * (w - 106);
  const draw = () => {
    const { c, w, h } = sized(canvas);
    if (!w) return;
    const { theme } = app;
    const lane = (h - 26) / 3;
    c.save();
    c.beginPath();
    c.rect(96, 0, w, h);
    c.clip();
    const colours = [theme.compute, theme.move, theme.exposed];
    let last = [-1, -1, -1];
    for (const e of events) {
      const a = x(e.begin, w);
      const b = Math.max(a + 0.6, x(e.end, w));
      if (b < 96 || a > w || b < last[e.lane] + 0.4) continue;
      last[e.lane] = b;
      c.fillStyle = colours[e.lane];
      c.fillRect(a, 4 + e.lane * lane, Math.max(0.6, b - a - (b - a > 3 ? 0.7 : 0)), lane - 8);
    }
    for (const [name, [from]] of Object.entries(timeline.phases)) {
      rule(c, x(from, w), h, theme.frame);
      c.fillStyle = theme.text;
      c.fillText(`${name}, from ${seconds(from / 1e9)}`, x(from, w) + 3, h - 4);
    }
    c.restore();
    c.fillStyle = theme.text;
    LANES.forEach((name, i) => c.fillText(name, 6, 4 + i * lane + lane / 2));
  };
  const hit = (e) => {
    const { clientWidth: w, clientHeight: h } = canvas;
    const t = view.from + ((e.offsetX - 96) / (w - 106)) * (view.to - view.from);
    const lane = Math.floor((e.offsetY - 4) / ((h - 26) / 3));
    return events.find((ev) => ev.lane === lane && ev.begin <= t && t <= ev.end);
  };
  const zoom = (factor, t) => {
    view.from = Math.max(0, t - (t - view.from) * factor);
    view.to = Math.min(total, t + (view.to - t) * factor);
    draw();
  };
  canvas.addEventListener("wheel", (e) => {
    e.preventDefault();
    zoom(Math.exp(e.deltaY / 400), view.from + ((e.offsetX - 96) / (canvas.clientWidth - 106)) * (view.to - view.from));
  }, { passive: false });
  canvas.addEventListener("keydown", (e) => {
    const mid = (view.from + view.to) / 2;
    if (e.key === "+" || e.key === "-") zoom(e.key === "+" ? 0.7 : 1.4, mid);
  });
  canvas.addEventListener("mousemove", (e) => {
    const found = hit(e);
    if (found) tip.textContent = `%${found.name}: ${seconds((found.end - found.begin) / 1e9)} from ${seconds(found.begin / 1e9)}`;
    if (e.buttons !== 1) return;
    const d = (-e.movementX / (canvas.clientWidth - 106)) * (view.to - view.from);
    if (view.from + d < 0 || view.to + d > total) return;
    view.from += d;
    view.to += d;
    draw();
  });
  canvas.addEventListener("click", (e) => hit(e) && app.reveal(hit(e).name));
  new ResizeObserver(draw).observe(canvas);
  const { links } = timeline;
  const carried = Object.entries(links.links).map(([dim, l]) => `${dim} over ${l.link} at ${l.bytes_per_second / 1e9} GB/s`);
  const facts = el("div", { class: "about" },
    el("strong", {}, `Estimated step: ${seconds(timeline.seconds)}`),
    `, communication ${seconds(timeline.communication)}, of which exposed ${seconds(timeline.exposed)}. Device ${links.device}; ${carried.join("; ")}. `,
    el("details", {}, el("summary", {}, "What this leaves out"), el("ul", {}, ...links.left_out.map((t) => el("li", {}, t))), el("p", {}, `Rates: ${links.source}.`)));
  return el("div", {}, facts, canvas, tip);
}
