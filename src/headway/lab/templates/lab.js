// Arms as points of sink against loss, as bars by column, and as courses of training.

const NAMES = DATA.arms.map(({ name }) => name);
const percentages = new Set(DATA.columns.filter(({ unit }) => unit === "%").map(({ name }) => name));
const scaled = (column, value) => (value === null || value === undefined ? null : percentages.has(column) ? 100 * value : value);
const unitOf = ({ unit, note }) => [unit === "%" ? "%" : "", note].filter(Boolean).join(" ");
const cellText = (arm, { name, unit }) => {
  const [value, low, high] = arm.cells[name] ?? [];
  const short = (x) => `${number(scaled(name, x))}${unit === "%" ? " %" : ""}`;
  return Number.isFinite(low) && low !== high ? `${short(value)} (${short(low)} to ${short(high)})` : short(value);
};
const armLines = (arm) => [prose(arm.name), arm.settings ? prose(arm.settings) : null,
  ...DATA.columns.map((column) => `${column.words}: ${cellText(arm, column)}`)].filter(Boolean);

section("against", (body) => {
  const known = DATA.arms.filter(({ cells }) => Number.isFinite(cells.sink_1?.[0]) && Number.isFinite(cells.loss?.[0]));
  if (!known.length) {
    body.append(el("p", { class: "quiet" }, "No arm has numbers yet."));
    return;
  }
  const at = ({ cells }) => [cells.sink_1[0], cells.loss[0]];
  const beats = ([sink, loss], [otherSink, otherLoss]) => sink <= otherSink && loss <= otherLoss && (sink < otherSink || loss < otherLoss);
  const named = (arm) => arm.name === DATA.baseline || !known.some((other) => beats(at(other), at(arm)));
  const node = el("div", { role: "img", "aria-label": "Loss by sink rate; the table above holds the numbers" });
  plot(node, () => ({
    traces: [{
      type: "scatter", mode: "markers+text", x: known.map(({ cells }) => 100 * cells.sink_1[0]), y: known.map(({ cells }) => cells.loss[0]),
      text: known.map((arm) => (named(arm) ? plain(arm.name) : "")), textposition: "top center", textfont: { color: css("--ink"), size: 11 }, hoverinfo: "none", cliponaxis: false,
      marker: { size: 11, color: known.map(({ name }) => (name === DATA.baseline ? css("--muted") : css("--accent"))), symbol: known.map(({ name }) => (name === DATA.baseline ? "diamond" : "circle")) },
      customdata: known.map(({ name }) => NAMES.indexOf(name)),
    }],
    layout: {
      height: 420, hovermode: "closest", margin: { l: 62, r: 30, t: 28, b: 48 },
      xaxis: { title: { text: "heads that sink into the first token, %" }, zeroline: false }, yaxis: { title: { text: "loss, nats per byte" }, zeroline: false },
    },
  }), () => tipFor(node, (point) => armLines(DATA.arms[point.customdata])));
  body.append(el("p", { class: "lead" }, "Down and to the left is a model that is as good without a sink. The diamond is the baseline; named are the arms that no other beats in both."), el("figure", { class: "card wide" }, node));
});

section("bars", (body) => {
  const cards = DATA.columns.filter(({ name }) => name !== "params").map((column) => {
    const node = el("div", { role: "img", "aria-label": `${prose(column.words)} by arm; the table above holds the numbers` });
    plot(node, () => barPlot(column), () => tipFor(node, (point) => armLines(DATA.arms[point.customdata])));
    return el("figure", { class: "card" }, el("figcaption", {}, el("h3", {}, prose(column.words)), el("p", { class: "about" }, unitOf(column))), node);
  });
  body.append(el("p", { class: "lead" }, "A bar is the mean over seeds, a dot one run."), el("div", { class: "columns charts" }, ...cards));
});

function barPlot({ name }) {
  const order = DATA.arms.map((arm, i) => ({ arm, i })).filter(({ arm }) => Number.isFinite(arm.cells[name]?.[0]));
  const labels = order.map(({ arm }) => plain(arm.name));
  const dots = order.flatMap(({ arm, i }) => (arm.runs[name] ?? []).filter(Number.isFinite).map((value) => ({ label: plain(arm.name), value, i })));
  return {
    traces: [
      { type: "bar", orientation: "h", y: labels, x: order.map(({ arm }) => scaled(name, arm.cells[name][0])), customdata: order.map(({ i }) => i), hoverinfo: "none",
        marker: { color: order.map(({ arm }) => (arm.name === DATA.baseline ? css("--muted") : css("--accent"))), opacity: 0.7 } },
      { type: "scatter", mode: "markers", y: dots.map(({ label }) => label), x: dots.map(({ value }) => scaled(name, value)), customdata: dots.map(({ i }) => i), hoverinfo: "none",
        marker: { color: css("--ink"), size: 5 } },
    ],
    layout: {
      height: 60 + 24 * order.length, hovermode: "closest", bargap: 0.35, margin: { l: narrow() ? 90 : 150, r: 14, t: 6, b: 34 },
      yaxis: { autorange: "reversed", showgrid: false, zeroline: false, automargin: true }, xaxis: { zeroline: true, nticks: 5 },
    },
  };
}

section("course", (body) => {
  const drawn = DATA.arms.map((arm, i) => ({ arm, i })).filter(({ arm }) => arm.course.length);
  if (!drawn.length) {
    body.append(el("p", { class: "quiet" }, "No course of training was kept."));
    return;
  }
  const node = el("div", { role: "img", "aria-label": "Training loss by share of the steps" });
  plot(node, () => ({
    traces: drawn.flatMap(({ arm, i }) => arm.course.map((course) => ({
      type: "scatter", mode: "lines", x: course.map((_, at) => (100 * (at + 1)) / course.length), y: course, customdata: course.map(() => i), hoverinfo: "none",
      line: { width: arm.name === DATA.baseline ? 2.5 : 1.2, color: arm.name === DATA.baseline ? css("--ink") : css("--accent") }, opacity: arm.name === DATA.baseline ? 1 : 0.45,
    }))),
    layout: { height: 340, hovermode: "closest", margin: { l: 62, r: 16, t: 8, b: 46 }, xaxis: { title: { text: "share of the steps, %" }, zeroline: false }, yaxis: { title: { text: "training loss, nats per byte" }, zeroline: false } },
  }), () => tipFor(node, (point) => armLines(DATA.arms[point.customdata])));
  body.append(el("p", { class: "lead" }, "The dark line is the baseline. The mouse over a line names its arm."), el("figure", { class: "card wide" }, node));
});
