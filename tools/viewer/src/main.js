// The page: reads what is in it, and ties picture, outline, details, search, stages and panels together.

import { bytes, count, download, el, fill } from "./dom.js";
import { details, meshPicture } from "./details.js";
import { Graph } from "./graph.js";
import { after, Program } from "./model.js";
import { memoryPanel, timelinePanel } from "./charts.js";
import { collectivesPanel, comparePanel, difference, parametersPanel, passesPanel } from "./panels.js";
import { Outline } from "./outline.js";
import { find, Search } from "./search.js";
import { buildTree } from "./tree.js";
import { unpack, unpackText } from "./unpack.js";

const $ = (id) => document.getElementById(id);
const PANELS = { collectives: collectivesPanel, parameters: parametersPanel, memory: memoryPanel, timeline: timelinePanel, passes: passesPanel, compare: comparePanel };
const THEME = ["background", "panel", "box", "text", "muted", "frame", "edge", "accent", "found", "changed", "move", "move-fill", "compute", "exposed", "phase-forward", "phase-backward", "phase-optimizer"];
const AXES = 8;
const SCHEMA = "shardc.program/1";

class App {
  constructor(parts) {
    this.programs = parts.map((p) => new Program({ ...p, data: unpack(p.program) }));
    this.tab = null;
    this.graph = new Graph($("graph"), { onpick: (item) => this.picked(item), onchange: () => this.arranged() });
    this.changed = [];
    this.outline = new Outline(this, $("outline"));
    this.search = new Search(this, $("search"), $("found"), $("results"));
    this.readTheme();
    this.listen();
    this.use(this.programs[0]);
    const start = decodeURIComponent(location.hash.slice(1));
    if (this.has(start)) this.reveal(start);
  }

  readTheme() {
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(`--${name}`).trim();
    this.theme = Object.fromEntries(THEME.map((name) => [name, get(name)]));
    this.theme.axes = {};
    this.program?.axes.forEach((axis, i) => (this.theme.axes[axis] = get(`axis-${i % AXES}`)));
    this.graph.theme = this.theme;
  }

  listen() {
    for (const id of ["fit", "bigger", "smaller"]) $(id).addEventListener("click", () => ({ fit: () => this.graph.fit(), bigger: () => this.graph.zoom(1.25), smaller: () => this.graph.zoom(0.8) })[id]());
    $("svg").addEventListener("click", () => download("program.svg", new Blob([this.graph.svg()], { type: "image/svg+xml" })));
    $("png").addEventListener("click", () => $("graph").toBlob((blob) => download("program.png", blob)));
    $("stage").addEventListener("input", () => this.goto(Number($("stage").value)));
    $("dark").addEventListener("click", () => this.flip());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
    for (const name of Object.keys(PANELS)) $(`tab-${name}`).addEventListener("click", () => this.panel(this.tab === name ? null : name));
    $("tabs").addEventListener("keydown", (e) => this.tabKey(e));
    document.addEventListener("keydown", (e) => {
      if (e.target.matches("input, select, textarea") || e.ctrlKey || e.metaKey || e.altKey) return;
      if (e.key === "/") {
        e.preventDefault();
        $("search").focus();
      } else if (e.key === "n" || e.key === "p") this.search.go(e.key === "n" ? 1 : -1);
    });
  }

  tabKey(e) {
    const names = Object.keys(PANELS);
    const d = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (!d) return;
    const at = names.findIndex((name) => $(`tab-${name}`) === document.activeElement);
    const next = names[(at + d + names.length) % names.length];
    $(`tab-${next}`).focus();
    this.panel(next);
  }

  flip() {
    const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark") && !document.documentElement.dataset.theme ? matchMedia("(prefers-color-scheme: dark)").matches : document.documentElement.dataset.theme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    this.recolour();
  }

  recolour() {
    this.readTheme();
    this.graph.draw();
    if (this.tab) this.panel(this.tab);
    this.side();
  }

  // Another program in the picture.
  use(program) {
    this.program = program;
    this.readTheme();
    $("name").textContent = program.title;
    $("stage").max = program.passes.length;
    this.goto(program.passes.length, true);
    this.graph.select(null);
    if (this.tab) this.panel(this.tab);
  }

