"use strict";
// plotly.js lies in the page compressed; it is unpacked when the first chart comes into view
let loading = null;
function plotly() {
  loading ??= (async () => {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    const unpacking = new DecompressionStream("gzip");
    const writer = unpacking.writable.getWriter();
    writer.write(bytes);
    writer.close();
    // Blob and Response would be shorter; their first use takes Chromium two seconds
    const reader = unpacking.readable.pipeThrough(new TextDecoderStream()).getReader();
    const script = document.createElement("script");
    script.nonce = document.querySelector("script[nonce]").nonce;
    for (let part = await reader.read(); !part.done; part = await reader.read()) script.append(part.value);
    document.head.append(script);
  })();
  return loading;
}

const font = { family: getComputedStyle(document.body).fontFamily, size: 12 };
const legend = { orientation: "h", y: -0.2, yanchor: "top", x: 0 };
const base = { font, legend, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 44, r: 12, t: 8, b: 34 }, hovermode: "closest" };
const settings = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

async function draw(canvas) {
  if (canvas.dataset.drawn) return;
  canvas.dataset.drawn = "wait";
  await plotly();
  const figure = JSON.parse(canvas.querySelector("script").textContent);
  for (const name of ["xaxis", "yaxis"]) {
    const axis = { automargin: true, ...figure.layout[name] };
    if (axis.title) axis.title.standoff = 8;
    figure.layout[name] = axis;
  }
  await Plotly.newPlot(canvas, figure.data, { ...base, ...figure.layout }, settings);
  canvas.dataset.drawn = "yes";
}

const canvases = [...document.querySelectorAll(".canvas")];
const watch = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { watch.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "300px" });
for (const canvas of canvases) watch.observe(canvas);

// the others follow while the page is idle, since printing does not wait for them
const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 200));
async function drawRest() {
  for (const canvas of canvases) {
    if (canvas.checkVisibility && !canvas.checkVisibility()) continue;
    await draw(canvas);
    await new Promise((done) => idle(done));
  }
}
window.addEventListener("load", () => idle(drawRest));

// on paper, charts are scaled as pictures
window.addEventListener("beforeprint", () => {
  for (const canvas of canvases) {
    const { width, height } = canvas.getBoundingClientRect();
    canvas.style.setProperty("--ratio", width / height);
    for (const svg of canvas.querySelectorAll(".main-svg")) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  }
});
window.addEventListener("afterprint", () => {
  for (const svg of document.querySelectorAll(".main-svg")) svg.removeAttribute("viewBox");
});

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent.trim();
      const order = (a, b) => (a === "" ? 1 : b === "" ? -1 : (up ? 1 : -1) * a.localeCompare(b, "en", { numeric: true }));
      const numbers = (a, b) => (a === "" ? 1 : b === "" ? -1 : (up ? a - b : b - a));
      const rows = [...body.rows];
      const numeric = rows.every((row) => key(row) === "" || Number.isFinite(Number(key(row))));
      rows.sort((a, b) => (numeric ? numbers : order)(key(a), key(b)));
      body.append(...rows);
    });
  });
}

for (const input of document.querySelectorAll("[data-filter]")) {
  const rows = input.closest("section").querySelector("tbody").rows;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
}

function open() {
  const card = document.getElementById(location.hash.slice(1));
  if (card instanceof HTMLDetailsElement) { card.open = true; card.scrollIntoView(); card.querySelector("summary").focus(); }
}
window.addEventListener("hashchange", open);
open();
