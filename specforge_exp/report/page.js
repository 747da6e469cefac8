"use strict";
// Sorting, hiding, switching and copying; Bokeh draws the charts from the JSON in #items.
const figures = new Map();  // key of a chart -> Bokeh's model of it
const hidden = new Set();   // losses that are not shown

function each(selector, act, root = document) {
  root.querySelectorAll(selector).forEach(act);
}

// Numbers before texts, nothing last, whichever way the rest is sorted.
function compare(one, other, sign) {
  if (one === "" || other === "") return (one === "") - (other === "");
  const a = Number(one), b = Number(other);
  if (Number.isNaN(a) || Number.isNaN(b)) return sign * one.localeCompare(other, "en", { numeric: true });
  return sign * (a - b);
}

each("table.sortable", (table) => each("th button", (button) => button.addEventListener("click", () => {
  const head = button.parentElement, place = [...head.parentElement.children].indexOf(head);
  const descending = head.getAttribute("aria-sort") === "ascending";
  each("th", (one) => one.removeAttribute("aria-sort"), table);
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0], value = (row) => row.children[place].dataset.sort;
  body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), descending ? -1 : 1)));
}), table));

each(".filter", (input) => input.addEventListener("input", () => {
  const words = input.value.toLowerCase().split(/\s+/);
  each("tbody tr", (row) => {
    const text = row.textContent.toLowerCase();
    row.classList.toggle("filtered", !words.every((word) => text.includes(word)));
  }, input.closest("section"));
}));

each(".copy", (button) => button.addEventListener("click", async () => {
  const text = button.dataset.copy, said = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a page from a file may not have the clipboard
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "copied";
  button.classList.add("done");
  setTimeout(() => { button.textContent = said; button.classList.remove("done"); }, 1200);
}));

function showLosses(figure) {
  for (const renderer of figure.renderers)
    if (renderer.name !== null) renderer.visible = !hidden.has(renderer.name);
}

each(".legend button", (button) => button.addEventListener("click", () => {
  const loss = button.dataset.loss, hide = !hidden.has(loss);
  hidden[hide ? "add" : "delete"](loss);
  button.setAttribute("aria-pressed", String(!hide));
  figures.forEach(showLosses);
  each("table.runs tbody tr", (row) => row.classList.toggle("hidden", hidden.has(row.dataset.loss)));
}));

each(".switch button", (button) => button.addEventListener("click", () => {
  const chart = button.closest(".chart"), plot = chart.querySelector(".plot");
  each("button", (one) => one.setAttribute("aria-pressed", String(one === button)), button.parentElement);
  plot.dataset[button.parentElement.dataset.part === "0" ? "source" : "step"] = button.dataset.value;
  const { source, step } = plot.dataset;
  for (const renderer of figures.get(chart.dataset.chart)?.renderers ?? [])
    for (const glyph of [renderer.glyph, renderer.hover_glyph, renderer.muted_glyph])
      glyph?.setv?.({ xs: { field: `${source}:x` }, ys: { field: `${source}:${step}` } });
}));

// One chart after the other, with room for clicks between them.
async function draw() {
  Bokeh.set_log_level("warn");
  for (const { key, item } of JSON.parse(document.getElementById("items").textContent)) {
    const views = await Bokeh.embed.embed_item(item, item.target_id);
    const figure = views.roots[0].model;
    figures.set(key, figure);
    showLosses(figure);
    await new Promise((done) => setTimeout(done, 0));
  }
  performance.mark("drawn");
  document.documentElement.dataset.drawn = String(figures.size);
}
draw();
