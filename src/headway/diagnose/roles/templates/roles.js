// Marks of turns, drift of heads with the focal ones ringed, and the controls beside them.

const NAMES = Object.keys(DATA.dimensions);
const interval = (m) => (m === null || m === undefined ? "–" : `${number(m.value, false)}${Number.isFinite(m.low) ? ` (${number(m.low, false)} to ${number(m.high, false)})` : ""}`);
const condition = (name) => (name === "" ? "no condition" : prose(name));

function scoreRows(marks) {
  return marks.judges.flatMap((judge) => [
    ...(judge.all ? [[judge.name, "all turns", judge.all]] : []),
    ...(judge.conditions.length > 1 ? judge.conditions.map((row) => [judge.name, condition(row.name), row]) : []),
    ...(judge.roles.length > 1 ? judge.roles.map((row) => [judge.name, shown(row.name, 60), row]) : []),
  ]).map(([judge, group, row]) => [prose(judge), group, interval(row.score), ...NAMES.map((name) => number(row.dimensions[name], false)), row.turns, row.queries]);
}

function marksTables(marks, body) {
  body.append(el("div", { class: "card wide" }, table(["judge", "turns of", "score, 1 to 5", ...NAMES, "turns", "conversations"], scoreRows(marks))));
  body.append(el("p", { class: "quiet" }, NAMES.map((name) => `${name}: ${DATA.dimensions[name]}`).join(" · ")));
  if (marks.lost.length) {
    body.append(el("p", { class: "lead" }, "What a condition costs, over conversations that stand under both."),
      el("div", { class: "card wide" }, table(["judge", "from", "to", "lower by"], marks.lost.map((one) => [prose(one.judge), condition(one.before), condition(one.after), interval(one.value)]))));
  }
  for (const pair of marks.agreement) {
    body.append(el("p", { class: "lead" }, `How far judges ${prose(pair.first)} and ${prose(pair.second)} agree on ${pair.turns} turns: 1 is perfect, 0 is chance.`),
      el("div", { class: "card wide" }, table(["mark", "κ", "κ, quadratic weights", "Spearman ρ", "mean difference"], [...NAMES, "all"].map((name) => [name, number(pair.kappa[name], false), number(pair.weighted_kappa[name], false), interval(pair.spearman[name]), number(pair.difference[name], false)]))));
  }
}

function markChip(name, value) {
  const chip = el("span", { class: "mark", title: DATA.dimensions[name] ?? "" }, `${name} ${number(value, false)}`);
  const paint = () => {
    const colour = colourAt(ramps().sequential, 0.15 + 0.8 * (5 - value) / 4);
    chip.style.background = rgb(colour);
    chip.style.color = inkOn(colour);
  };
  painters.push(paint);
  paint();
  return chip;
}

function turnList(marks) {
  return el("ul", { class: "turns" }, ...marks.turns.map((turn) => {
    const judged = Object.entries(turn.marks);
    const reasons = judged.flatMap(([judge, one]) => (one.invalid ? [`${judge}: no valid mark, ${one.invalid}`] : Object.entries(one.reasons).filter(([, why]) => why && why !== "no rule was given" && why !== "expected mark").map(([name, why]) => `${name}: ${why}`)));
    return el("li", {},
      el("div", { class: "who" }, el("strong", { dir: "auto" }, shown(turn.role, 80)), el("span", { dir: "auto" }, `${prose(turn.conversation)}${turn.condition ? `, ${prose(turn.condition)}` : ""}${turn.line ? `, line ${turn.line}` : ""}`),
        ...judged.flatMap(([judge, one]) => [judged.length > 1 ? el("span", {}, prose(judge)) : null, ...NAMES.filter((name) => name in one.scores).map((name) => markChip(name, one.scores[name]))])),
      turn.question ? el("p", { class: "why", dir: "auto" }, lines(turn.question)) : null,
      el("p", { class: "words", dir: "auto" }, lines(turn.reply)),
      reasons.length ? el("p", { class: "why", dir: "auto" }, prose(reasons.join(" · "))) : null);
  }));
}

// Text of several lines, each made visible.
const lines = (text) => text.split("\n").map(prose).join("\n");

section("marks", (body) => {
  body.append(el("p", { class: "lead" }, "Every turn is marked from 1 to 5 in four dimensions, averaged within a conversation and then over conversations, with the 95 % interval over conversations."));
  marksTables(DATA.log, body);
});

