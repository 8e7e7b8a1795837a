// A sample of the records as points, and the retrieval score of every head.

const [INFLUENCE, TOKENS, REPETITION, LOSS, DOMAIN, KEPT] = [0, 1, 2, 3, 4, 5];
const AXES = [
  { name: "length", column: TOKENS, words: "tokens", type: "log" },
  { name: "repetition", column: REPETITION, words: "repetition, %", scale: 100 },
  { name: "base loss", column: LOSS, words: "loss, nats per token" },
];
const rise = (value) => `${number(100 * value, false)}\u00a0%`;
const recordLines = (row) => [prose(DATA.domains[row[DOMAIN]] ?? ""), `influence ${rise(row[INFLUENCE])}`, `${number(row[TOKENS])} tokens`,
  `repetition ${rise(row[REPETITION])}`, `loss ${number(row[LOSS], false)}`, row[KEPT] ? "kept" : "not kept"];

section("sample", (body) => {
  const rows = DATA.sample.filter((row) => Number.isFinite(row[INFLUENCE]));
  if (!rows.length) {
    body.append(el("p", { class: "quiet" }, "No record has a number."));
    return;
  }
  const cards = AXES.map((axis) => {
    const [value, low, high] = DATA.correlations[axis.name] ?? [];
    const node = el("div", { role: "img", "aria-label": `Influence by ${axis.name}, one point a record` });
    plot(node, () => scatter(rows, axis), () => tipFor(node, (point) => recordLines(rows[point.customdata])));
    const about = Number.isFinite(value) ? `Spearman ρ within domains ${number(value, false)} (${number(low, false)} to ${number(high, false)})` : "too few records for a correlation";
    return el("figure", { class: "card" }, el("figcaption", {}, el("h3", {}, `Influence by ${axis.name}`), el("p", { class: "about" }, about)), node);
  });
  body.append(el("p", { class: "lead" }, `${number(rows.length)} records; kept ones stand out. A score that goes with length or repetition chooses by these too.`), el("div", { class: "columns charts" }, ...cards));
});

function scatter(rows, { column, words, type, scale = 1 }) {
  const kept = [false, true].map((side) => rows.map((row, i) => ({ row, i })).filter(({ row }) => Boolean(row[KEPT]) === side));
  return {
    traces: kept.map((points, side) => ({
      type: "scatter", mode: "markers", x: points.map(({ row }) => scale * row[column]), y: points.map(({ row }) => 100 * row[INFLUENCE]), customdata: points.map(({ i }) => i), hoverinfo: "none",
      marker: { size: side ? 7 : 5, color: side ? css("--accent") : css("--muted"), opacity: side ? 0.85 : 0.45 },
    })),
    layout: { height: 300, hovermode: "closest", margin: { l: 56, r: 12, t: 8, b: 46 }, xaxis: { title: { text: words }, type: type ?? "linear", zeroline: false }, yaxis: { title: { text: "influence, %" }, zeroline: true } },
  };
}

section("heads", (body) => {
  const scores = DATA.head_scores;
  const heads = scores[0].length;
  const z = Array.from({ length: heads }, (_, head) => scores.map((layer) => layer[head]));
  const node = el("div", { role: "img", "aria-label": "Retrieval score of every head" });
  plot(node, () => ({
    traces: [
      { type: "heatmap", z, colorscale: ramps().sequential.map((colour, i, all) => [i / (all.length - 1), colour]), zmin: 0, zmax: 1, xgap: 1, ygap: 1, hoverinfo: "none", colorbar: colourBar("retrieval score") },
      { type: "scatter", mode: "markers", x: DATA.heads.map(([layer]) => layer), y: DATA.heads.map(([, head]) => head), hoverinfo: "skip", marker: { symbol: "circle-open", size: 12, color: css("--accent"), line: { width: 2 } } },
    ],
    layout: { ...frame(Math.max(24 * heads, 120)), hovermode: "closest", xaxis: { title: { text: "layer" }, dtick: tickStep(scores.length), showgrid: false, zeroline: false }, yaxis: { title: { text: "head" }, dtick: tickStep(heads), showgrid: false, zeroline: false } },
  }), () => tipFor(node, ({ x, y, z: score }) => [`layer ${x}, head ${y}`, `retrieval score ${number(score, false)}`]));
  body.append(el("p", { class: "lead" }, "How often a head's strongest weight stands on the token that it should copy, on generated look-ups. Rings are the heads that were masked."), el("figure", { class: "card wide" }, node));
});
