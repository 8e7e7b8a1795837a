// The head grids: a gallery of all metrics, the chosen one large, its strongest heads, and everything about one head.

const TOP_HEADS = 12;

// Metrics and labels in one list, so that one switcher serves both.
const GRIDS = [
  ...DATA.heads.map((metric) => ({ ...metric, kind: "number" })),
  ...DATA.labels.map((item) => ({ ...item, kind: "word", family: "patterns", unit: "", description: "" })),
];

// Words in the order of their meanings, then by first appearance.
function wordList(grid) {
  return [...new Set([...Object.keys(grid.meaning), ...grid.values.flat()])].filter((word) => word !== "" && word !== null);
}

const wordColour = (index) => CATEGORIES[index % CATEGORIES.length];
const finite = (grid) => grid.values.flat().filter((value) => Number.isFinite(value));

// The range of colours: from zero for amounts, symmetric around zero for differences.
function extent(grid) {
  const values = finite(grid);
  const largest = Math.max(...values.map(Math.abs), 0) || 1;
  return grid.scale === "diverging" ? [-largest, largest] : [Math.min(0, ...values), Math.max(...values, 0) || 1];
}

function cellColour(grid, value) {
  if (grid.kind === "word") {
    const index = grid.words.indexOf(value);
    return index < 0 ? null : channels(wordColour(index));
  }
  if (!Number.isFinite(value)) return null;
  const [low, high] = grid.range;
  return colourAt(grid.scale === "diverging" ? ramps().diverging : ramps().sequential, (value - low) / (high - low));
}

for (const grid of GRIDS) {
  if (grid.kind === "word") grid.words = wordList(grid);
  else {
    grid.range = extent(grid);
    grid.whole = finite(grid).every(Number.isInteger);
  }
}

function thumbnail(grid) {
  const { layers, heads } = DATA.grid;
  const canvas = el("canvas", { width: layers, height: heads, "aria-hidden": "true" });
  const paint = () => {
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, layers, heads);
    grid.values.forEach((row, layer) => row.forEach((value, head) => {
      const colour = cellColour(grid, value);
      if (!colour) return;
      pen.fillStyle = rgb(colour);
      pen.fillRect(layer, head, 1, 1);
    }));
  };
  painters.push(paint);
  paint();
  return canvas;
}

function gallery(onChange) {
  const titles = Object.fromEntries(DATA.families);
  const families = [...new Set([...Object.keys(titles), ...GRIDS.map((grid) => grid.family)])];
  return el("div", { class: "gallery", role: "group", "aria-label": "Metric" }, ...families.map((family) => {
    const members = GRIDS.map((grid, index) => ({ grid, index })).filter(({ grid }) => grid.family === family);
    if (!members.length) return null;
    return el("fieldset", {}, el("legend", {}, prose(titles[family] ?? family)), el("div", { class: "thumbs" },
      ...members.map(({ grid, index }) => el("div", { class: "thumb" },
        el("input", { type: "radio", name: "metric", id: `metric-${index}`, value: index, checked: index === 0, onchange: () => onChange(index) }),
        el("label", { for: `metric-${index}` }, thumbnail(grid), el("span", {}, prose(grid.label)))))));
  }));
}

function intervalText(grid, layer, head) {
  const [low, high] = [grid.low?.[layer]?.[head], grid.high?.[layer]?.[head]];
  return Number.isFinite(low) && Number.isFinite(high) ? `${number(low, grid.whole)} to ${number(high, grid.whole)}` : null;
}