section("turns", (body) => {
  const { turns, all } = DATA.log;
  body.append(el("p", { class: "lead" }, turns.length < all ? `The ${turns.length} turns with the lowest marks, of ${all}.` : "All turns, lowest marks first."), el("div", { class: "card wide" }, turnList(DATA.log)));
});

section("replies", (body) => {
  body.append(el("p", { class: "lead" }, "What the model itself answers when the message agrees with the rule and when it contradicts it. The rule judge marks CC, the constraint; it knows no rules for the other dimensions and gives them 3."));
  marksTables(DATA.replies, body);
  body.append(el("details", {}, el("summary", {}, "The replies"), el("div", { class: "card wide" }, turnList(DATA.replies))));
});

section("heads", (body) => {
  const { layers, scores, control, relations, parts, focal } = DATA.heads;
  const choices = {
    score: ["Drift score", scores],
    ...Object.fromEntries(Object.entries(relations).map(([name, values]) => [`relation ${name}`, [`Drift score, ${name}`, values]])),
    magnitude: ["Magnitude: change of the output's length", parts.magnitude],
    direction: ["Direction: turn of the output", parts.direction],
    distribution: ["Distribution: change of the attention", parts.distribution],
    control: ["Drift score without a conflict (same words)", control],
  };
  let chosen = "score";
  const node = el("div", { role: "img", "aria-label": "Drift by layer and head; focal heads are ringed" });
  const redraw = plot(node, () => {
    const values = choices[chosen][1];
    const [count, heads] = [layers.length, values[0].length];
    const rows = new Map(layers.map((layer, row) => [layer, row]));
    const ring = { type: "scatter", mode: "markers", x: focal.map(([layer]) => rows.get(layer)), y: focal.map(([, head]) => head), hoverinfo: "skip", marker: { symbol: "circle-open", size: 9, color: css("--accent"), line: { width: 2 } } };
    const step = tickStep(count);
    return {
      traces: [{ type: "heatmap", z: values[0].map((_, head) => values.map((row) => row[head])), colorscale: plotlyScale(ramps().sequential), hoverinfo: "none", colorbar: colourBar(chosen.includes("relation") || ["score", "control"].includes(chosen) ? "mean rank" : chosen) }, ring],
      layout: { ...frame(Math.min(Math.max(22 * heads, 140), 480)), xaxis: { title: { text: "layer" }, tickvals: layers.map((_, i) => i).filter((i) => i % step === 0), ticktext: layers.filter((_, i) => i % step === 0).map(String), range: [-0.5, count - 0.5], showgrid: false, zeroline: false }, yaxis: { title: { text: "head" }, dtick: tickStep(heads), range: [-0.5, heads - 0.5], showgrid: false, zeroline: false } },
    };
  }, () => tipFor(node, ({ x, y, z }) => [`Layer ${layers[x]}, head ${y}`, `${choices[chosen][0]}: ${number(z, false)}`, focal.some(([layer, head]) => layer === layers[x] && head === y) ? "focal" : "not focal"]));
  const select = el("select", { "aria-label": "What is shown", onchange: (event) => { chosen = event.target.value; redraw(); } }, ...Object.entries(choices).map(([name, [words]]) => el("option", { value: name }, words)));
  body.append(
    el("p", { class: "lead" }, "How much each head changes when a message contradicts the rule. Magnitude, direction and distribution are ranked over all heads; the score is the mean rank, 1 for the head that changes most. Rings are the focal heads."),
    el("div", { class: "controls" }, el("label", {}, "Show ", select)),
    el("figure", { class: "card wide" }, node));
});

