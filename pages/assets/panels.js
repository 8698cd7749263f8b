// Panels of the researcher's page: the clients of one run, and scores over a setting.
"use strict";

let picked = new Set(); // the numbers of the clients that are chosen in the drift panel; all are shown if none is

function heat(id, cells, clients, rounds, pieces, gradient) {
  const isLong = clients.length > 30;
  chartOf(id).setOption({ animation: false, grid: { left: isLong ? 50 : 100, right: 90, top: 8, bottom: 25 }, tooltip: { renderMode: "richText" },
    xAxis: { type: "category", data: rounds, ...axisStyle() },
    yAxis: { type: "category", data: isLong ? clients.map((_, index) => index + 1) : clients, inverse: true, ...axisStyle() },
    visualMap: { right: 0, top: 0, textStyle: { color: colour("--quiet") }, ...(pieces ? { type: "piecewise", pieces } : { min: 0, max: 1, calculable: true, inRange: { color: gradient } }) },
    series: [{ type: "heatmap", data: cells, progressive: 20000 }] }, true);
}

function drawClients() {
  const experiment = chosen(), detailed = experiment.runs.filter((run) => run.clients);
  choices("run", detailed.map((_, index) => String(index)), detailed.map((run) => `${run.rule}, seed ${run.seed}`));
  const run = detailed[Number(byId("run").value)], until = Number(byId("replay").value);
  const last = run.rounds.filter((round) => round <= until).length;
  const codes = "+xs-", cells = [];
  const shown = run.clients.map((_, place) => place).filter((place) => !picked.size || picked.has(place));
  const clients = shown.map((place) => run.clients[place]), lines = new Map(shown.map((place, line) => [place, line]));
  shown.forEach((place, line) => [...run.raster[place].slice(0, last)].forEach((code, index) => { if (code !== " ") cells.push([index, line, codes.indexOf(code)]); }));
  heat("raster", cells, clients, run.rounds, ["counted", "rejected", "silent", "offline"].map((label, value) => ({ value, label, color: colour(["--good", "--bad", "--silent", "--away"][value]) })));
  const weights = run.weights.filter(([index, place]) => index < last && lines.has(place));
  byId("weights-title").hidden = byId("weights").hidden = !run.weights.length;
  if (run.weights.length) heat("weights", weights.map(([index, place, share]) => [index, lines.get(place), share]), clients, run.rounds, null, [colour("--panel"), colour("--good")]);
  drawDrift(run, last - 1, new Set(experiment.labels.hostile || []));
  drawBars(experiment, picked.size ? new Set(clients) : null);
  drawLabels(experiment, picked.size ? new Set(clients) : null);
  drawCertified(experiment);
}

// The drift of each client in the round `index` of a run; a rectangle drawn around points chooses their clients.
function drawDrift(run, index, hostile) {
  byId("drift-section").hidden = !run.drift.length;
  if (!run.drift.length) return;
  const points = run.drift.filter(([round]) => round === index);
  byId("picked").textContent = `Round ${run.rounds[index]}. ${picked.size ? `${picked.size} of ${run.clients.length} clients are chosen.` : "Draw a rectangle around clients to choose them."}${hostile.size ? " Triangles are hostile clients." : ""}`;
  byId("all").disabled = !picked.size;
  const chart = chartOf("drift");
  chart.off("brushEnd");
  chart.setOption({ animation: false, grid: { left: 60, right: 30, top: 30, bottom: 45 },
    tooltip: { renderMode: "richText", formatter: ({ value }) => `${run.clients[value[2]]}: length ${value[0]}, cosine ${value[1]}` },
    toolbox: { show: false }, brush: { xAxisIndex: 0, brushType: "rect", removeOnClick: true, outOfBrush: { colorAlpha: 0.25 } },
    xAxis: { type: "value", scale: true, name: "length of the update", nameLocation: "middle", nameGap: 28, ...axisStyle() },
    yAxis: { type: "value", min: -1, max: 1, name: "cosine with the step", ...axisStyle() },
    series: [{ type: "scatter", symbolSize: 10, data: points.map(([, place, length, cosine]) => ({ value: [length, cosine, place],
      symbol: hostile.has(run.clients[place]) ? "triangle" : "circle",
      itemStyle: { color: colour(hostile.has(run.clients[place]) ? "--bad" : "--good"), opacity: !picked.size || picked.has(place) ? 0.9 : 0.2 } })) }] }, true);
  chart.dispatchAction({ type: "takeGlobalCursor", key: "brush", brushOption: { brushType: "rect" } });
  chart.on("brushEnd", ({ areas }) => {
    if (!areas.length) return;
    const [[left, right], [low, high]] = areas[0].coordRange;
    pick(points.filter(([, , length, cosine]) => length >= left && length <= right && cosine >= low && cosine <= high).map(([, place]) => place));
  });
}

