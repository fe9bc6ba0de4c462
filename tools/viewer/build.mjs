// Builds tools/static from src: one script with dagre inside, the style, the page's frame, and the licences.

import { build } from "esbuild";
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "..", "static");
mkdirSync(out, { recursive: true });
await build({
  entryPoints: [join(here, "src", "main.js")],
  outfile: join(out, "viewer.js"),
  bundle: true, minify: true, format: "iife", target: "es2022", charset: "ascii", legalComments: "none",
});
const script = readFileSync(join(out, "viewer.js"), "utf8");
if (/<\/script|<!--/i.test(script)) throw new Error("the script would end its own element");
for (const name of ["viewer.css", "viewer.html"]) cpSync(join(here, "src", name), join(out, name));
const licences = ["dagre", "graphlib"].map((name) => {
  const folder = join(here, "node_modules", "@dagrejs", name);
  const { version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  return `@dagrejs/${name} ${version} (${license}), inside viewer.js\n\n${readFileSync(join(folder, "LICENSE"), "utf8").trim()}\n`;
});
writeFileSync(join(out, "LICENSES.txt"), licences.join("\n----\n\n"));
