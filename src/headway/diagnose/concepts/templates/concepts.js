// Heads that can be chosen and their texts, the scores, what silencing heads costs, and the skew of retrieval.

const CONCEPT_NAMES = [...new Set(DATA.heads.map(({ concept }) => concept))];
const hueOf = (concept) => CATEGORIES[CONCEPT_NAMES.indexOf(concept) % CATEGORIES.length];
const points = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(1).replace("-", "−")} points` : "–");

// A head's colour: its concept's, the paler the fewer of its texts fit.
function headColour({ concept, score, of }) {
  const paper = channels(ramps().diverging[3]);
  const full = channels(hueOf(concept));
  const share = 0.15 + 0.85 * (score / of) ** 2;
  return paper.map((value, c) => Math.round(value + (full[c] - value) * share));
}

section("heads", (body) => {
  const layers = [...new Set(DATA.heads.map(({ layer }) => layer))];
  const columns = Math.max(...DATA.heads.map(({ head }) => head)) + 1;
  const grid = el("div", { class: "grid", style: `--columns: ${columns}` });
  const chosen = el("div", { class: "chosen", role: "status" });
  let at = DATA.heads.reduce((best, row, i) => (row.score > DATA.heads[best].score ? i : best), 0);
  const show = () => {
    const row = DATA.heads[at];
    grid.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.at) === at)));
    chosen.replaceChildren(
      el("h3", {}, `Layer ${row.layer}, head ${row.head}: ${prose(row.concept)}`),
      el("p", { class: "quiet" }, `${row.score} of ${row.of} texts fit; together they explain ${number(100 * row.explained, false)} % of what the head writes.`),
      el("ol", { class: "texts" }, ...row.texts.map((text, i) => el("li", { class: row.fits[i] ? "fit" : "unfit", dir: "auto" }, prose(text), el("span", { class: "verdict" }, row.fits[i] ? "fits" : "does not fit")))));
  };
  const paint = () => {
    grid.replaceChildren(el("span", {}), ...Array.from({ length: columns }, (_, head) => el("span", { class: "over" }, `head ${head}`)));
    for (const layer of layers) {
      grid.append(el("span", { class: "side" }, `layer ${layer}`));
      DATA.heads.forEach((row, i) => {
        if (row.layer !== layer) return;
        const colour = headColour(row);
        const button = el("button", { type: "button", "data-at": i, onclick: () => { at = i; show(); } }, el("b", {}, String(row.score)), el("span", {}, prose(row.concept)));
        button.style.background = rgb(colour);
        button.style.color = inkOn(colour);
        grid.append(button);
      });
    }
    show();
  };
  painters.push(paint);
  paint();
  const keys = el("ul", { class: "keys" }, ...CONCEPT_NAMES.map((concept) => {
    const mark = el("i");
    mark.style.background = hueOf(concept);
    return el("li", {}, mark, prose(concept));
  }));
  body.append(el("div", { class: "card wide" }, grid, keys, chosen));
});

section("scores", (body) => {
  const node = el("div", { role: "img", "aria-label": "Share of heads by score" });
  plot(node, () => ({
    traces: [{ type: "bar", x: DATA.shares.map((_, k) => k), y: DATA.shares, hoverinfo: "none", marker: { color: css("--bar") } }],
    layout: { height: 220, margin: { l: 58, r: 12, t: 8, b: 42 }, bargap: 0.35, xaxis: { title: { text: "Concept Consistency Score" }, dtick: 1, zeroline: false }, yaxis: { title: { text: "share of heads" }, tickformat: ".0%", rangemode: "tozero" } },
  }), () => tipFor(node, ({ x, y }) => [`Score ${x}`, `${number(100 * y, false)} % of the heads`]));
  const ratio = Number.isFinite(DATA.concentrated)
    ? `Concentrated concept ratio: ${number(DATA.concentrated, false)}, the concepts that more than one high head holds over the number of high heads.`
    : "No head is high, so there is no concentrated concept ratio.";
  body.append(el("p", { class: "lead" }, `All of the texts fit: high. At most a fifth: low. ${ratio}`), el("figure", { class: "card wide" }, node));
});

section("silenced", (body) => {
  const compared = DATA.effects.filter(({ equal }) => equal);
  const parts = [el("p", { class: "lead" }, "Mean drop over the questions. At equal count, as many heads of a set are silenced as there are other heads in the same layers; points are random draws.")];
  if (compared.length) {
    const node = el("div", { role: "img", "aria-label": "Drop at equal count by set; the table below holds the means" });
    plot(node, () => equalPlot(compared), () => tipFor(node, ({ customdata, x }) => [customdata, points(x)]));
    parts.push(el("figure", { class: "card wide" }, node));
  }
  const rows = DATA.effects.map(({ label, heads, drop, equal }) => [prose(label), heads, points(drop), equal ? equal.count : "–", equal ? points(equal.own) : "–", equal ? points(equal.other) : "–"]);
  parts.push(el("div", { class: "card wide" }, table(["set", "heads", "all of them", "at equal count", "of the set", "others"], rows)));
  if (DATA.against) parts.push(el("p", { class: "quiet" }, `${DATA.against.count} random high heads cost ${points(DATA.against.own)}, ${DATA.against.count} low heads ${points(DATA.against.other)}.`));
  body.append(...parts);
});

function equalPlot(compared) {
  const sets = [["heads of the set", 0, css("--accent")], ["other heads of the same layers", 1, css("--bar")]];
  return {
    traces: sets.map(([name, side, colour]) => {
      const dots = compared.flatMap(({ label, equal }, row) => equal.draws[side].map((x) => [x, row + (side ? 0.14 : -0.14), `${prose(label)}: ${name}`]));
      return { type: "scatter", mode: "markers", name, x: dots.map(([x]) => x), y: dots.map(([, y]) => y), customdata: dots.map(([, , words]) => words), hoverinfo: "none", marker: { size: 9, color: colour, opacity: 0.75 } };
    }),
    layout: {
      height: 74 + 44 * compared.length, showlegend: true, legend: legendAbove(), hovermode: "closest", margin: { l: 96, r: 12, t: 34, b: 42 },
      xaxis: { title: { text: "drop in accuracy" }, tickformat: ".1%", rangemode: "tozero" }, yaxis: { tickvals: compared.map((_, i) => i), ticktext: compared.map(({ label }) => plain(label)), autorange: "reversed", showgrid: false, zeroline: false },
    },
  };
}

section("questions", (body) => {
  const rows = DATA.effects.filter(({ concept }) => concept);
  const names = Object.keys(DATA.accuracy);
  const node = el("div", { role: "img", "aria-label": "Drop on each question by the concept whose heads are silenced" });
  plot(node, () => {
    const values = rows.map(({ drops }) => names.map((name) => drops[name][0]));
    const most = Math.max(...values.flat().map(Math.abs), 1e-9);
    const shape = frame(Math.max(44 * rows.length, 120), { labels: 60 });
    return {
      traces: [{ type: "heatmap", z: values, x: names.map(plain), y: rows.map(({ label, heads }) => plain(`${label} (${heads})`)), zmin: -most, zmax: most, colorscale: plotlyScale(ramps().diverging), hoverinfo: "none", xgap: 2, ygap: 2, colorbar: colourBar("drop in accuracy", { tickformat: ".1%" }) }],
      layout: { ...shape, margin: { ...shape.margin, l: 110 }, xaxis: { title: { text: "question" }, showgrid: false }, yaxis: { autorange: "reversed", showgrid: false } },
    };
  }, () => tipFor(node, ({ x, y, z }) => [`${y} silenced, asked for ${x}`, points(z)]));
  body.append(el("p", { class: "lead" }, "A row silences the heads of one concept, how many stands beside it; a column is a question. If heads did only what their texts say, the diagonal alone would be warm."), el("figure", { class: "card wide" }, node));
});

section("skew", (body) => {
  const node = el("div", { role: "img", "aria-label": "Mean MaxSkew with each set silenced" });
  plot(node, () => {
    const rows = DATA.skew.map((row, i) => ({ ...row, i }));
    return {
      traces: [{
        type: "scatter", mode: "markers", x: rows.map(({ value }) => value), y: rows.map(({ i }) => i), hoverinfo: "none", marker: { size: 10, color: rows.map(({ i }) => (i ? css("--bar") : css("--accent"))) },
        error_x: { type: "data", symmetric: false, array: rows.map(({ value, high }) => (high ?? value) - value), arrayminus: rows.map(({ value, low }) => value - (low ?? value)), color: css("--muted"), thickness: 1.5, width: 4 },
      }],
      layout: { height: 60 + 36 * rows.length, hovermode: "closest", margin: { l: 130, r: 12, t: 8, b: 42 }, xaxis: { title: { text: "mean MaxSkew (nats)" }, rangemode: "tozero" }, yaxis: { tickvals: rows.map(({ i }) => i), ticktext: rows.map(({ label }) => plain(label)), autorange: "reversed", showgrid: false, zeroline: false } },
    };
  }, () => tipFor(node, ({ pointIndex }) => {
    const { label, value, low, high } = DATA.skew[pointIndex];
    return [prose(label), `${number(value, false)} nats${Number.isFinite(low) ? ` (${number(low, false)} to ${number(high, false)})` : ""}`];
  }));
  body.append(el("p", { class: "lead" }, "How far the groups among the retrieved pictures differ from their shares among all: 0 is none, ln 2 means one group is found twice as often. Short lists are skewed by chance alone, so compare with lists drawn blindly. Bars are 95 % intervals over the prompts."), el("figure", { class: "card wide" }, node));
});