  // The picture after so many passes.
  goto(k, fresh = false) {
    this.stage = k;
    const { passes } = this.program;
    $("stage").value = k;
    const name = k ? `${passes[k - 1].stage}, after ${passes[k - 1].name}` : "TRACED";
    $("stage-name").textContent = `${k}/${passes.length} ${name}`;
    $("stage").setAttribute("aria-valuetext", name);
    this.now = this.program.at(k);
    const tree = { ...buildTree(this.now.nodes), byName: this.now.byName };
    const step = k && k < passes.length ? passes[k - 1] : null;
    this.changed = step ? [...step.added, ...step.changed].map(([n]) => n) : [];
    if (this.graph.picked) this.graph.picked = this.same(this.graph.picked, tree);
    this.graph.marks.selected = this.graph.picked?.key ?? null;
    this.graph.show(tree, fresh);
    this.search.run();
    this.picked(this.graph.picked ?? null);
    if (this.tab === "passes") this.panel("passes");
  }

  // What is marked is marked again where it now stands.
  arranged() {
    const { graph } = this;
    this.outline?.draw();
    graph.marks.changed = graph.boxesOf(this.changed.map((name) => this.now.byName.get(name)));
    this.search?.mark();
  }

  // Mark these values as different.
  mark(names) {
    this.changed = names;
    this.arranged();
  }

  same(item, tree) {
    if (item.kind !== "node") return tree.groups.get(item.key) ?? null;
    const node = tree.byName.get(item.key);
    return node ? { kind: "node", key: node.name, node } : null;
  }

  // Lines of the program's text after k passes.
  lines(k) {
    let lines = new Map(this.program.data.traced.map(([name, ...line]) => [name, line]));
    for (const step of this.program.passes.slice(0, k)) lines = after(lines, step);
    return lines;
  }

  has(name) {
    return this.now.byName.has(name);
  }

  reveal(name) {
    const node = this.now.byName.get(name);
    if (node) return this.graph.reveal(node);
    $("live").textContent = `%${name} is not in the program at this stage`;
  }

  pickInstance(run, i) {
    run.current = i;
    this.graph.open.add(run.key);
    this.graph.arrange();
    this.graph.select(run);
  }

  picked(item) {
    details($("details"), this, item);
    $("details").scrollTop = 0;
    this.outline.mark(item?.key);
    this.side(item);
    $("live").textContent = item?.kind === "node" ? `%${item.node.name}: ${item.node.type} = ${item.node.op}` : "";
    const hash = item?.kind === "node" ? `#${encodeURIComponent(item.key)}` : "#";
    if (location.hash !== hash && (location.hash || hash !== "#")) history.replaceState(null, "", hash);
  }

  side(item = this.graph.picked) {
    fill($("mesh"), ...meshPicture(this, item?.node?.collective?.mesh_dim));
  }

  panel(name) {
    for (const other of Object.keys(PANELS)) {
      $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
      $(`tab-${other}`).tabIndex = other === (name ?? "collectives") ? 0 : -1;
    }
    this.tab = name;
    $("panel").hidden = !name;
    if (name) {
      $("panel").setAttribute("aria-labelledby", `tab-${name}`);
      fill($("panel"), PANELS[name](this));
    }
  }

  swatch(axis) {
    const out = el("span", { class: "swatch", "aria-hidden": "true" });
    out.style.background = this.theme.axes[axis] ?? this.theme.axes[axis.replace(/\/\d+$/, "")] ?? "gray";
    return out;
  }

  async load(file) {
    try {
      const data = JSON.parse(await file.text());
      if (data.schema !== SCHEMA) throw new Error(`schema ${data.schema ?? "missing"}, this page reads ${SCHEMA}`);
      this.programs = [this.program, new Program({ title: file.name, data, timeline: null })];
      this.panel("compare");
    } catch (error) {
      $("live").textContent = `${file.name}: ${error.message}`;
    }
  }
}

async function main() {
  const begin = performance.now();
  const parts = await unpackText($("data").textContent);
  $("data").remove();
  const app = new App(parts);
  requestAnimationFrame(() => {
    const painted = performance.now();
    // What tests and the console may ask.
    globalThis.shardcView = { app, find: (text) => find(app.now.nodes, text).map((n) => n.name), difference, bytes, count, opened: painted - begin, painted };
    document.documentElement.dataset.ready = "yes";
  });
}

main().catch((error) => {
  document.getElementById("live").textContent = `The page cannot be shown: ${error.message}`;
  throw error;
});
