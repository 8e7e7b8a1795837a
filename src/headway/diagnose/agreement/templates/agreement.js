// Texts with what each method marks, the table of agreement, and whether agreeing and being right go together.

const wordsOf = Object.fromEntries(DATA.methods.map((m) => [m.name, m.words]));
const labels = DATA.methods.map((m) => m.name.replace(/_/g, " "));
const FAMILIES = ["attention", "gradient", "perturbation"];
const familyColour = (family) => CATEGORIES[FAMILIES.indexOf(family)] ?? CATEGORIES[7];
const measureName = DATA.measure === "kendall" ? "τ" : DATA.measure;
const interval = (m) => (m === null ? "–" : `${number(m.value, false)}${Number.isFinite(m.low) ? ` (${number(m.low, false)} to ${number(m.high, false)})` : ""}`);

section("texts", (body) => {
  let text = DATA.texts[0];
  const verdict = el("p", { class: "verdict", role: "status", dir: "auto" });
  const rows = el("div", { class: "rows" });
  const fill = () => {
    const gold = text.label === null ? "" : text.label === text.predicted ? ", which is right" : `; it is “${prose(text.label)}”`;
    verdict.textContent = `The model says “${prose(text.predicted)}” (${number(text.output, false)})${gold}.`;
    rows.replaceChildren(...DATA.methods.flatMap((m) => [
      el("span", { class: "method" }, m.words),
      el("div", { class: "words", dir: "auto" }, ...text.tokens.flatMap((token, i) => [text.joined[i] ? null : " ", tokenNode(m, token, i)]).filter((part) => part !== null)),
    ]));
  };
  const tokenNode = (m, token, i) => {
    const share = text.scores[m.name][i];
    const kind = ["token", text.out[i] ? "out" : "", text.rationale?.[i] ? "decides" : ""].filter(Boolean).join(" ");
    const node = el("span", { class: kind, onmousemove: (event) => showTip(event, [shown(token), m.words, `score ${number(share, false)} of the largest`]), onmouseleave: hideTip }, visible(token));
    if (!text.out[i]) {
      const colour = colourAt(share < 0 ? [...ramps().diverging].slice(0, 4).reverse() : ramps().sequential, Math.abs(share) * 0.8);
      node.style.background = rgb(colour);
      node.style.color = inkOn(colour);
    }
    return node;
  };
  painters.push(fill);
  fill();
  const choice = DATA.texts.length < 2 ? null : el("div", { class: "controls" }, el("label", {}, "Text ", el("select", {
    "aria-label": "Text", onchange: (event) => { text = DATA.texts[Number(event.target.value)]; fill(); },
  }, ...DATA.texts.map(({ name }, i) => el("option", { value: i }, prose(name))))));
  body.append(...[choice, el("div", { class: "card wide" }, verdict, rows)].filter(Boolean));
});

section("agreement", (body) => {
  const count = labels.length;
  const map = (table, title) => {
    const node = el("div", { role: "img", "aria-label": title });
    plot(node, () => ({
      traces: [{ type: "heatmap", x: labels, y: labels, z: table, zmin: -1, zmax: 1, colorscale: plotlyScale(ramps().diverging), hoverinfo: "none", xgap: 1, ygap: 1, colorbar: colourBar(measureName),
        text: table.map((row) => row.map((v) => (Number.isFinite(v) && count <= 14 && !narrow() ? v.toFixed(2).replace("-", "−") : ""))), texttemplate: "%{text}", textfont: { size: 11 } }],
      layout: { ...frame(34 * count, { labels: 108 }), margin: { l: narrow() ? 110 : 140, r: narrow() ? 8 : 88, t: 6, b: narrow() ? 150 : 108 }, xaxis: { tickangle: -45, showgrid: false, zeroline: false }, yaxis: { autorange: "reversed", showgrid: false, zeroline: false } },
    }), () => tipFor(node, ({ x, y, z }) => pairLines(labels.indexOf(x), labels.indexOf(y), z)));
    return node;
  };
  const pairLines = (i, j, value) => (i === j
    ? [DATA.methods[i].words, `with itself under another seed: ${number(value, false)}`]
    : [`${DATA.methods[i].words} and ${DATA.methods[j].words}`, `${measureName} ${number(value, false)}`, `corrected for their own noise: ${number(DATA.table.corrected[i][j], false)}`, `top quarter alone: ${number(DATA.table.top[i][j], false)}`]);
  const top = el("details", {}, el("summary", {}, "The same for the quarter of the tokens on top"));
  let drawn = false;
  top.addEventListener("toggle", () => { if (top.open && !drawn) { drawn = true; top.append(map(DATA.table.top, "Agreement on the tokens on top")); } });
  const chance = DATA.controls.chance;
  body.append(
    el("p", { class: "lead" }, `Mean rank correlation of the token scores of two methods over the texts. The diagonal holds what a method that draws at random has with itself under another seed: its noise ceiling.${chance ? ` Of two random orders of ${number(Math.floor(DATA.controls.items))} tokens, 95 % lie within ${number(chance[0], false)} and ${number(chance[1], false)}.` : ""}`),
    el("figure", { class: "card wide" }, map(DATA.table.tau, "Agreement of each two methods"), top));
});

