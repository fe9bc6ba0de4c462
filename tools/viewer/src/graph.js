// The picture: a canvas over one tree of groups, moved by mouse and keyboard.

import { CanvasPen, drawScene, SvgPen } from "./draw.js";
import { flatten, layout } from "./layout.js";
import { ancestors } from "./tree.js";

const AT_FIRST = 60; // boxes; containers of modules are opened while there are fewer
const SMALL_PROGRAM = 40; // values; such a program is opened whole
const SMALL = 0.32; // below this scale boxes have no text

export class Graph {
  constructor(canvas, { onpick, onchange }) {
    Object.assign(this, { canvas, onpick, onchange });
    this.open = new Set();
    this.place = { x: 0, y: 0, scale: 1 };
    this.marks = { selected: null };
    this.listen();
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  // Show another tree; what is open stays open where it still is.
  show(tree, fresh) {
    const old = this.tree;
    this.tree = tree;
    for (const [key, group] of old && !fresh ? old.groups : []) {
      if (group.run?.groups[group.run.current] === group) tree.groups.get(key)?.run?.show(tree.groups.get(key));
    }
    if (fresh) this.openAtFirst();
    this.arrange();
    if (fresh) this.fit();
  }

  openAtFirst() {
    const { open } = this;
    open.clear();
    const queue = [...this.tree.root.items];
    for (const phase of queue) open.add(phase.key);
    let boxes = queue.reduce((sum, g) => sum + g.items.length, 0);
    const small = this.tree.root.nodes.length <= SMALL_PROGRAM;
    const later = queue.flatMap((g) => g.items);
    while (later.length) {
      const item = later.shift();
      if (item.kind === "node") continue;
      const inside = item.kind === "run" ? item.groups[item.current] : item;
      const container = item.kind === "run" || inside.items.every((i) => i.kind !== "node");
      if ((!container && !small) || boxes + inside.items.length > AT_FIRST) continue;
      open.add(item.key);
      boxes += inside.items.length;
      later.push(...inside.items);
    }
  }

  arrange() {
    const laid = layout(this.tree.root, this.open);
    this.scene = { ...flatten(laid), w: laid.w, h: Math.max(0, ...laid.boxes.map((b) => b.h)) };
    this.relink();
    this.draw();
    this.onchange?.();
  }

  toggle(item, want = !this.open.has(item.key)) {
    if (item.kind === "node") return;
    const before = this.scene.byKey.get(item.key);
    const anchor = before && { x: before.x, y: before.y };
    if (want) this.open.add(item.key);
    else this.open.delete(item.key);
    this.arrange();
    const now = this.scene.byKey.get(item.key);
    if (anchor && now) this.moveBy((anchor.x - now.x) * this.place.scale, (anchor.y - now.y) * this.place.scale);
  }

  // The box that stands for an item: itself, or the closed group or run around it.
  boxOf(item) {
    const chain = item.kind === "node" ? [item, ...ancestors(item.node.group)] : ancestors(item);
    for (const g of chain) {
      const box = this.scene.byKey.get(g.key) ?? (g.run && this.scene.byKey.get(g.run.key));
      if (box) return box;
    }
    return null;
  }

  // The keys of the boxes that stand for these nodes.
  boxesOf(nodes) {
    const keys = new Set();
    for (const node of nodes) {
      const box = node?.group && this.boxOf({ kind: "node", key: node.name, node });
      if (box && !box.open) keys.add(box.item.key);
    }
    return keys;
  }

  // Open all that hides a node, and go there.
  reveal(node) {
    for (const g of ancestors(node.group)) {
      if (g.run) {
        g.run.show(g);
        this.open.add(g.run.key);
      } else if (g.parent) this.open.add(g.key);
    }
    this.arrange();
    this.select({ kind: "node", key: node.name, node }, true);
  }

  select(item, go = false) {
    this.marks.selected = item?.key ?? null;
    this.picked = item;
    this.relink();
    if (go) this.center(item);
    this.draw();
    this.onpick?.(item);
  }

  // Lines from a selected value's inputs and to its users, across groups too.
  relink() {
    const item = this.picked;
    this.marks.links = [];
    this.marks.near = new Set();
    if (item?.kind !== "node" || !this.tree.byName) return;
    const own = this.boxOf(item);
    const link = (name, into) => {
      const node = this.tree.byName.get(name);
      const box = node?.group && this.boxOf({ kind: "node", key: name, node });
      if (!own || !box || box === own || box.open) return;
      this.marks.near.add(box.item.key);
      this.marks.links.push(into ? { from: box, to: own } : { from: own, to: box });
    };
    for (const name of item.node.inputs) link(name, true);
    for (const name of item.node.users.slice(0, 40)) link(name, false);
  }

  center(item) {
    const box = this.boxOf(item);
    if (!box) return;
    const { clientWidth: w, clientHeight: h } = this.canvas;
    this.place.scale = Math.max(this.place.scale, 0.8);
    const { scale } = this.place;
    this.place.x = w / 2 - (box.x + box.w / 2) * scale;
    this.place.y = h / 2 - (box.y + Math.min(box.h / 2, h / 2 / scale)) * scale;
  }

  fit() {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    const scale = Math.min(1.1, (w - 30) / (this.scene.w || 1), (h - 30) / (this.scene.h || 1));
    const readable = Math.max(scale, 0.45);
    this.place = { scale: readable, x: Math.max(15, (w - this.scene.w * readable) / 2), y: scale < readable ? 15 : (h - this.scene.h * readable) / 2 };
    this.draw();
  }

  moveBy(dx, dy) {
    this.place.x += dx;
    this.place.y += dy;
    this.draw();
  }

  zoom(factor, cx = this.canvas.clientWidth / 2, cy = this.canvas.clientHeight / 2) {
    const { place } = this;
    const scale = Math.min(3, Math.max(0.03, place.scale * factor));
    place.x = cx - ((cx - place.x) * scale) / place.scale;
    place.y = cy - ((cy - place.y) * scale) / place.scale;
    place.scale = scale;
    this.draw();
  }

  resize() {
    const { canvas } = this;
    const ratio = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    this.paint();
  }

  draw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.paint();
    });
  }

  paint() {
    if (!this.scene) return;
    const { canvas, place } = this;
    const c = canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.fillStyle = this.theme.background;
    c.fillRect(0, 0, canvas.width, canvas.height);
    c.setTransform(place.scale * ratio, 0, 0, place.scale * ratio, place.x * ratio, place.y * ratio);
    const view = { x: -place.x / place.scale, y: -place.y / place.scale, w: canvas.clientWidth / place.scale, h: canvas.clientHeight / place.scale };
    drawScene(new CanvasPen(c), this.scene, this.theme, this.marks, view, place.scale > SMALL);
  }

  svg() {
    const pen = new SvgPen();
    const { w, h } = this.scene;
    const all = { x: -20, y: -20, w: w + 40, h: h + 40 };
    drawScene(pen, this.scene, this.theme, this.marks, all);
    const [width, height] = [Math.ceil(w + 40), Math.ceil(h + 40)];
    return pen.done(width, height, this.theme.background).replace("/>", `/><g transform="translate(20 20)">`).replace("</svg>", "</g></svg>");
  }

  at(px, py) {
    const x = (px - this.place.x) / this.place.scale;
    const y = (py - this.place.y) / this.place.scale;
    const hit = this.scene.boxes.filter((b) => x >= b.x && x <= b.x + b.w && y >= b.y && y <= b.y + b.h);
    return hit.reduce((best, b) => (!best || b.depth >= best.depth ? b : best), null);
  }

  listen() {
    const { canvas } = this;
    let from = null;
    canvas.addEventListener("pointerdown", (e) => {
      from = { x: e.offsetX, y: e.offsetY, moved: false };
      canvas.setPointerCapture(e.pointerId);
    });
    canvas.addEventListener("pointermove", (e) => {
      if (!from) return;
      if (Math.abs(e.offsetX - from.x) + Math.abs(e.offsetY - from.y) > 3) from.moved = true;
      if (!from.moved) return;
      this.moveBy(e.offsetX - from.x, e.offsetY - from.y);
      Object.assign(from, { x: e.offsetX, y: e.offsetY });
    });
    canvas.addEventListener("pointerup", (e) => {
      const box = from && !from.moved ? this.at(e.offsetX, e.offsetY) : null;
      if (from && !from.moved) this.select(box?.item ?? null);
      if (box?.open && e.offsetY < this.place.y + (box.y + 26) * this.place.scale) this.toggle(box.item);
      else if (box && box.item.kind !== "node" && !box.open) this.toggle(box.item);
      from = null;
    });
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      if (e.ctrlKey || e.metaKey || !e.shiftKey) this.zoom(Math.exp(-e.deltaY / 400), e.offsetX, e.offsetY);
      else this.moveBy(-e.deltaY, 0);
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => this.key(e));
  }

  key(e) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const keys = {
      Enter: () => this.picked && this.toggle(this.picked),
      " ": () => this.picked && this.toggle(this.picked),
      "+": () => this.zoom(1.25), "=": () => this.zoom(1.25), "-": () => this.zoom(0.8), 0: () => this.fit(), f: () => this.fit(),
      Escape: () => this.select(null),
    };
    if (steps[e.key]) e.shiftKey ? this.moveBy(...steps[e.key].map((d) => -60 * d)) : this.step(...steps[e.key]);
    else if (keys[e.key]) keys[e.key]();
    else return;
    e.preventDefault();
  }

  // Select the nearest box in a direction; into what is open, and out of it.
  step(dx, dy) {
    const boxes = this.scene.boxes.filter((b) => !b.open);
    const own = this.picked && this.boxOf(this.picked);
    if (!own) return boxes.length ? this.select(boxes[0].item, true) : null;
    const mid = (b) => ({ x: b.x + b.w / 2, y: b.y + Math.min(b.h / 2, 14) });
    const a = mid(own);
    let best = null;
    for (const b of boxes) {
      const m = mid(b);
      const along = (m.x - a.x) * dx + (m.y - a.y) * dy;
      const aside = Math.abs((m.x - a.x) * dy) + Math.abs((m.y - a.y) * dx);
      if (b !== own && along > 4 && (!best || along + 2 * aside < best.far)) best = { box: b, far: along + 2 * aside };
    }
    if (best) this.select(best.box.item, true);
  }
}
