// The operator's page: it asks the server for its state, and again whenever the server says that something changed.
"use strict";

const ROW = 30, MARGIN = 15; // the height of a row in pixels, and rows above and below what is seen
const COLUMNS = [
  ["name", "site"], ["state", "state"], [null, "rounds"], ["seconds", "answers in"], ["share", "share of weight"],
  ["examples", "examples"], [null, "last counted"], [null, "last problem"], ["certificate", "certificate"], [null, "Corymb / Flower"],
];
const CODES = { "+": "--good", x: "--bad", s: "--silent", "-": "--away" };
const run = new URLSearchParams(location.search).get("run") || "";
const byId = (id) => document.getElementById(id);
let order = "state", slice = { total: 0, offset: 0, rows: [] }, chart = null, drawn = "", pending = null;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const query = (values) => new URLSearchParams({ run, ...values }).toString();

function element(tag, text = "", options = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  return Object.assign(made, options);
}

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path} answers ${answer.status}`);
  return answer.json();
}

async function refresh() {
  if (pending) { pending = "again"; return; } // one request at a time; changes meanwhile lead to one more
  pending = "now";
  try {
    const view = await ask(`/api/view?${query({})}`);
    showView(view);
    await showSites(true);
  } catch (error) {
    byId("link").textContent = "The server does not answer; this page tries again.";
  }
  const again = pending === "again";
  pending = null;
  if (again) refresh();
}

function showView(view) {
  byId("run").textContent = view.run ? `Corymb · ${view.run}` : "Corymb";
  document.title = `${view.sentence} · Corymb`;
  byId("sentence").textContent = view.sentence;
  byId("link").textContent = view.enrolled ? `${view.online} of ${view.enrolled} sites are online.` : "";
  byId("alarms").replaceChildren(...view.alarms.map((alarm) => {
    const line = element("p", "", { className: alarm.severity });
    const who = alarm.who.length ? ` (${alarm.who.join(", ")}${alarm.more ? ` and ${alarm.more} more` : ""})` : "";
    line.append(element("strong", alarm.severity === "critical" ? "Critical: " : "Warning: "), alarm.text + who);
    return line;
  }));
  byId("cards").replaceChildren(...view.cards.map((card) => {
    const box = element("div", "", { className: "card" });
    box.append(element("b", card.value), card.title);
    return box;
  }));
  byId("curve-title").textContent = view.score ? `${view.score} over rounds` : "Score over rounds";
  drawCurve(view);
  if (view.events.length) byId("events").replaceChildren(...view.events.slice().reverse().map(eventLine));
  else byId("events").replaceChildren(element("li", "This run keeps no events."));
}

function eventLine(event) {
  const line = element("li");
  const seconds = event.seconds === null ? "" : ` after ${event.seconds.toFixed(1)} s`;
  const size = event.size ? `, ${(event.size / 1e6).toFixed(1)} MB` : "";
  const detail = event.detail ? `: ${event.detail}` : "";
  line.append(element("time", new Date(event.at * 1000).toLocaleTimeString()),
    `round ${event.round}, ${event.phase}: ${event.node} ${event.what}${seconds}${size}${detail}`);
  return line;
}

function drawCurve(view) {
  chart = chart || echarts.init(byId("curve"), null, { renderer: "canvas" });
  const axis = { axisLine: { lineStyle: { color: colour("--quiet") } }, axisLabel: { color: colour("--quiet") },
    splitLine: { lineStyle: { color: colour("--line") } } };
  chart.setOption({
    animation: false, grid: { left: 55, right: 15, top: 15, bottom: 28 },
    tooltip: { trigger: "axis", renderMode: "richText" },
    xAxis: { type: "value", minInterval: 1, min: 1, max: Math.max(2, view.round || 2), ...axis },
    yAxis: { type: "value", scale: true, ...axis },
    series: [{ type: "line", data: view.curve, showSymbol: view.curve.length < 40, color: colour("--good"), name: view.score }],
  });
}

function columns() {
  byId("columns").replaceChildren(...COLUMNS.map(([key, title]) => {
    const head = element("th", key ? "" : title, { scope: "col" });
    if (key) {
      const button = element("button", title, { type: "button" });
      button.addEventListener("click", () => { order = key; byId("sites").scrollTop = 0; showSites(true); });
      head.append(button);
      head.setAttribute("aria-sort", key === order ? "other" : "none");
    }
    return head;
  }));
}

async function showSites(force) {
  const box = byId("sites");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - MARGIN);
  const count = Math.ceil(box.clientHeight / ROW) + 2 * MARGIN;
  const isInside = first >= slice.offset && first + count <= slice.offset + slice.rows.length;
  if (!force && (isInside || slice.offset + slice.rows.length >= slice.total && first >= slice.offset)) return;
  slice = await ask(`/api/sites?${query({ offset: first, limit: count + 2 * MARGIN, order })}`);
  const text = order + JSON.stringify(slice);
  if (text === drawn) return; // a row that is replaced while it is clicked would lose the click
  drawn = text;
  columns();
  const above = element("tr"), below = element("tr");
  above.append(element("td", "", { colSpan: COLUMNS.length }));
  below.append(element("td", "", { colSpan: COLUMNS.length }));
  above.firstChild.style.height = `${slice.offset * ROW}px`;
  below.firstChild.style.height = `${Math.max(0, slice.total - slice.offset - slice.rows.length) * ROW}px`;
  const rows = slice.rows.map(siteRow);
  const active = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.site : null;
  byId("rows").replaceChildren(...(slice.offset ? [above] : []), ...rows,
    ...(slice.offset + slice.rows.length < slice.total ? [below] : []));
  if (active) byId("rows").querySelector(`[data-site="${CSS.escape(active)}"]`)?.focus();
  byId("count").textContent = `${slice.total} sites`;
}

function siteRow(site) {
  const row = element("tr"), name = element("td"), state = element("td", site.state.slice(2));
  const button = element("button", site.name, { type: "button" });
  button.dataset.site = site.name;
  button.addEventListener("click", () => openSite(site.name));
  name.append(button);
  state.className = `state ${site.state.slice(2)}`;
  state.title = site.since ? `since ${site.since}` : "";
  const raster = element("td"), spark = element("td");
  raster.append(rasterOf(site));
  spark.append(sparkOf(site));
  const error = element("td", site.error, { className: "error", title: site.error });
  row.append(name, state, raster, spark,
    element("td", site.share ? `${(100 * site.share).toFixed(1)} %` : "", { className: "number" }),
    element("td", site.examples ? String(site.examples) : "", { className: "number" }),
    element("td", site.counted ? `round ${site.counted}` : "", { className: "number" }), error,
    element("td", site.certificate < 1e6 ? `${Math.floor(site.certificate)} days` : "", { className: "number" }),
    element("td", site.software.replace("Corymb ", "").replace(", Flower ", " / "), { className: "quiet" }));
  return row;
}

function rasterOf(site) {
  const width = Math.max(1, site.raster.length), canvas = element("canvas", "", { width: 2 * width, height: 14 });
  const counted = [...site.raster].filter((code) => code === "+").length;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${site.name} counted in ${counted} of the last ${site.raster.length} rounds`);
  const drawing = canvas.getContext("2d");
  [...site.raster].forEach((code, index) => {
    if (!(code in CODES)) return;
    drawing.fillStyle = colour(CODES[code]);
    drawing.fillRect(2 * index, code === "+" ? 0 : 4, 2, code === "+" ? 14 : 6); // the height tells it, too
  });
  return canvas;
}

