// Secondary sinks: what the analysis found, each part only when it is there.

const SHOWN_LIFETIMES = 40;
const PRIMARY_WORDS = { jump: "jump of its norm", typical: "norm of other tokens there" };

section("secondary", (body) => {
  const found = DATA.secondary;
  const drawn = ["found", "sentence", "reason", "primary", "levels", "tokens", "stages", "triggers", "intervention", "score"];
  const sentence = found.sentence ?? found.reason ?? (found.found === false ? "No secondary sink was found." : null);
  if (sentence) body.append(el("p", { class: "lead" }, prose(sentence)));
  const cards = [];
  const add = (heading, about, ...parts) => cards.push(el("div", { class: "card" }, el("h3", {}, heading), about ? el("p", { class: "about" }, about) : null, ...parts));

  if (isRecord(found.primary)) {
    const { position, start, end, ...rest } = found.primary;
    const where = Number.isInteger(position) ? [tokenChip(position), ` at position ${number(position)}`] : [];
    const range = Number.isFinite(start) && Number.isFinite(end) ? `, in layers ${start} to ${end - 1}` : "";
    const renamed = Object.fromEntries(Object.entries(rest).map(([key, value]) => [PRIMARY_WORDS[key] ?? key, value]));
    add("Primary sink", null, el("p", {}, ...where, range, "."), facts(renamed));
  }
  const tokens = Array.isArray(found.tokens) ? found.tokens.filter(isRecord) : [];
  if (tokens.length) lifetimes(tokens, add);
  const levels = [found.levels, found.levels?.levels].find((list) => Array.isArray(list) && list.some(isRecord));
  if (levels) add("Levels", "A level is the layer at which a sink starts and how many layers it lasts.", recordTable(levels.filter(isRecord)));
  if (isRecord(found.score) && Object.keys(found.score).length) {
    add("Sink score", "Attention received per query, by layer.", isCurves(found.score) ? curves(found.score) : facts(found.score));
  }
  if (isRecord(found.stages) && Object.keys(found.stages).length) stages(found.stages, add);
  if (Array.isArray(found.intervention) && found.intervention.length) intervention(found.intervention, add);
  if (found.triggers && Object.keys(found.triggers).length) {
    const triggers = Array.isArray(found.triggers) ? found.triggers.filter(isRecord) : [found.triggers];
    add("What triggers them", "Tokens that became sinks against the same tokens elsewhere that did not.", ...triggers.map((trigger) => facts(trigger)));
  }
  body.append(el("div", { class: "stacked" }, ...cards));
  leftovers(body, found, drawn);
});

function lifetimes(tokens, add) {
  const ordered = [...tokens].sort((a, b) => (a.start ?? 0) - (b.start ?? 0) || a.position - b.position);
  const some = ordered.slice(0, SHOWN_LIFETIMES);
  const kinds = [...new Set(ordered.map((item) => item.label ?? "sink"))];
  const node = el("div", { role: "img", "aria-label": "Layers in which each token is a sink; the table below holds the numbers" });
  const heightOf = some.length * 17 + 76;
  plot(node, () => ({
    traces: kinds.map((kind, i) => {
      const mine = some.map((item, row) => ({ item, row })).filter(({ item }) => (item.label ?? "sink") === kind);
      return {
        type: "bar", orientation: "h", name: plain(kind), y: mine.map(({ row }) => row), base: mine.map(({ item }) => item.start), x: mine.map(({ item }) => item.lifetime),
        marker: { color: CATEGORIES[i % CATEGORIES.length] }, hoverinfo: "none", customdata: mine.map(({ row }) => row),
      };
    }),
    layout: {
      height: heightOf, barmode: "overlay", bargap: 0.35, showlegend: kinds.length > 1, margin: { l: 10, r: 10, t: 30, b: 40 },
      legend: legendAbove(),
      xaxis: { title: { text: "layer" }, range: [0, DATA.grid.layers || undefined], dtick: tickStep(DATA.grid.layers, 10), zeroline: false },
      yaxis: {
        range: [some.length - 0.5, -0.5], showgrid: false, zeroline: false, automargin: true, tickvals: some.map((_, row) => row), tickfont: { size: 11 },
        ticktext: some.map((item) => plain(`${shown(String(item.token ?? DATA.tokens[item.position] ?? ""), 10)}  ${item.position}`)),
      },
    },
  }), (element) => {
    tipFor(element, (point) => {
      const item = some[point.customdata];
      return [el("span", {}, ...tokenAt(item.position)), `${prose(item.label ?? "sink")}: layers ${item.start} to ${item.start + item.lifetime - 1}`];
    });
  });
  const rows = ordered.slice(0, LONGEST_TABLE).map((item) => [
    item.position, el("code", { class: "token", dir: "auto" }, shown(String(item.token ?? DATA.tokens[item.position] ?? ""))), item.start, item.lifetime, prose(item.label ?? ""),
  ]);
  const more = ordered.length > some.length ? ` The first ${some.length} of ${ordered.length}.` : "";
  add("Lifetimes", `The layers in which each token is a sink.${more}`, node,
    el("details", {}, el("summary", {}, `${number(ordered.length)} tokens as a table`), table(["position", "token", "start", "lifetime", "kind"], rows)));
}

