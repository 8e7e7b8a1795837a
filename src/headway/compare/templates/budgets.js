// Each quality and each cost by budget, one line per method; dense is the dotted line.

section("budgets", (body) => {
  const budgets = [...new Set(DATA.points.map(({ budget }) => budget).filter(isKnown))].sort((a, b) => a - b);
  if (!budgets.length) {
    body.append(el("p", { class: "quiet" }, "No method was given a budget."));
    return;
  }
  const curves = [
    ...DATA.qualities.map(({ name, label, higher }) => ({ label, name, what: higher ? "higher is better" : "lower is better", of: (point) => point.values[name] })),
    ...DATA.costs.map(({ name, label }) => ({ label, name, what: name === "density" ? "share of pairs read" : "multiples of dense", of: (point) => [point.costs[name], null, null] })),
  ];
  const cards = curves.map((curve) => {
    const node = el("div", { role: "img", "aria-label": `${prose(curve.label)} by budget; the table above holds the numbers` });
    plot(node, () => budgetPlot(curve, budgets), () => tipFor(node, (point) => pointLines(DATA.points[point.customdata])));
    return el("figure", { class: "card" }, el("figcaption", {}, el("h3", {}, prose(curve.label)), el("p", { class: "about" }, curve.what)), node);
  });
  body.append(el("p", { class: "lead" }, "A budget is the share of the keys that is read, stored or kept, as each method takes it."),
    el("div", { class: "columns charts" }, ...cards), keys());
});

function budgetPlot({ of, name }, budgets) {
  const scale = scaleOf(name, DATA.points.map((point) => of(point)[0]));
  const traces = METHODS.flatMap((method) => {
    const points = DATA.points.map((point, i) => ({ ...point, i })).filter((point) => point.method === method && isKnown(point.budget) && isKnown(of(point)[0]));
    points.sort((a, b) => a.budget - b.budget);
    if (!points.length) return [];
    const colour = colourOf(method);
    const x = points.map(({ budget }) => budget);
    return [{
      type: "scatter", mode: "lines+markers", x, y: points.map((point) => scale.to(of(point)[0])), customdata: points.map(({ i }) => i), hoverinfo: "none",
      line: { color: colour, width: 2 }, marker: { symbol: symbolOf(method), size: 9, color: colour }, cliponaxis: false,
    }];
  });
  const dense = of(DATA.points[0])[0];
  const shapes = isKnown(dense) ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: scale.to(dense), y1: scale.to(dense), line: { color: css("--muted"), width: 1, dash: "dot" } }] : [];
  return {
    traces,
    layout: {
      height: 250, hovermode: "closest", margin: { l: 56, r: 14, t: 8, b: 42 }, shapes,
      xaxis: { type: "log", title: { text: "budget" }, tickvals: budgets, ticktext: budgets.map(share), showgrid: false, zeroline: false },
      yaxis: { zeroline: false, ...scale.axis },
    },
  };
}