section("right", (body) => {
  const known = DATA.methods.filter((m) => m.auroc !== null);
  const score = known.length ? (m) => m.auroc?.value : (m) => m.excess?.value;
  const title = known.length ? "area under the curve against the words that decide" : "drop of the output beyond random tokens";
  const node = el("div", { role: "img", "aria-label": "Agreement with others against being right" });
  plot(node, () => ({
    traces: FAMILIES.map((family) => {
      const mine = DATA.methods.filter((m) => m.family === family && Number.isFinite(score(m)) && Number.isFinite(m.with_others));
      return { type: "scatter", mode: "markers+text", name: family, x: mine.map((m) => m.with_others), y: mine.map(score), text: mine.map((m) => m.name.replace(/_/g, " ")), textposition: "top center", textfont: { size: 11, color: css("--muted") }, hoverinfo: "none", customdata: mine.map((m) => m.name), marker: { size: 11, color: familyColour(family) }, cliponaxis: false };
    }),
    layout: { height: narrow() ? 340 : 420, showlegend: true, legend: legendAbove(), hovermode: "closest", margin: { l: 62, r: 24, t: 44, b: 48 }, xaxis: { title: { text: `mean ${measureName} with the other methods` }, zeroline: false }, yaxis: { title: { text: narrow() ? "" : title }, zeroline: false } },
  }), () => tipFor(node, ({ customdata }) => {
    const m = DATA.methods.find(({ name }) => name === customdata);
    return [m.words, `agrees with others by ${number(m.with_others, false)}`, `${title}: ${number(score(m), false)}`];
  }));
  const headings = ["method", "with others", ...(known.length ? ["AUROC", "average precision"] : []), "taken out", "kept alone", "beyond random"];
  const rows = DATA.methods.map((m) => [m.words, number(m.with_others, false), ...(known.length ? [interval(m.auroc), interval(m.precision)] : []), interval(m.comprehensiveness), interval(m.sufficiency), interval(m.excess)]);
  body.append(
    el("p", { class: "lead" }, "To the right: methods that agree with the others. Up: methods that are right. If agreement told who is right, the points would rise to the right."),
    el("figure", { class: "card wide" }, node),
    el("p", { class: "lead" }, "Taken out: how much the output falls when the best tokens become the baseline, averaged over shares of 5 to 50 %; large is good. Kept alone: how much it falls when only they are left; small is good. Beyond random: the first, less what random tokens do. Intervals are over texts."),
    el("div", { class: "card wide" }, table(headings, rows)));
});

section("controls", (body) => {
  const { controls } = DATA;
  const rows = DATA.methods.map((m) => [m.words, m.ceiling === null ? "exact" : interval(m.ceiling), interval(m.position), interval(m.frequency), Number.isFinite(m.near_ties) ? number(m.near_ties, false) : "–", Number.isFinite(m.completeness) ? number(m.completeness, false) : "–"]);
  const facts = [
    ["mean over pairs of methods", number(controls.pairs, false)],
    ["the same with special tokens ranked the other way (in or out)", number(controls.pairs_other_special, false)],
    ["random scores with the first method", interval(controls.random)],
    ...Object.entries(controls.baselines).map(([kind, tau]) => [`integrated gradients with themselves from the ${kind} baseline`, interval(tau)]),
  ];
  body.append(
    el("p", { class: "lead" }, "Another seed: agreement of a method with itself; exact methods draw nothing. Earlier, rarer: agreement with “earlier tokens matter more” and “rarer tokens matter more”. Near ties: share of pairs of tokens within 1 % of the range. Completeness: median error of what should add up, relative to the change of the output."),
    el("div", { class: "card wide" }, table(["method", "another seed", "earlier", "rarer", "near ties", "completeness error"], rows)),
    el("div", { class: "card wide" }, table(["control", measureName], facts)));
});

section("people", (body) => {
  const { people } = DATA;
  const name = (method) => people.words[method] ?? wordsOf[method] ?? method;
  const rows = Object.entries(people.preferred).map(([method, won]) => [name(method), interval(won), won.n]);
  const pairs = people.pairs.map(({ first, second, won }) => [name(first), name(second), interval(won), won.n]);
  body.append(
    el("p", { class: "lead" }, `${people.people.length} people gave ${people.answers} answers, ${people.ties} of them ties. Krippendorff's α between people: ${number(people.alpha, false)}. The same answer to a question that came again: ${interval(people.consistency)}. The left one was taken: ${interval(people.left)}, 0.5 when the side decides nothing. What people find convincing need not be what the model used.`),
    el("div", { class: "card wide" }, table(["method", "preferred", "comparisons"], rows)),
    el("div", { class: "card wide" }, table(["first", "second", "first preferred", "comparisons"], pairs)));
});
