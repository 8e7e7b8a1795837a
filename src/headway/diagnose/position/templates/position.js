// Scores by place and length, the index beside what chance gives, evidence that was moved, and saliency.

let shownRetriever = DATA.retrievers[0];

const percent = (value) => `${Math.round(100 * value)} %`;
const range = (bin) => `${percent(bin / DATA.bins)} to ${percent((bin + 1) / DATA.bins)}`;
const sign = (value) => (Number.isFinite(value) ? `${value > 0 ? "+" : ""}${number(value, false)}` : "–");
const lines = () => [css("--accent"), css("--bar"), css("--muted"), css("--ink")];

function retrieverChoice(follow) {
  if (DATA.retrievers.length < 2) return null;
  const select = el("select", { "aria-label": "Retriever", onchange: (event) => {
    shownRetriever = DATA.retrievers[Number(event.target.value)];
    follow();
  } }, ...DATA.retrievers.map(({ name }, i) => el("option", { value: i }, prose(name))));
  return el("div", { class: "controls" }, el("label", {}, "Retriever ", select));
}

section("places", (body) => {
  const node = el("div", { role: "img", "aria-label": "Mean nDCG by relative position of the answer and length of the document" });
  const redraw = plot(node, placesPlot, () => tipFor(node, ({ x, y, z }) => {
    const group = shownRetriever.groups.find(({ name }) => name === y);
    const bin = Math.round(x * DATA.bins - 0.5);
    return [`${y}, answer at ${range(bin)}`, `nDCG@10 ${number(z, false)}`, `${group.counts[bin]} queries`];
  }));
  body.append(
    el("p", { class: "lead" }, "How well answers are found, by where they stand in their document (from left to right) and how long it is. A row that keeps its colour does not depend on the place; empty cells have no query."),
    ...[retrieverChoice(redraw)].filter(Boolean), el("figure", { class: "card wide" }, node));
});

function placesPlot() {
  const groups = shownRetriever.groups;
  const shape = frame(34 * groups.length);
  return {
    traces: [{
      type: "heatmap", z: groups.map(({ means }) => means), x: groups[0].means.map((_, bin) => (bin + 0.5) / DATA.bins), y: groups.map(({ name }) => name),
      zmin: 0, zmax: 1, colorscale: plotlyScale(ramps().sequential), hoverinfo: "none", xgap: 1, ygap: 3, colorbar: colourBar("nDCG@10"),
    }],
    layout: { ...shape, margin: { ...shape.margin, l: 128 }, xaxis: { title: { text: "place of the answer in its document" }, tickformat: ".0%", showgrid: false, zeroline: false }, yaxis: { autorange: "reversed", showgrid: false, zeroline: false } },
  };
}

section("index", (body) => {
  const rows = DATA.retrievers.flatMap((one) => one.groups.filter(({ psi }) => psi).map((group) => ({ one, group })));
  const node = el("div", { role: "img", "aria-label": "Position sensitivity of each group of queries, and what shuffled positions give; the table below holds the numbers" });
  plot(node, () => indexPlot(rows), () => tipFor(node, ({ customdata }) => {
    const { one, group } = rows[customdata];
    return [`${one.name}, ${group.name}`, `sensitivity ${number(group.psi.value, false)}, p = ${number(group.psi.p_value, false)}`, `shuffled positions: ${number(group.psi.null_low, false)} to ${number(group.psi.null_high, false)}`, `${group.queries} queries`];
  }));
  const cells = DATA.retrievers.flatMap((one) => one.groups.map((group) => [
    one.name, group.name, group.queries, group.ndcg, group.psi ? number(group.psi.value, false) : "–",
    group.psi ? sign(group.psi.value - group.psi.null_mean) : group.undefined, group.psi ? number(group.psi.p_value, false) : "–",
    group.wide ? sign(group.wide.value - group.wide.null_mean) : "–", group.slope ? `${sign(group.slope.value)} (p = ${number(group.slope.p_value, false)})` : "–",
    group.reading ? group.reading[0] : "–",
  ]));
  body.append(
    el("p", { class: "lead" }, "The index is 1 − least / most over the places: 0 is flat, 1 means that some place is never found. It compares extremes of noisy means, so it is above 0 by chance alone: the bar is the middle 95 % of what shuffled positions give. A point inside its bar shows nothing."),
    ...(rows.length ? [el("figure", { class: "card wide" }, node)] : []),
    el("div", { class: "card wide" }, table(["retriever", "documents", "queries", "nDCG@10", "PSI", "beyond chance", "p", "five bins, beyond chance", "slope", "reading"], cells)));
});