// A rule has the same colour in all panels that compare rules.
const placeOf = (rule) => [...new Set(allRuns().map(({ run }) => run.rule))].indexOf(rule);

function pick(places) { picked = new Set(places); drawClients(); }

const numericSettings = () => [...data.differing, ...data.parameters].filter((key) => {
  const values = allRuns().map(({ run }) => run.config[key]).filter((value) => value !== undefined && value !== "");
  return new Set(values).size > 1 && values.every((value) => Number.isFinite(Number(value)));
});

// Each rule's final score over a numeric setting, such as the number of hostile clients: mean and band over seeds.
function drawScores() {
  const key = byId("setting").value;
  byId("scores-section").hidden = !key;
  if (!key) return;
  const found = new Map();
  allRuns().filter(matches).forEach(({ run }) => {
    if (run.final === null || (run.config[key] ?? "") === "") return;
    const of = found.get(run.rule) || found.set(run.rule, new Map()).get(run.rule), x = Number(run.config[key]);
    of.set(x, [...(of.get(x) || []), run.final]);
  });
  const series = [...found].flatMap(([rule, of]) => withBand(rule, [...of].sort(([a], [b]) => a - b)
    .map(([x, values]) => [x, values.reduce((a, b) => a + b, 0) / values.length, Math.min(...values), Math.max(...values)]), placeOf(rule)));
  chartOf("scores").setOption({ animation: false, grid: { left: 60, right: 20, top: 40, bottom: 45 }, tooltip: { trigger: "axis", renderMode: "richText" },
    legend: { ...legendStyle(), data: [...found.keys()] },
    xAxis: { type: "value", name: key, nameLocation: "middle", nameGap: 28, min: "dataMin", max: "dataMax", ...axisStyle() },
    yAxis: { type: "value", scale: true, name: data.experiments[0].score, ...axisStyle() }, series }, true);
}

function drawBars(experiment, clients) {
  const names = [...new Set(experiment.clients.flatMap((each) => Object.keys(each.values)))].filter((name) => !clients || clients.has(name)).sort();
  byId("bars").hidden = byId("sites-title").hidden = !names.length;
  if (!names.length) return;
  chartOf("bars").setOption({ animation: false, grid: { left: 60, right: 20, top: 35, bottom: 45 }, tooltip: { trigger: "axis", renderMode: "richText" },
    legend: legendStyle(),
    xAxis: { type: "category", data: names, ...axisStyle() }, yAxis: { type: "value", name: experiment.score, ...axisStyle() },
    series: experiment.clients.map((each) => ({ name: each.rule, type: "bar", color: PALETTE[placeOf(each.rule) % PALETTE.length], data: names.map((name) => each.values[name] ?? null) })) }, true);
}

function drawLabels(experiment, chosen) {
  const shown = (experiment.labels.clients || []).map((name, place) => place).filter((place) => !chosen || chosen.has(experiment.labels.clients[place]));
  const clients = experiment.labels.clients && shown.map((place) => experiment.labels.clients[place]);
  const counts = shown.map((place) => experiment.labels.counts[place]);
  byId("labels").hidden = byId("labels-title").hidden = !clients;
  if (!clients || !counts.length) return;
  chartOf("labels").setOption({ animation: false, grid: { left: 60, right: 100, top: 15, bottom: 45 }, tooltip: { trigger: "axis", renderMode: "richText" },
    legend: { type: "scroll", orient: "vertical", right: 0, textStyle: { color: colour("--text") } },
    xAxis: { type: "category", data: clients, ...axisStyle() }, yAxis: { type: "value", ...axisStyle() },
    series: counts[0].map((_, label) => ({ name: String(label), type: "bar", stack: "all", color: PALETTE[label % PALETTE.length], itemStyle: { opacity: label < PALETTE.length ? 1 : 0.55 }, data: counts.map((row) => row[label]) })) }, true);
}

function drawCertified(experiment) {
  const series = experiment.runs.map((run) => {
    const points = Object.entries(run.metrics).filter(([name]) => /^certified-\d+$/.test(name))
      .map(([name, values]) => [Number(name.slice(10)), values.filter((value) => value !== null).at(-1)]).sort((a, b) => a[0] - b[0]);
    return { name: `${run.rule}, seed ${run.seed}`, type: "line", step: "end", data: points };
  }).filter((each) => each.data.length);
  byId("certified-section").hidden = !series.length;
  if (series.length) chartOf("certified").setOption({ animation: false, color: PALETTE, grid: { left: 60, right: 20, top: 35, bottom: 40 }, tooltip: { trigger: "axis", renderMode: "richText" },
    legend: legendStyle(), xAxis: { type: "value", ...axisStyle() }, yAxis: { type: "value", max: 1, ...axisStyle() }, series }, true);
}
