// The token strip: the text itself, each token coloured by the mass it receives, beside an overview of layers × positions.
// Colours are on a log scale, because a sink receives a thousand times more than its neighbours.

const PAGE = 4096;
const BINS = 512;
const SINK_SHARE = 0.3;
const TOP_TOKENS = 12;

section("tokens", (body) => {
  const packed = DATA.received;
  if (!packed) {
    body.append(el("p", { class: "quiet" }, "Received mass was not measured in this run."));
    return;
  }
  const { rows: layers, columns: count } = packed;
  const mass = unpackLog(packed);
  const mean = columnMeans(mass, layers, count);
  const scale = logScale(mass);
  const secondary = new Map((DATA.secondary.tokens ?? []).filter(isRecord).map((item) => [item.position, item]));
  const primary = DATA.secondary.primary?.position;
  const named = new Set(Array.isArray(DATA.sinks.positions) ? DATA.sinks.positions : Number.isInteger(primary) ? [primary] : []);
  const threshold = Number.isFinite(DATA.sinks.epsilon) ? DATA.sinks.epsilon : SINK_SHARE;
  let layer = -1;
  let page = 0;
  let cursor = null;
  const width = Math.ceil(count / BINS);
  const binRange = (bin) => [bin * width, Math.min(count, (bin + 1) * width) - 1];
  let bins = null;

  const at = (position) => (layer < 0 ? mean[position] : mass[layer * count + position]);
  const isSink = (position) => named.has(position) || at(position) > threshold;

  const select = el("select", { id: "strip-layer", onchange: () => { layer = Number(select.value); colour(); } },
    el("option", { value: -1 }, "mean over layers"), ...Array.from({ length: layers }, (_, i) => el("option", { value: i }, `layer ${i}`)));
  const overview = el("div", { id: "received-map", role: "img", "aria-label": "Received mass by layer and position" });
  const strip = el("div", { id: "strip", tabindex: "0", role: "group", "aria-label": "Tokens coloured by received mass; arrow keys move, the line below tells position and mass" });
  const reading = el("p", { id: "strip-reading", class: "about", "aria-live": "polite" }, "Hover a token, or focus the text and use the arrow keys.");
  const key = el("div", { class: "strip-key" });
  const strongest = el("div", { id: "strongest" });
  body.append(
    el("p", { class: "lead" }, "How much attention each token receives, per query that can see it, as a mean over the heads of a layer."),
    el("div", { class: "card wide" }, el("h3", {}, "Layers × positions"), el("p", { class: "about" }, "Each cell shows its strongest token; choose a cell to read the text there in that layer."), overview),
    el("div", { class: "card wide" },
      el("div", { class: "controls" }, el("label", { for: "strip-layer" }, "Colour by"), select, key, pager()),
      strip, reading),
    el("div", { class: "card wide" }, strongest));

  plot(overview, overviewPlot, (node) => {
    const binOf = (point) => point.pointNumber[1];
    tipFor(node, (point) => {
      const best = binned().where[point.y][binOf(point)];
      const [first, last] = binRange(binOf(point));
      return [`Layer ${point.y}, ${first === last ? `position ${first}` : `positions ${first} to ${last}`}`,
        el("span", {}, "strongest: ", tokenChip(best), ` at ${number(best)}`), `receives ${number(mass[point.y * count + best], false)}`];
    });
    node.on("plotly_click", ({ points: [point] }) => {
      layer = point.y;
      select.value = layer;
      go(binned().where[point.y][binOf(point)]);
    });
  });

  // The strongest token of each cell of the overview, worked out once.
  function binned() {
    if (bins) return bins;
    const binCount = Math.ceil(count / width);
    bins = { where: [], z: [] };
    for (let l = 0; l < layers; l++) {
      const where = [];
      for (let bin = 0; bin < binCount; bin++) {
        const [first, last] = binRange(bin);
        let best = first;
        for (let i = first; i <= last; i++) if (mass[l * count + i] > (mass[l * count + best] || 0)) best = i;
        where.push(best);
      }
      bins.where.push(where);
      bins.z.push(where.map((i) => (Number.isNaN(mass[l * count + i]) ? null : Math.log10(Math.max(mass[l * count + i], scale.low)))));
    }
    return bins;
  }

  function overviewPlot() {
    const { z } = binned();
    const [low, high] = [Math.log10(scale.low), Math.log10(scale.high)];
    const decades = Array.from({ length: Math.floor(high) - Math.ceil(low) + 1 }, (_, i) => Math.ceil(low) + i);
    return {
      traces: [{
        type: "heatmap", z, x: z[0].map((_, bin) => (binRange(bin)[0] + binRange(bin)[1]) / 2), y: Array.from({ length: layers }, (_, i) => i),
        zmin: low, zmax: high, colorscale: plotlyScale(ramps().sequential), hoverinfo: "none", showscale: true,
        colorbar: colourBar("received mass", { tickvals: decades, ticktext: decades.map(decade) }),
      }],
      layout: {
        ...frame(Math.min(420, Math.max(190, layers * (narrow() ? 7 : 9)))),
        xaxis: { title: { text: "position" }, showgrid: false, zeroline: false },
        yaxis: { title: { text: "layer" }, dtick: tickStep(layers, 8), tick0: 0, showgrid: false, zeroline: false, autorange: "reversed" },
      },
    };
  }

  // Long texts are turned in pages, so that the page stays quick at any length.
  function pager() {
    if (count <= PAGE) return null;
    return el("span", {}, el("label", { for: "strip-page" }, "Positions"), " ", el("select", { id: "strip-page", onchange: (event) => { page = Number(event.target.value); write(); } },
      ...Array.from({ length: Math.ceil(count / PAGE) }, (_, i) => el("option", { value: i }, `${number(i * PAGE)} to ${number(Math.min(count, (i + 1) * PAGE) - 1)}`))));
  }

  function write() {
    cursor = null;
    const pieces = [];
    for (let i = page * PAGE; i < Math.min(count, (page + 1) * PAGE); i++) {
      const token = DATA.tokens[i];
      pieces.push(el("span", { "data-i": i, dir: "auto" }, ...lines(token)));
    }
    strip.replaceChildren(...pieces);
    strip.scrollTop = 0;
    colour();
  }

  function colour() {
    const shades = palette(ramps().sequential);
    for (const span of strip.querySelectorAll("span")) {
      const position = Number(span.dataset.i);
      const t = scale.of(at(position));
      const shade = shades[Math.round(255 * t)];
      span.style.backgroundColor = t > 0.03 ? rgb(shade) : "";
      span.style.color = t > 0.03 ? inkOn(shade) : "";
      span.className = isSink(position) ? "sink" : secondary.has(position) ? "secondary" : "";
    }
    paintKey();
    listStrongest();
    if (cursor !== null) read(cursor);
  }

  function paintKey() {
    key.replaceChildren(...[el("span", {}, number(scale.low)), el("i", { class: "ramp", style: `background:${gradient(ramps().sequential)}` }), el("span", {}, `${number(scale.high)} (log)`),
      el("span", { class: "mark" }, el("span", { class: "sink" }, "sink"), named.size ? `, or over ${threshold}` : ` over ${threshold}`),
      secondary.size ? el("span", { class: "mark" }, el("span", { class: "secondary" }, "secondary sink")) : ""]);
  }

  function describe(position) {
    const item = secondary.get(position);
    return [
      el("span", {}, `Position ${number(position)} `, tokenChip(position)),
      `receives ${number(at(position), false)} (${layer < 0 ? "mean over layers" : `layer ${layer}`})`,
      isSink(position) ? "sink" : null,
      item ? `${prose(item.label ?? "secondary sink")} from layer ${number(item.start)} for ${number(item.lifetime)} layers` : null,
    ].filter(Boolean);
  }

  function read(position) {
    reading.replaceChildren(...describe(position).flatMap((line, i) => (i ? [" · ", line] : [line])));
  }

  function point(position) {
    strip.querySelector(".cursor")?.classList.remove("cursor");
    cursor = position;
    const span = strip.querySelector(`[data-i="${position}"]`);
    span?.classList.add("cursor");
    read(position);
    return span;
  }

  function go(position) {
    if (Math.floor(position / PAGE) !== page) {
      page = Math.floor(position / PAGE);
      byId("strip-page").value = page;
      write();
    } else colour();
    const span = point(position);
    if (span) strip.scrollTop = span.offsetTop - strip.clientHeight / 3;
  }

  function listStrongest() {
    const best = Array.from({ length: count }, (_, i) => i).filter((i) => at(i) > 0).sort((a, b) => at(b) - at(a)).slice(0, TOP_TOKENS);
    const most = at(best[0]) || 1;
    strongest.replaceChildren(el("h3", {}, `Tokens that receive most, ${layer < 0 ? "mean over layers" : `layer ${layer}`}`),
      el("ol", { class: "bars two" }, ...best.map((position) => el("li", {},
        el("button", { type: "button", class: "link", onclick: () => go(position) }, ...tokenAt(position)),
        el("span", { class: "bar", "aria-hidden": "true" }, el("span", { style: `width:${(100 * at(position)) / most}%` })),
        el("span", { class: "number" }, number(at(position), false)), el("span", { class: "word" }, isSink(position) ? "sink" : secondary.has(position) ? "secondary" : "")))));
  }

  strip.addEventListener("mousemove", (event) => {
    const position = event.target.dataset?.i;
    if (position === undefined) hideTip();
    else { showTip(event, describe(Number(position))); read(Number(position)); }
  });
  strip.addEventListener("mouseleave", hideTip);
  strip.addEventListener("scroll", hideTip, { passive: true });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20 }[event.key];
    if (!step) return;
    event.preventDefault();
    const [first, last] = [page * PAGE, Math.min(count, (page + 1) * PAGE) - 1];
    const span = point(Math.min(last, Math.max(first, cursor === null ? first : cursor + step)));
    span?.scrollIntoView({ block: "nearest" });
  });
  painters.push(colour);
  write();
});

// The visible parts of a token, with one line break after its last break, so that indentation starts the next line.
function lines(token) {
  const end = Math.max(...["\n", "\r", "\u2028", "\u2029"].map((mark) => token.lastIndexOf(mark))) + 1;
  if (!end) return [visible(token)];
  return [visible(token.slice(0, end)), el("br"), ...(end < token.length ? [visible(token.slice(end))] : [])];
}

function columnMeans(values, rows, columns) {
  return Float64Array.from({ length: columns }, (_, column) => {
    let [sum, seen] = [0, 0];
    for (let row = 0; row < rows; row++) {
      const value = values[row * columns + column];
      if (!Number.isNaN(value)) { sum += value; seen++; }
    }
    return seen ? sum / seen : NaN;
  });
}

// Log positions between the 5th percentile (the quiet tokens) and the largest value.
function logScale(values) {
  const positive = values.filter((value) => value > 0).sort();
  const high = positive[positive.length - 1] ?? 1;
  const low = Math.min(positive[Math.floor(positive.length * 0.05)] ?? high / 10, high / 10);
  const span = Math.log(high / low);
  return { low, high, of: (value) => (value > 0 ? Math.min(1, Math.max(0, Math.log(value / low) / span)) : 0) };
}