section("heads", (body) => {
  const { layers, heads } = DATA.grid;
  let current = GRIDS[0];
  let bright = null;
  const heading = el("h3", { id: "metric-title" });
  const about = el("p", { class: "about" });
  const chart = el("div", { id: "head-grid", role: "img" });
  const legend = el("div", { class: "legend" });
  const top = el("div", { id: "top-heads" });
  const spread = el("div", { role: "img", "aria-label": "How many heads have which value" });
  const card = el("div", { id: "head-card" });
  body.append(
    el("p", { class: "lead" }, `Each small picture is one measure over all ${number(layers * heads)} heads: layers run left to right, heads top to bottom. Choose one to see it large; choose a cell to see everything about that head.`),
    gallery((index) => { current = GRIDS[index]; bright = null; update(); }),
    el("div", { class: "card wide" }, heading, about, chart, legend),
    el("div", { class: "columns" }, el("div", { class: "card" }, top, spread), el("div", { class: "card" }, card)));

  const redraw = plot(chart, build, (node) => {
    tipFor(node, (point) => tipLines(point.x, point.y));
    node.on("plotly_click", ({ points: [point] }) => choose(point.x, point.y));
  });

  function tipLines(layer, head) {
    const value = current.values[layer][head];
    const words = wordsOf(layer, head).map(prose);
    if (current.kind === "word") return [headName(layer, head), prose(value || "no label"), prose(current.meaning[value] ?? "")].filter(Boolean);
    const interval = intervalText(current, layer, head);
    return [
      headName(layer, head),
      Number.isFinite(value) ? `${prose(current.label)}: ${measure(value, current.unit, current.whole)}` : "not measured here",
      interval ? `95 % interval ${interval}` : null,
      words.length ? `pattern: ${words.join(", ")}` : null,
    ].filter(Boolean);
  }

  function build() {
    const columns = Array.from({ length: layers }, (_, i) => i);
    const rows = Array.from({ length: heads }, (_, i) => i);
    const cell = Math.round(Math.min(narrow() ? 16 : 30, Math.max(7, 460 / heads)));
    const trace = {
      type: "heatmap", x: columns, y: rows, hoverinfo: "none", hoverongaps: true,
      xgap: layers > 48 ? 0.5 : 1.5, ygap: heads > 48 ? 0.5 : 1.5, ...(current.kind === "word" ? wordTrace(rows) : numberTrace(rows)),
    };
    const gap = 0.5;
    return {
      traces: [trace],
      layout: {
        ...frame(rows.length * cell, { bar: current.kind === "number" }),
        xaxis: { title: { text: "layer" }, dtick: tickStep(layers, narrow() ? 7 : 16), tick0: 0, showgrid: false, zeroline: false, range: [-gap, layers - gap] },
        yaxis: { title: { text: "head" }, dtick: tickStep(heads, 10), tick0: 0, showgrid: false, zeroline: false, range: [heads - gap, -gap] },
        shapes: [{
          type: "rect", x0: chosen.layer - gap, x1: chosen.layer + gap, y0: chosen.head - gap, y1: chosen.head + gap,
          line: { color: css("--accent"), width: 2.5 },
        }],
      },
    };
  }

  function numberTrace(rows) {
    const ramp = current.scale === "diverging" ? ramps().diverging : ramps().sequential;
    const [low, high] = current.range;
    return {
      z: rows.map((head) => current.values.map((row) => row[head])), zmin: low, zmax: high,
      colorscale: plotlyScale(ramp), showscale: true, colorbar: colourBar(current.unit),
    };
  }

  function wordTrace(rows) {
    const faint = css("--hole");
    const colours = current.words.map((word, i) => (bright === null || bright === word ? wordColour(i) : faint));
    const count = Math.max(colours.length, 1);
    const scale = colours.flatMap((colour, i) => [[i / count, colour], [(i + 1) / count, colour]]);
    return {
      z: rows.map((head) => current.values.map((row) => { const i = current.words.indexOf(row[head]); return i < 0 ? null : i; })),
      zmin: -0.5, zmax: count - 0.5, colorscale: scale.length ? scale : undefined, showscale: false,
    };
  }

  // How the heads spread over the values; a line marks the chosen one.
  const redrawSpread = plot(spread, () => {
    const value = current.values[chosen.layer]?.[chosen.head];
    const mark = current.kind === "number" && Number.isFinite(value);
    return {
      traces: current.kind === "number" ? [{
        type: "histogram", x: finite(current), nbinsx: 30, marker: { color: css("--bar") }, hovertemplate: "%{y} heads at %{x}<extra></extra>",
      }] : [],
      layout: {
        height: 190, margin: { l: 40, r: 8, t: 24, b: 40 }, bargap: 0.08,
        xaxis: { title: { text: plain(current.unit ? `${current.label} (${current.unit})` : current.label) }, showgrid: false, zeroline: false },
        yaxis: { title: { text: "heads" } },
        shapes: mark ? [{ type: "line", x0: value, x1: value, yref: "paper", y0: 0, y1: 1, line: { color: css("--accent"), width: 2 } }] : [],
        annotations: mark ? [{
          x: value, y: 1, yref: "paper", yanchor: "bottom", showarrow: false, text: headName(chosen.layer, chosen.head), font: { color: css("--accent"), size: 11 },
        }] : [],
      },
    };
  });

  function headLink(layer, head) {
    return el("button", { type: "button", class: "link", onclick: () => choose(layer, head) }, headName(layer, head));
  }

  function listTop() {
    const cells = current.values.flatMap((row, layer) => row.map((value, head) => ({ layer, head, value })));
    if (current.kind === "word") return listWords(cells);
    const size = current.scale === "diverging" ? Math.abs : (value) => value;
    const best = cells.filter(({ value }) => Number.isFinite(value)).sort((a, b) => size(b.value) - size(a.value)).slice(0, TOP_HEADS);
    const most = size(best[0]?.value ?? 1) || 1;
    return [
      el("h3", {}, current.scale === "diverging" ? "Largest in size" : "Highest heads"),
      el("ol", { class: "bars" }, ...best.map(({ layer, head, value }) => el("li", {},
        headLink(layer, head), bar(size(value) / most), el("span", { class: "number" }, measure(value, current.unit, current.whole)),
        el("span", { class: "word" }, wordsOf(layer, head).map(prose).join(", "))))),
    ];
  }

  function listWords(cells) {
    const counts = current.words.map((word) => cells.filter(({ value }) => value === word).length);
    const most = Math.max(...counts, 1);
    return [
      el("h3", {}, "Heads of each kind"),
      el("ol", { class: "bars" }, ...current.words.map((word, i) => el("li", {},
        el("span", {}, prose(word)), bar(counts[i] / most, wordColour(i)), el("span", { class: "number" }, number(counts[i])), el("span", { class: "word" })))),
    ];
  }

  const bar = (share, colour) => el("span", { class: "bar", "aria-hidden": "true" },
    el("span", { style: `width:${Math.max(1, 100 * share)}%${colour ? `;background:${colour}` : ""}` }));

  function legendFor() {
    if (current.kind === "number") {
      return current.values.flat().some((value) => !Number.isFinite(value)) ? [el("p", { class: "quiet" }, "Empty cell: not measured there.")] : [];
    }
    return current.words.map((word, i) => el("button", {
      type: "button", class: "key", "aria-pressed": String(bright === word),
      onclick: () => { bright = bright === word ? null : word; update(); },
    }, el("i", { style: `background:${wordColour(i)}` }), el("b", {}, prose(word)), el("span", {}, prose(current.meaning[word] ?? ""))));
  }

  function update() {
    heading.textContent = prose(current.label);
    about.textContent = prose(current.kind === "word" ? "One word for each head; choose a word to see only its heads." : current.description);
    chart.setAttribute("aria-label", `${prose(current.label)} for every layer and head; the lists below hold the numbers.`);
    legend.replaceChildren(...legendFor());
    legend.hidden = !legend.childElementCount;
    top.replaceChildren(...listTop());
    spread.hidden = current.kind === "word";
    redraw();
    redrawSpread();
  }

  card.append(...headCard());
  chosen.listeners.push(() => { redraw(); redrawSpread(); });
  update();
});

