// Quality against cost: every point, and the frontier of those that no other point beats.

const METHODS = [...new Set(DATA.points.map((point) => point.method))].filter((method) => method !== "dense");
const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "pentagon", "x"];
const WORST = "worst loss";

// The marks of the legend, in the shapes that Plotly draws.
const SHAPES = {
  circle: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z", square: "M-4.6,-4.6H4.6V4.6H-4.6Z", "triangle-up": "M0,-5.5L5.5,4.2H-5.5Z",
  diamond: "M0,-6L6,0L0,6L-6,0Z", cross: "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z", "triangle-down": "M0,5.5L5.5,-4.2H-5.5Z",
  pentagon: "M0,-6L5.7,-1.9L3.5,4.9H-3.5L-5.7,-1.9Z", x: "M-5.5,-3.5L-3.5,-5.5L0,-2L3.5,-5.5L5.5,-3.5L2,0L5.5,3.5L3.5,5.5L0,2L-3.5,5.5L-5.5,3.5L-2,0Z",
  star: "M0,-6.5L1.6,-2.1L6.2,-2L2.5,0.8L3.8,5.3L0,2.6L-3.8,5.3L-2.5,0.8L-6.2,-2L-1.6,-2.1Z",
};

const colourOf = (method) => (method === "dense" ? css("--ink") : CATEGORIES[METHODS.indexOf(method) % CATEGORIES.length]);
const symbolOf = (method) => (method === "dense" ? "star" : SYMBOLS[METHODS.indexOf(method) % SYMBOLS.length]);
const share = (value) => (Number.isFinite(value) ? `${number(100 * value, Number.isInteger(100 * value))}\u00a0%` : "–");
const costText = (name, value) => (name === "density" ? share(value) : `${number(value, false)}\u00a0×`);
const qualityText = (name, value) => (name === WORST ? share(value) : number(value, false));
const isKnown = (value) => value !== null && Number.isFinite(value);

// How a quality is laid out. A loss runs over decades in both directions, so its axis is linear near the loss allowed and
// logarithmic beyond; a perplexity that grows manifold is logarithmic; the rest is linear.
const LOSSES = [-1, -0.5, -0.2, -0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1000];
const MANIFOLD = 4;

function scaleOf(name, values) {
  const known = values.flat().filter(isKnown);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  if (name === WORST) {
    const linear = Math.max(DATA.tolerance, 0.01);
    const to = (value) => Math.asinh(value / linear);
    const ticks = LOSSES.filter((value) => value >= low * 1.3 - 0.02 && value <= high * 1.3 + 0.02);
    return { to, axis: { tickvals: ticks.map(to), ticktext: ticks.map(share) } };
  }
  if (!(low > 0 && high / low > MANIFOLD && high > 2)) return { to: (value) => value, axis: {} };
  const ticks = [1, 2, 5].flatMap((first) => POWERS_OF_TEN.map((power) => first * power)).filter((value) => value >= low / 2 && value <= high * 2);
  return { to: Math.log10, axis: { tickvals: ticks.map(Math.log10), ticktext: ticks.map((value) => number(value)) } };
}

const POWERS_OF_TEN = Array.from({ length: 10 }, (_, i) => 10 ** i);

// A point in words, for a tip: what it loses and what it costs.
function pointLines(point) {
  const scores = DATA.qualities.filter(({ name }) => isKnown(point.values[name][0])).map(({ name, label }) => {
    const [value, low, high] = point.values[name];
    const interval = isKnown(low) && isKnown(high) && high > low ? ` (${qualityText(name, low)} to ${qualityText(name, high)})` : "";
    return `${prose(label)} ${qualityText(name, value)}${interval}`;
  });
  const costs = DATA.costs.filter(({ name }) => isKnown(point.costs[name])).map(({ name, label }) =>
    `${label} ${costText(name, point.costs[name])}${point.noise.includes(name) && point.method !== "dense" ? ", within noise" : ""}`);
  const missing = point.missing.length ? [`not measured: ${point.missing.map(prose).join("; ")}`] : [];
  return [prose(point.label), ...scores, ...costs, ...missing];
}

section("frontier", (body) => {
  if (!DATA.qualities.length || !DATA.costs.length) {
    body.append(el("p", { class: "quiet" }, "There is no quality or no cost to draw."));
    return;
  }
  const savedCost = DATA.costs.find(({ name }) => name === DATA.saves) ?? DATA.costs[0];
  const state = { quality: DATA.qualities[0].name, cost: savedCost.name };
  const pick = (id, options, chosen, use) => el("select", { id, onchange: (event) => { use(event.target.value); redraw(); } },
    ...options.map(({ name, label }) => el("option", { value: name, selected: name === chosen }, prose(label))));
  const node = el("div", { role: "img", "aria-label": "Quality against cost of every point; the table above holds the numbers" });
  const said = el("p", { class: "about", id: "on-frontier", "aria-live": "polite" });
  body.append(
    el("p", { class: "lead" }, "Costs are multiples of dense; up and to the left is better. The line joins the points that no other point beats on both; bars are 95 % intervals. The grey band is what dense differs from itself by when it is timed twice. A ring marks the recommended point; hollow ones were not measured on everything that counts."),
    el("figure", { class: "card wide" },
      el("div", { class: "axes" },
        el("label", {}, "Quality ", pick("pick-quality", DATA.qualities, state.quality, (name) => { state.quality = name; })),
        el("label", {}, "Cost ", pick("pick-cost", DATA.costs, state.cost, (name) => { state.cost = name; }))),
      node, keys(), said));
  const redraw = plot(node, () => {
    const front = DATA.frontiers[`${state.quality}|${state.cost}`];
    said.textContent = `On the frontier: ${front.map((i) => prose(DATA.points[i].label)).join(", ")}.`;
    return frontierPlot(state, front);
  }, () => tipFor(node, (point) => pointLines(DATA.points[point.customdata])));
});

