// Line plots by layer: series that share a chart share a plot; intervals are bands.

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const LOG_FROM = 300;
const SHARES_END = 10;
const POWERS = Array.from({ length: 31 }, (_, i) => i - 15);

section("layers", (body) => {
  const charts = new Map();
  for (const series of DATA.layers) charts.set(series.chart, [...(charts.get(series.chart) ?? []), series]);
  const cards = [...charts].map(([name, members]) => {
    const node = el("div", { role: "img", "aria-label": `${prose(name)} by layer: ${members.map((series) => prose(series.label)).join(", ")}` });
    const log = spansDecades(members);
    const unit = [...new Set(members.map((series) => series.unit).filter(Boolean))].join(", ");
    plot(node, () => linePlot(members, log));
    return el("figure", { class: "card" }, el("figcaption", {}, el("h3", {}, prose(name)),
      el("p", { class: "about" }, [prose(unit), log ? "log scale" : ""].filter(Boolean).join(", ") || "\u00a0")), node);
  });
  body.append(el("div", { class: "columns charts" }, ...cards));
});

// Amounts over several decades get a log axis; shares and cosines keep a linear one.
function spansDecades(members) {
  const values = members.flatMap((series) => series.values).filter(Number.isFinite);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return values.length > 0 && low > 0 && high > SHARES_END && high / low >= LOG_FROM;
}

function linePlot(members, log) {
  const traces = members.flatMap((series, i) => {
    const colour = CATEGORIES[i % CATEGORIES.length];
    const line = {
      type: "scatter", mode: series.values.length > 60 ? "lines" : "lines+markers", x: series.layers, y: series.values, name: plain(series.label),
      line: { color: colour, width: 2, dash: DASHES[Math.floor(i / CATEGORIES.length) % DASHES.length] }, marker: { size: 5, color: colour },
      hovertemplate: "%{y:.4~g}", cliponaxis: false, legendgroup: String(i),
    };
    if (!series.low || !series.high) return [line];
    const edge = { type: "scatter", mode: "lines", x: series.layers, line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: String(i) };
    return [{ ...edge, y: series.low }, { ...edge, y: series.high, fill: "tonexty", fillcolor: bandColour(colour, 0.18) }, line];
  });
  const last = Math.max(...members.flatMap((series) => series.layers), 1);
  const many = members.length > 1;
  return {
    traces,
    layout: {
      height: 276, hovermode: "x unified", showlegend: many,
      margin: { l: 52, r: 8, t: many ? 12 + 18 * Math.ceil(members.length / 3) : 12, b: 40 },
      legend: { ...legendAbove(), itemclick: "toggle", itemdoubleclick: false },
      xaxis: { title: { text: "layer" }, dtick: tickStep(last, 10), tick0: 0, range: [-0.5, last + 0.5], showgrid: false, zeroline: false, unifiedhovertitle: { text: "layer %{x}" } },
      yaxis: log ? { type: "log", tickvals: POWERS.map((power) => 10 ** power), ticktext: POWERS.map(decade) } : { rangemode: "tozero" },
    },
  };
}