// Cosines by stage: one set of bars, or a line for each layer that writes sinks.
function stages(values, add) {
  const nested = Object.values(values).every(isRecord);
  const rows = nested ? Object.entries(values) : [["", values]];
  const names = [...new Set(rows.flatMap(([, row]) => Object.keys(row)))];
  const text = rows.map(([layer, row]) => `${layer} ${names.map((name) => `${prose(name)} ${number(row[name])}`).join(", ")}`).join("; ");
  const node = el("div", { role: "img", "aria-label": text });
  const lowest = Math.min(0, ...rows.flatMap(([, row]) => Object.values(row)).filter(Number.isFinite));
  const bars = (row) => ({
    type: "bar", x: names.map((_, i) => i), y: names.map((name) => row[name]), marker: { color: CATEGORIES[0] },
    text: names.map((name) => number(row[name])), textposition: "outside", cliponaxis: false, hoverinfo: "skip", textfont: { color: css("--ink") },
  });
  const line = ([layer, row], i) => ({
    type: "scatter", mode: "lines+markers", name: plain(`layer ${layer}`), x: names.map((_, n) => n), y: names.map((name) => row[name]),
    line: { color: CATEGORIES[i % CATEGORIES.length], width: 2 }, marker: { size: 6 }, cliponaxis: false, hovertemplate: "%{y:.3f}",
  });
  plot(node, () => ({
    traces: rows.length > 1 ? rows.map(line) : [bars(rows[0][1])],
    layout: {
      height: 250, margin: { l: 48, r: 10, t: rows.length > 1 ? 12 + 18 * Math.ceil(rows.length / 4) : 22, b: 28 }, bargap: 0.4, showlegend: rows.length > 1, legend: legendAbove(),
      xaxis: { tickvals: names.map((_, i) => i), ticktext: names.map((name) => plain(name.replace(/_/g, " "))), showgrid: false, zeroline: false },
      yaxis: { title: { text: "cosine" }, range: [lowest - 0.02, 1.02] },
    },
  }));
  add("Where it is written", "Cosine between a secondary sink and the primary sink, stage by stage through the MLP.", node);
}

function intervention(rows, add) {
  const node = el("div", { role: "img", "aria-label": "Sink score and lifetime by the norm of the MLP output" });
  const ordered = rows.filter((row) => Number.isFinite(row.norm)).sort((a, b) => a.norm - b.norm);
  const line = (key, axis, colour, dash) => ({
    type: "scatter", mode: "lines+markers", name: key, x: ordered.map((row) => row.norm), y: ordered.map((row) => row[key]), yaxis: axis,
    line: { color: colour, width: 2, dash }, marker: { size: 6 }, cliponaxis: false, hovertemplate: "%{y:.4~g}",
  });
  plot(node, () => ({
    traces: [
      ...(ordered.some((row) => Number.isFinite(row.score)) ? [line("score", "y", CATEGORIES[0], "solid")] : []),
      ...(ordered.some((row) => Number.isFinite(row.lifetime)) ? [line("lifetime", "y2", CATEGORIES[5], "dash")] : []),
    ],
    layout: {
      height: 280, showlegend: true, hovermode: "x unified", margin: { l: 56, r: 56, t: 34, b: 42 },
      legend: legendAbove(),
      xaxis: { title: { text: "norm of the MLP output" }, showgrid: false, zeroline: false, unifiedhovertitle: { text: "norm %{x}" } },
      yaxis: { title: { text: "sink score" }, rangemode: "tozero" },
      yaxis2: { title: { text: "lifetime (layers)" }, overlaying: "y", side: "right", rangemode: "tozero", showgrid: false },
    },
  }));
  add("Does the norm decide?", "The MLP output of the sink is rescaled; the sink's score and lifetime follow.", node,
    el("details", {}, el("summary", {}, "As a table"), recordTable(rows)));
}
