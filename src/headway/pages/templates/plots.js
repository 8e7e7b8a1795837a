// Plotly: unpacked once, then every plot of the page is drawn, and drawn anew when the theme changes.

const PLOTS = [];
let plotlyReady = false;

async function loadPlotly() {
  if (!("DecompressionStream" in window)) throw new Error("this browser cannot unpack gzip; use one from 2023 or later");
  const packed = byId("plotly");
  const stream = new Blob([bytes(packed.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  packed.remove();
  document.head.append(script);
  plotlyReady = true;
}

// Plotly reads a few tags in its texts; these keep a label a label.
const plain = (text) => prose(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// Registers a plot in `node`. `build()` returns {traces, layout}; the answer draws it anew. `after(node)` runs once.
function plot(node, build, after) {
  node.classList.add("plot");
  const entry = { node, after, draw: () => draw(entry, build) };
  PLOTS.push(entry);
  if (plotlyReady) entry.draw();
  return entry.draw;
}

function draw(entry, build) {
  if (!plotlyReady) return;
  const { traces, layout } = build();
  Plotly.react(entry.node, traces, themed(layout), {
    displayModeBar: false, doubleClick: false, scrollZoom: false, responsive: true,
  });
  if (entry.after && !entry.drawn) entry.after(entry.node);
  entry.drawn = true;
}

const drawAll = () => PLOTS.forEach((entry) => entry.draw());

function themed(layout) {
  const axis = {
    color: css("--muted"), gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"),
    fixedrange: true, ticks: "", title: { standoff: 8 },
  };
  const merged = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, showlegend: false,
    font: { family: css("--sans"), size: 12, color: css("--muted") },
    margin: { l: 48, r: 12, t: 8, b: 40 },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), family: css("--sans"), size: 12 } },
    ...layout,
  };
  for (const name of Object.keys(merged).filter((key) => /^[xy]axis/.test(key)).concat("xaxis", "yaxis")) {
    const own = merged[name] ?? {};
    merged[name] = { ...axis, ...own, title: { ...axis.title, ...own.title } };
  }
  return merged;
}

const narrow = () => innerWidth < 700;

// Room around a heat map of `rows` pixels, with a colour bar at its side, or under it where the page is narrow.
// `labels` is the height of the tick labels and title of the layer or position axis.
function frame(rows, { labels = 42, bar = true } = {}) {
  const below = labels + (narrow() && bar ? 42 : 0);
  return { height: rows + below + 6, margin: { l: 46, r: narrow() || !bar ? 8 : 88, t: 6, b: below } };
}

function colourBar(title, extra = {}) {
  const side = narrow()
    ? { orientation: "h", x: 0.5, y: 0, yref: "container", yanchor: "bottom", ypad: 2, len: 0.95 }
    : { x: 1.01, xpad: 4, len: 1, ypad: 0, title: { text: plain(title), side: "right" } };
  return { thickness: 10, outlinewidth: 0, ticklen: 3, tickcolor: css("--line"), tickfont: { color: css("--muted"), size: 11 }, nticks: 6, ...side, ...extra };
}

// The page's own tip for a plot, in place of Plotly's: `describe(point)` gives its lines. It follows the mouse, and comes
// back when the page was scrolled under it.
function tipFor(node, describe) {
  let point = null;
  node.on("plotly_hover", ({ points, event }) => { point = points[0]; showTip(event, describe(point)); });
  node.on("plotly_unhover", () => { point = null; hideTip(); });
  node.addEventListener("mousemove", (event) => { if (point) showTip(event, describe(point)); });
}

// A legend in one row above the plot.
const legendAbove = () => ({ orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top", font: { color: css("--ink") } });

// Tick distance that leaves about `most` ticks on an axis of `count` whole numbers.
const tickStep = (count, most = 12) => [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].find((step) => count / step <= most) ?? 20000;

addEventListener("beforeprint", () => { document.documentElement.setAttribute("data-print", ""); repaint(); });
addEventListener("afterprint", () => { document.documentElement.removeAttribute("data-print"); repaint(); });
night.addEventListener("change", () => repaint());

// Everything that holds colours of the theme: plots, and the canvases and strips that register here.
const painters = [];
function repaint() {
  painters.forEach((paint) => paint());
  drawAll();
}