function sparkOf(site) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const title = site.seconds ? `${site.seconds.toFixed(1)} s` : "no answer yet";
  svg.setAttribute("width", "90");
  svg.setAttribute("height", "20");
  svg.setAttribute("class", "spark");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", title);
  const most = Math.max(...site.spark, 1e-9), step = 60 / Math.max(1, site.spark.length - 1);
  const points = site.spark.map((value, index) => `${(index * step).toFixed(1)},${(18 - 16 * value / most).toFixed(1)}`);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
  const holder = element("span", site.seconds ? `${title} ` : "");
  svg.append(path);
  if (points.length > 1) holder.append(svg);
  return holder;
}

async function openSite(name) {
  const site = await ask(`/api/site?${query({ name })}`), box = byId("site");
  const close = element("button", "Close", { type: "button" });
  const table = element("table"), head = element("tr"), body = element("tbody");
  close.addEventListener("click", () => { box.hidden = true; byId("rows").querySelector(`[data-site="${CSS.escape(name)}"]`)?.focus(); });
  ["round", "verdict", "reason", "examples", "weight", "down", "up"].forEach((title) => head.append(element("th", title, { scope: "col" })));
  site.verdicts.reverse().forEach((verdict) => {
    const row = element("tr");
    [verdict.round, verdict.code, verdict.reason, verdict.examples, verdict.weight === null ? "" : verdict.weight.toPrecision(3),
      `${(verdict.bytes_down / 1e6).toFixed(2)} MB`, `${(verdict.bytes_up / 1e6).toFixed(2)} MB`]
      .forEach((value) => row.append(element("td", String(value))));
    body.append(row);
  });
  const thead = element("thead"), events = element("ol", "", { className: "history" });
  thead.append(head);
  table.append(thead, body);
  events.append(...site.events.slice().reverse().map(eventLine));
  box.replaceChildren(element("h2", `The site ${name}`), close, table, ...(site.events.length ? [element("h2", "Its events"), events] : []));
  box.hidden = false;
  close.focus();
}

function listen() {
  const source = new EventSource(`/api/events?${query({})}`);
  source.addEventListener("change", refresh);
  source.onerror = () => { byId("link").textContent = "The connection to the server is lost; this page tries again."; };
}

columns();
byId("sites").addEventListener("scroll", () => showSites(false));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawn = ""; refresh(); });
addEventListener("resize", () => chart && chart.resize());
refresh().then(listen);