function indexPlot(rows) {
  const label = ({ one, group }) => `${plain(one.name)} · ${plain(group.name)}`;
  const at = rows.map((_, i) => i);
  const bars = {
    type: "bar", orientation: "h", y: at, base: rows.map(({ group }) => group.psi.null_low), x: rows.map(({ group }) => group.psi.null_high - group.psi.null_low),
    hoverinfo: "none", customdata: at, marker: { color: css("--hole") }, width: 0.6,
  };
  const points = {
    type: "scatter", mode: "markers", y: at, x: rows.map(({ group }) => group.psi.value), hoverinfo: "none", customdata: at,
    marker: { size: 11, color: rows.map(({ group }) => (group.psi.p_value < 0.05 ? css("--accent") : css("--bar"))) },
  };
  return {
    traces: [bars, points],
    layout: {
      height: 26 * rows.length + 60, hovermode: "closest", margin: { l: narrow() ? 150 : 210, r: 16, t: 8, b: 42 },
      xaxis: { title: { text: "position sensitivity" }, range: [-0.02, 1.05], zeroline: false },
      yaxis: { tickvals: at, ticktext: rows.map(label), autorange: "reversed", showgrid: false, zeroline: false },
    },
  };
}

section("moved", (body) => {
  const known = DATA.retrievers.filter(({ moved }) => moved);
  const node = el("div", { role: "img", "aria-label": "Score of the same answer at ten places of the same documents" });
  const gain = ({ moved }) => moved.curve.reduce((a, b) => a + b, 0) / moved.curve.length - moved.without;
  const share = (one) => one.moved.curve.map((value) => (value - one.moved.without) / gain(one));
  plot(node, () => ({
    traces: known.map((one, i) => ({
      type: "scatter", mode: "lines+markers", name: plain(one.name), x: one.moved.positions, y: share(one), hoverinfo: "none", customdata: one.moved.curve.map((value) => [i, value]),
      line: { color: lines()[i % 4], width: 2 }, marker: { size: 7, color: lines()[i % 4] },
    })),
    layout: {
      height: 300, showlegend: known.length > 1, legend: legendAbove(), hovermode: "closest", margin: { l: 58, r: 12, t: 30, b: 42 },
      xaxis: { title: { text: "place of the answer" }, tickformat: ".0%", range: [-0.02, 1.02], zeroline: false }, yaxis: { title: { text: "share of the mean gain" }, rangemode: "tozero" },
    },
  }), () => tipFor(node, ({ x, y, customdata: [i, value] }) => [known[i].name, `answer at ${percent(x)}`, `score ${number(value, false)}, ${number(y, false)} of the mean gain`]));
  const words = ({ slope }) => (Math.abs(slope.value) < 1e-9 ? "0" : `${sign(slope.value)}${Number.isFinite(slope.low) ? ` (${number(slope.low, false)} to ${number(slope.high, false)})` : ""}`);
  body.append(
    el("p", { class: "lead" }, `One sentence, moved from the start to the end of the same document: topic, length and wording stay. What the answer adds to the score, as a share of what it adds on average over ten places; flat at 1 is no bias.`),
    el("figure", { class: "card wide" }, node),
    el("div", { class: "card wide" }, table(["retriever", "documents", "score with", "score without", "slope from start to end (95 %)"], known.map((one) => [one.name, one.moved.documents, gain(one) + one.moved.without, one.moved.without, words(one.moved)]))));
});

section("saliency", (body) => {
  const found = DATA.saliency;
  const node = el("div", { role: "img", "aria-label": "Gradient saliency by relative position" });
  const x = found.mean.map((_, i) => i / (found.mean.length - 1));
  plot(node, () => ({
    traces: [
      { type: "scatter", mode: "lines", x: [...x, ...x.slice().reverse()], y: [...found.mean.map((m, i) => m + found.spread[i]), ...found.mean.map((m, i) => Math.max(m - found.spread[i], 0)).reverse()], fill: "toself", fillcolor: css("--hole"), line: { width: 0 }, hoverinfo: "skip", showlegend: false },
      { type: "scatter", mode: "lines", name: "gradient (99th percentile = 1)", x, y: found.mean, line: { color: css("--accent"), width: 2 }, hoverinfo: "none" },
      ...(found.attention ? [{ type: "scatter", mode: "lines", name: "attention of the pooled rows (average token = 1)", x, y: found.attention, line: { color: css("--bar"), width: 2, dash: "dot" }, hoverinfo: "none" }] : []),
    ],
    layout: { height: 320, showlegend: true, legend: legendAbove(), hovermode: "closest", margin: { l: 48, r: 12, t: 34, b: 42 }, xaxis: { title: { text: "place in the document" }, tickformat: ".0%", zeroline: false }, yaxis: { rangemode: "tozero" } },
  }), () => tipFor(node, ({ x: at, y, data }) => [data.name, `at ${percent(at)}: ${number(y, false)}`]));
  body.append(
    el("p", { class: "lead" }, `How much the score would change with each token, over ${found.documents} documents whose answer stands in the middle: a slope is the model's own. The band is one standard deviation over documents.`),
    el("figure", { class: "card wide" }, node));
});
