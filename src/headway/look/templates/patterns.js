// Patterns: how many heads of each kind, which RoPE pairs carry the energy, and how the derived bounds did.

section("patterns", (body) => {
  const patterns = DATA.patterns;
  const drawn = ["sentence", "counts", "channels", "bounds"];
  if (patterns.sentence) body.append(el("p", { class: "lead" }, prose(patterns.sentence)));
  const cards = [];
  if (isRecord(patterns.counts) && Object.keys(patterns.counts).length) cards.push(patternCounts(patterns.counts));
  if (isRecord(patterns.channels) && Array.isArray(patterns.channels.energy) && patterns.channels.energy.length) cards.push(channelEnergy(patterns.channels));
  body.append(el("div", { class: cards.length > 1 ? "columns uneven" : "" }, ...cards));
  if (Array.isArray(patterns.bounds) && patterns.bounds.some(isRecord)) {
    const rows = patterns.bounds.filter(isRecord);
    body.append(el("div", { class: "card wide" }, el("h3", {}, "Bounds"),
      el("p", { class: "about" }, "How far attention scores changed in one step, and how far the similarity of queries and keys lets them."),
      layerCurves(rows) ?? recordTable(rows)));
  }
  leftovers(body, patterns, drawn);
});

function patternCounts(counts) {
  const grid = GRIDS.find((item) => item.kind === "word" && Object.keys(counts).every((word) => item.words.includes(word)));
  const names = Object.keys(counts).sort((a, b) => counts[b] - counts[a]);
  const most = Math.max(...Object.values(counts), 1);
  const colour = (name) => (grid ? wordColour(grid.words.indexOf(name)) : CATEGORIES[0]);
  return el("div", { class: "card" }, el("h3", {}, "Heads of each pattern"), el("ol", { class: "bars" }, ...names.map((name) => el("li", {},
    el("span", {}, prose(name)), el("span", { class: "bar", "aria-hidden": "true" }, el("span", { style: `width:${Math.max(1, (100 * counts[name]) / most)}%;background:${colour(name)}` })),
    el("span", { class: "number" }, number(counts[name])), grid?.meaning[name] ? el("span", { class: "meaning" }, prose(grid.meaning[name])) : null))));
}

function channelEnergy({ layers, periods, energy }) {
  const node = el("div", { id: "channel-energy", role: "img", "aria-label": "Share of the query-key energy of each RoPE pair, by layer" });
  const rows = Array.isArray(layers) && layers.length === energy.length ? layers : energy.map((_, i) => i);
  const pairs = energy[0].map((_, i) => i);
  const period = (pair) => (Array.isArray(periods) && Number.isFinite(periods[pair]) ? number(periods[pair]) : null);
  const most = Math.max(...energy.flat().filter(Number.isFinite), 0) || 1;
  const step = tickStep(pairs.length, narrow() ? 5 : 9);
  const ticks = pairs.filter((pair) => pair % step === 0);
  plot(node, () => ({
    traces: [{
      type: "heatmap", z: energy, x: pairs, y: rows.map((_, i) => i), zmin: 0, zmax: most, colorscale: plotlyScale(ramps().sequential), hoverinfo: "none",
      xgap: 1, ygap: 1, showscale: true, colorbar: colourBar("share of energy"),
    }],
    layout: {
      ...frame(Math.min(420, Math.max(220, rows.length * 11)), { labels: 58 }),
      xaxis: { title: { text: periods ? "RoPE pair, and its period in tokens" : "RoPE pair" }, showgrid: false, zeroline: false, tickvals: ticks, ticktext: ticks.map((pair) => (period(pair) ? `${pair}<br>${period(pair)}` : String(pair))) },
      yaxis: { title: { text: "layer" }, showgrid: false, zeroline: false, autorange: "reversed", tickvals: rows.map((_, i) => i).filter((i) => i % tickStep(rows.length, 8) === 0), ticktext: rows.filter((_, i) => i % tickStep(rows.length, 8) === 0).map(String) },
    },
  }), (element) => {
    tipFor(element, (point) => [
      `Layer ${rows[point.y]}, pair ${point.x}`, period(point.x) ? `period ${period(point.x)} tokens` : "RoPE pair", `share of energy ${number(point.z, false)}`]);
  });
  return el("div", { class: "card" }, el("h3", {}, "RoPE channels"), el("p", { class: "about" }, "Which rotary pairs carry the product of query and key norms. Short periods turn with every token, long ones hardly at all."), node);
}