// Everything known about the chosen head: each measure, its interval, and where the head stands among all heads.
function headCard() {
  const { layers, heads } = DATA.grid;
  const picker = (name, count) => el("select", { id: `pick-${name}`, onchange: () => choose(Number(byId("pick-layer").value), Number(byId("pick-head").value)) },
    ...Array.from({ length: count }, (_, i) => el("option", { value: i }, String(i))));
  const words = el("p", { class: "about" });
  const open = el("p", {});
  const list = el("div", {});
  const sorted = new Map(GRIDS.filter((grid) => grid.kind === "number").map((grid) => [grid, finite(grid).sort((a, b) => a - b)]));

  function row(grid, layer, head) {
    const value = grid.values[layer][head];
    const all = sorted.get(grid);
    const below = all.filter((other) => other < value).length;
    const interval = intervalText(grid, layer, head);
    return el("tr", {},
      el("th", { scope: "row" }, prose(grid.label)),
      el("td", { class: "number", title: interval ? `95 % interval ${interval}` : null }, measure(value, grid.unit, grid.whole)),
      el("td", {}, Number.isFinite(value) ? el("span", { class: "rank", title: `higher than ${below} of ${all.length} heads` },
        el("i", { style: `left:${(100 * below) / Math.max(1, all.length - 1)}%` })) : ""));
  }

  function fill(layer, head) {
    byId("pick-layer").value = layer;
    byId("pick-head").value = head;
    const labels = DATA.labels.map((item) => [item, item.values[layer][head]]).filter(([, word]) => word);
    words.replaceChildren(...labels.flatMap(([item, word], i) => [i ? "; " : "", el("b", {}, prose(word)), item.meaning[word] ? `: ${prose(item.meaning[word])}` : ""]));
    const kept = DATA.maps.some((map) => map.layer === layer && map.head === head);
    open.replaceChildren(kept ? el("a", { href: "#inspector" }, "See its attention map") : el("span", { class: "quiet" }, DATA.maps.length ? `No map was kept for this head (${DATA.maps.length} were kept).` : "No maps were kept."));
    list.replaceChildren(el("table", { class: "ranks" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "measure"), el("th", { scope: "col", class: "number" }, "value"), el("th", { scope: "col" }, "among all heads"))),
      el("tbody", {}, ...GRIDS.filter((grid) => grid.kind === "number").map((grid) => row(grid, layer, head)))));
  }

  chosen.listeners.push(fill);
  return [
    el("h3", { class: "picks" }, el("label", { for: "pick-layer" }, "Layer"), picker("layer", layers), el("label", { for: "pick-head" }, "head"), picker("head", heads)),
    words, open, list,
  ];
}