section("controls", (body) => {
  const { kinds, gates, neutral, conflict, held_out: names } = DATA.heads;
  const silenced = el("div", { role: "img", "aria-label": "Effect of silencing focal heads beside control sets" });
  plot(silenced, () => ({
    traces: [
      { type: "scatter", mode: "markers", x: gates.by_control, y: gates.by_control.map(() => "as many others"), hoverinfo: "x", marker: { size: 10, color: css("--bar") } },
      { type: "scatter", mode: "markers", x: [gates.focal.value], y: ["focal heads"], hoverinfo: "x", error_x: Number.isFinite(gates.focal.low) ? { type: "data", symmetric: false, array: [gates.focal.high - gates.focal.value], arrayminus: [gates.focal.value - gates.focal.low], color: css("--accent") } : undefined, marker: { size: 11, color: css("--accent") } },
    ],
    layout: { height: 170, margin: { l: 110, r: 12, t: 8, b: 42 }, hovermode: "closest", xaxis: { title: { text: "change of which rule wins, nats a token" }, rangemode: "tozero" }, yaxis: { automargin: true, range: [-0.6, 1.6] } },
  }));
  const margins = el("div", { role: "img", "aria-label": "Margins of held-out cases in agreement and in conflict" });
  plot(margins, () => ({
    traces: [
      { type: "scatter", mode: "lines", x: names.flatMap((_, i) => [neutral[i], conflict[i], null]), y: names.flatMap((_, i) => [i, i, null]), hoverinfo: "skip", line: { color: css("--line"), width: 2 } },
      { type: "scatter", mode: "markers", name: "in agreement", x: neutral, y: names.map((_, i) => i), hoverinfo: "none", marker: { size: 9, color: css("--bar") } },
      { type: "scatter", mode: "markers", name: "in conflict", x: conflict, y: names.map((_, i) => i), hoverinfo: "none", marker: { size: 9, color: css("--accent") } },
    ].map((trace, i) => ({ ...trace, showlegend: i > 0 })),
    layout: { height: 90 + 22 * names.length, showlegend: true, legend: legendAbove(), hovermode: "closest", margin: { l: narrow() ? 8 : 190, r: 12, t: 34, b: 42 }, xaxis: { title: { text: "margin for the rule, nats a token" }, zeroline: true, zerolinecolor: css("--muted") }, yaxis: { autorange: "reversed", showticklabels: !narrow(), tickvals: names.map((_, i) => i), ticktext: names.map(plain), showgrid: false, zeroline: false } },
  }), () => tipFor(margins, ({ y }) => [names[y], `in agreement: ${number(neutral[y], false)}`, `in conflict: ${number(conflict[y], false)}`]));
  body.append(
    el("p", { class: "lead" }, "Held-out cases: the probability of an answer that obeys the rule, over that of an answer that obeys the message. Right of zero the rule wins."),
    el("figure", { class: "card wide" }, margins),
    el("p", { class: "lead" }, "What silencing heads does to these margins in conflict: focal heads, and random sets of as many heads in the same layers."),
    el("figure", { class: "card wide" }, silenced),
    el("p", { class: "lead" }, "Focal heads on held-out cases by kind: drift in a conflict, beside drift under the same words where they contradict nothing."),
    el("div", { class: "card wide" }, table(["kind", "relation", "direction", "without conflict", "distribution", "without conflict", "magnitude", "without conflict"],
      kinds.map((row) => [row.kind, row.relation, ...["direction", "distribution", "magnitude"].flatMap((part) => [number(row[part], false), number(row[`${part}_control`], false)])]))));
});

section("alignment", (body) => {
  const { rows, steps, weights } = DATA.alignment;
  const node = el("div", { role: "img", "aria-label": "Preference loss by step" });
  plot(node, () => ({
    traces: rows.map((row, i) => ({ type: "scatter", mode: "lines+markers", name: row.name, x: row.losses.map((_, step) => step + 1), y: row.losses, line: { color: CATEGORIES[i % CATEGORIES.length] }, hoverinfo: "name+y" })),
    layout: { height: 280, showlegend: true, legend: legendAbove(), margin: { l: 58, r: 12, t: 34, b: 42 }, xaxis: { title: { text: "step" }, zeroline: false, dtick: tickStep(steps) }, yaxis: { title: { text: "preference loss" } } },
  }));
  body.append(
    el("p", { class: "lead" }, `${steps} steps of LoRA with ${weights} token weights on the focal layers, on as many random and least moved ones, and on all. Gains are changes of held-out margins towards the rule, in nats a token; the first two in conflict, the last in agreement, where nothing should be lost.`),
    el("div", { class: "card wide" }, table(["layers", "which", "parameters", "kinds trained on", "other kinds", "in agreement"], rows.map((row) => [row.name, row.layers.length > 8 ? `${row.layers.length} layers` : row.layers.join(", "), row.parameters, interval(row.seen), interval(row.unseen), interval(row.agreement)]))),
    el("figure", { class: "card wide" }, node));
});