// One entry per method: its mark and name.
function keys() {
  const entry = (method) => {
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    mark.setAttribute("viewBox", "-7 -7 14 14");
    const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
    shape.setAttribute("d", SHAPES[symbolOf(method)]);
    const paint = () => shape.setAttribute("fill", colourOf(method));
    painters.push(paint);
    paint();
    mark.append(shape);
    return el("li", {}, mark, prose(method));
  };
  return el("ul", { class: "keys" }, ...["dense", ...METHODS].map(entry));
}

function frontierPlot({ quality, cost }, front) {
  const axis = DATA.qualities.find(({ name }) => name === quality);
  const costAxis = DATA.costs.find(({ name }) => name === cost);
  const drawn = DATA.points.map((point, i) => ({ point, i, x: point.costs[cost], y: point.values[quality] })).filter(({ x, y }) => isKnown(x) && isKnown(y[0]));
  const scale = scaleOf(quality, drawn.map(({ y }) => y));
  drawn.forEach((entry) => { entry.y = entry.y.map((value) => (isKnown(value) ? scale.to(value) : null)); });
  const spans = ([value, low, high]) => ({
    array: [isKnown(high) ? Math.max(high - value, 0) : 0], arrayminus: [isKnown(low) ? Math.max(value - low, 0) : 0],
  });
  const line = drawn.length ? front.map((i) => [DATA.points[i].costs[cost], scale.to(DATA.points[i].values[quality][0])]) : [];
  const traces = [
    {
      type: "scatter", mode: "lines", x: line.map(([x]) => x), y: line.map(([, y]) => y), hoverinfo: "skip",
      line: { color: css("--accent"), width: 2, shape: "hv" },
    },
    ...drawn.map(({ point, i, x, y }) => ({
      type: "scatter", mode: "markers+text", x: [x], y: [y[0]], customdata: [i], hoverinfo: "none",
      text: [point.budget === null ? plain(point.method) : share(point.budget)], textposition: "top right", textfont: { color: css("--muted"), size: 11 },
      error_y: { type: "data", symmetric: false, ...spans(y), thickness: 1, width: 0, color: bandColour(colourHex(point.method), 0.55) },
      marker: {
        symbol: symbolOf(point.method) + (point.whole ? "" : "-open"), size: point.method === "dense" ? 15 : 12, color: colourOf(point.method),
        line: point.whole ? { width: 1, color: css("--card") } : { width: 2 },
      },
      cliponaxis: false,
    })),
    ...drawn.filter(({ point }) => point.label === DATA.recommended).map(({ x, y }) => ({
      type: "scatter", mode: "markers", x: [x], y: [y[0]], hoverinfo: "skip", cliponaxis: false,
      marker: { symbol: "circle-open", size: 25, color: css("--accent"), line: { width: 2 } },
    })),
  ];
  const dense = drawn.find(({ point }) => point.method === "dense");
  const shapes = dense ? [
    { type: "line", x0: dense.x, x1: dense.x, yref: "paper", y0: 0, y1: 1, line: { color: css("--muted"), width: 1, dash: "dot" } },
    { type: "line", xref: "paper", x0: 0, x1: 1, y0: dense.y[0], y1: dense.y[0], line: { color: css("--muted"), width: 1, dash: "dot" } },
  ] : [];
  const noise = DATA.noise[cost] ?? [];
  if (noise.length && noise.every(isKnown)) {
    shapes.push({ type: "rect", x0: noise[0], x1: noise[1], yref: "paper", y0: 0, y1: 1, fillcolor: css("--muted"), opacity: 0.13, line: { width: 0 }, layer: "below" });
  }
  const notes = [];
  if (quality === WORST) {
    const allowed = scale.to(DATA.tolerance);
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: allowed, y1: allowed, line: { color: css("--accent"), width: 1, dash: "dash" } });
    notes.push({ xref: "paper", x: 1, xanchor: "right", y: allowed, yanchor: "top", showarrow: false, text: "loss allowed", font: { color: css("--accent"), size: 11 } });
  }
  const xs = drawn.map(({ x }) => x);
  const pad = Math.max((Math.max(...xs) - Math.min(...xs, 0)) * 0.08, 0.05);
  return {
    traces,
    layout: {
      height: narrow() ? 380 : 460, hovermode: "closest", margin: { l: 64, r: 24, t: 14, b: 46 }, shapes, annotations: notes,
      xaxis: { title: { text: `${costAxis.label}${cost === "density" ? " (share of pairs read)" : ", × dense"}` }, range: [Math.max(Math.min(...xs) - pad, 0), Math.max(...xs) + pad], zeroline: false },
      yaxis: { title: { text: plain(axis.label) }, autorange: axis.higher ? true : "reversed", zeroline: false, ...scale.axis },
    },
  };
}

// A colour as a hex code, for a band: the ink of the theme stands for dense.
function colourHex(method) {
  const colour = colourOf(method);
  return colour.length === 4 ? `#${[...colour.slice(1)].map((c) => c + c).join("")}` : colour;
}
