// The researcher's page: curves, tables and per-client panels of finished experiments.
"use strict";

const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a6f00", "#8f8f8f"]; // safe for the colour-blind
const DASHES = ["solid", "dashed", "dotted"];
const charts = {};
let data = null, hidden = new Set(), timer = null;

function element(tag, text = "", options = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  return Object.assign(made, options);
}

function choices(id, values, names = values) {
  const box = byId(id), before = box.value;
  box.replaceChildren(...values.map((value, index) => element("option", names[index], { value })));
  if (values.includes(before)) box.value = before;
}

function allRuns() {
  return data.experiments.flatMap((experiment) => experiment.runs.map((run) => ({ experiment, run })));
}

function keyOf({ experiment, run }) {
  const key = byId("group").value;
  if (key === "rule") return data.experiments.length > 1 ? `${experiment.name}: ${run.rule}` : run.rule;
  if (key === "run") return `${experiment.name}: ${run.rule}, seed ${run.seed}`;
  return `${run.rule}, ${key} = ${run.config[key] ?? "none"}`;
}

function matches({ experiment, run }) {
  const text = `${experiment.name} ${run.rule} seed ${run.seed} ${Object.entries(run.config).flat().join(" ")}`.toLowerCase();
  return byId("filter").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function groups() {
  const found = new Map();
  allRuns().filter(matches).forEach((each) => {
    const key = keyOf(each);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(each.run);
  });
  return found;
}

function chartOf(id) {
  charts[id] = charts[id] || echarts.init(byId(id), null, { renderer: "canvas" });
  return charts[id];
}

function axisStyle() {
  return { axisLine: { lineStyle: { color: colour("--quiet") } }, axisLabel: { color: colour("--quiet") },
    nameTextStyle: { color: colour("--quiet") }, splitLine: { lineStyle: { color: colour("--line") } } };
}

const legendStyle = () => ({ top: 0, left: 150, right: 20, type: "scroll", textStyle: { color: colour("--text") } }); // beside the axis' name

function positions(run) {
  const axis = byId("axis").value;
  return axis === "megabytes" ? run.megabytes : axis === "virtual seconds" ? run.virtual : run.rounds;
}

// Each group's mean over its runs, and its band; runs are compared test by test.
function curvesOf() {
  const metric = byId("metric").value, until = Number(byId("replay").value);
  return [...groups()].filter(([name]) => !hidden.has(name)).map(([name, runs]) => {
    const points = [];
    const longest = Math.max(...runs.map((run) => run.rounds.length));
    for (let index = 0; index < longest; index++) {
      const seen = runs.filter((run) => index < run.rounds.length && run.rounds[index] <= until && (run.metrics[metric] || [])[index] != null);
      if (!seen.length || !seen.every((run) => positions(run)[index] !== undefined)) continue;
      const values = seen.map((run) => run.metrics[metric][index]);
      const place = seen.reduce((sum, run) => sum + positions(run)[index], 0) / seen.length;
      points.push([place, values.reduce((a, b) => a + b, 0) / values.length, Math.min(...values), Math.max(...values)]);
    }
    return { name, points };
  });
}

// A line through the means of points [x, mean, least, most], in the colour of this place, and a band around it.
function withBand(name, points, place) {
  const color = PALETTE[place % PALETTE.length], type = DASHES[Math.floor(place / PALETTE.length) % DASHES.length];
  const line = { name, type: "line", data: points.map(([x, mean]) => [x, mean]), color, showSymbol: points.length < 30, lineStyle: { width: 2, type } };
  if (!points.some(([, , low, high]) => low < high)) return [line];
  const edge = { type: "line", stack: name, lineStyle: { opacity: 0 }, showSymbol: false, color, tooltip: { show: false }, silent: true };
  return [line, { ...edge, name: `${name}, least`, data: points.map(([x, , low]) => [x, low]) },
    { ...edge, name: `${name}, band`, data: points.map(([x, , low, high]) => [x, high - low]), areaStyle: { opacity: 0.18 }, stackStrategy: "all" }];
}

function curveOptions() {
  const names = [...groups().keys()];
  const series = curvesOf().flatMap(({ name, points }) => withBand(name, points, names.indexOf(name)));
  return { animation: false, backgroundColor: colour("--back"), grid: { left: 60, right: 20, top: 40, bottom: 45 },
    legend: { ...legendStyle(), data: names.filter((name) => !hidden.has(name)) },
    tooltip: { trigger: "axis", renderMode: "richText" },
    xAxis: { type: "value", name: byId("axis").value, nameLocation: "middle", nameGap: 28, min: "dataMin", minInterval: byId("axis").value === "round" ? 1 : 0, ...axisStyle() },
    yAxis: { type: "value", scale: true, name: byId("metric").value, ...axisStyle() }, series };
}

function drawCurves() {
  byId("until").textContent = byId("replay").value;
  chartOf("curves").setOption(curveOptions(), true);
}

function drawGroups() {
  const box = byId("groups"), legend = box.querySelector("legend");
  box.replaceChildren(legend, ...[...groups()].map(([name, runs]) => {
    const label = element("label"), tick = element("input", "", { type: "checkbox", checked: !hidden.has(name) });
    tick.addEventListener("change", () => { if (tick.checked) hidden.delete(name); else hidden.add(name); drawCurves(); });
    label.append(tick, ` ${name} (${runs.length})`);
    return label;
  }));
}

function fill(table, head, rows) {
  const top = element("thead"), line = element("tr"), body = element("tbody");
  line.append(...head.map((title, index) => element("th", title, { scope: "col", className: index ? "number" : "" })));
  top.append(line);
  body.append(...rows.map((cells) => {
    const row = element("tr");
    row.append(...cells.map((cell, index) => element("td", cell, { className: index ? "number" : "" })));
    return row;
  }));
  table.replaceChildren(top, body);
}

const chosen = () => data.experiments[Number(byId("experiment").value)];

function drawTable() {
  const experiment = chosen();
  const head = [...new Set(experiment.rows.flatMap((row) => Object.keys(row)))];
  fill(byId("summary"), head, experiment.rows.map((row) => head.map((key) => row[key] ?? "")));
  fill(byId("differences"), ["setting", ...data.experiments.map((each) => each.name)],
    data.differing.map((key) => [key, ...data.experiments.map((each) => each.config[key])]));
  byId("differences-title").parentElement.hidden = !data.differing.length;
}

function save(kind) {
  const name = `${byId("metric").value.replace(/[^\w-]+/g, "-")}.${kind}`;
  let address;
  if (kind === "png") address = chartOf("curves").getDataURL({ pixelRatio: 2, backgroundColor: colour("--back") });
  else if (kind === "svg") {
    const still = echarts.init(null, null, { renderer: "svg", ssr: true, width: 900, height: 420 });
    still.setOption(curveOptions());
    address = URL.createObjectURL(new Blob([still.renderToSVGString()], { type: "image/svg+xml" }));
    still.dispose();
  } else {
    const lines = curvesOf().flatMap(({ name: group, points }) => points.map((point) => [JSON.stringify(group), ...point].join(",")));
    address = URL.createObjectURL(new Blob([[`group,${byId("axis").value},mean,least,most`, ...lines].join("\n")], { type: "text/csv" }));
  }
  const link = element("a", "", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

async function copy(kind) {
  const text = byId("text");
  text.value = chosen().summary[kind];
  text.hidden = false;
  text.select();
  try { await navigator.clipboard.writeText(text.value); byId("copied").textContent = "Copied."; }
  catch { byId("copied").textContent = "Select the text below to copy it."; }
}

function replay() {
  const slider = byId("replay"), most = Number(slider.max);
  if (timer) { clearInterval(timer); timer = null; byId("play").textContent = "Replay"; return; }
  slider.value = 1;
  byId("play").textContent = "Stop";
  timer = setInterval(() => {
    slider.value = Number(slider.value) + Math.ceil(most / 100);
    drawCurves();
    if (Number(slider.value) >= most) replay();
    drawClients();
  }, 60);
}

function redraw() { drawGroups(); drawCurves(); drawScores(); drawTable(); drawClients(); }

async function start() {
  const inside = byId("data");
  const answer = inside ? null : await fetch(`/api/research${location.search}`);
  data = inside ? JSON.parse(inside.textContent) : await answer.json();
  if (answer && !answer.ok) { byId("curves").textContent = data.error || "The server cannot read the experiments."; return; }
  if (!data.experiments.length) { byId("curves").textContent = "No experiment is finished here yet."; return; }
  const runs = allRuns().map((each) => each.run);
  choices("group", ["rule", "run", ...data.differing, ...data.parameters]);
  byId("group").value = (data.experiments.length > 1 && data.differing.find((key) => key !== "name")) || "rule";
  choices("setting", numericSettings());
  const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  choices("metric", metrics);
  byId("metric").value = data.experiments[0].score;
  choices("axis", ["round", "megabytes", ...(runs.every((run) => run.virtual.length) ? ["virtual seconds"] : [])]);
  choices("experiment", data.experiments.map((_, index) => String(index)), data.experiments.map((each) => each.name));
  const most = Math.max(...runs.map((run) => run.rounds.at(-1)));
  byId("replay").max = most; // before the value, which may not exceed it
  byId("replay").value = most;
  ["metric", "axis"].forEach((id) => byId(id).addEventListener("change", drawCurves));
  byId("group").addEventListener("change", () => { hidden = new Set(); redraw(); });
  byId("filter").addEventListener("input", () => { drawGroups(); drawCurves(); drawScores(); });
  byId("setting").addEventListener("change", drawScores);
  byId("all").addEventListener("click", () => pick([]));
  byId("replay").addEventListener("input", () => { drawCurves(); drawClients(); });
  byId("experiment").addEventListener("change", () => { drawTable(); pick([]); });
  byId("run").addEventListener("change", () => pick([]));
  byId("play").addEventListener("click", replay);
  document.querySelectorAll("[data-save]").forEach((button) => button.addEventListener("click", () => save(button.dataset.save)));
  document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", () => copy(button.dataset.copy)));
  addEventListener("resize", () => Object.values(charts).forEach((chart) => chart.resize()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
}

start();
