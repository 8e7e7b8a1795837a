// A trace as sentences that can be chosen, the arcs between them, the causal matrix, and the heads that look back.

let trace = DATA.traces[0];
let chosen = null;
const followers = [];

const flatten = (text) => prose(text.replace(/\s+/g, " ").trim());
const short = (text, longest = 90) => {
  const letters = Array.from(flatten(text));
  return letters.length > longest ? `${letters.slice(0, longest).join("")}…` : letters.join("");
};
const scoreLines = (i) => Object.entries(DATA.titles).filter(([name]) => Number.isFinite(trace.scores[name][i]))
  .map(([name, words]) => `${words}: ${number(trace.scores[name][i], false)}`);
const sentenceLines = (i) => [`Sentence ${i}`, short(trace.sentences[i], 220), trace.categories[i], ...scoreLines(i)];
const sourcesOf = (i) => trace.edges.filter(([, target]) => target === i).map(([source]) => source);
const targetsOf = (i) => trace.edges.filter(([source]) => source === i).map(([, target]) => target);

function choose(i) {
  chosen = chosen === i ? null : i;
  followers.forEach((follow) => follow());
}

function choices() {
  if (DATA.traces.length < 2) return null;
  const select = el("select", { "aria-label": "Trace", onchange: (event) => {
    trace = DATA.traces[Number(event.target.value)];
    chosen = null;
    followers.forEach((follow) => follow(true));
  } }, ...DATA.traces.map(({ name }, i) => el("option", { value: i }, prose(name))));
  return el("div", { class: "controls" }, el("label", {}, "Trace ", select));
}

// Where a score stands between the least and the most of its trace, 0 to 1.
function standing(values, i) {
  const known = values.filter(Number.isFinite);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  return Number.isFinite(values[i]) && high > low ? (values[i] - low) / (high - low) : null;
}

section("trace", (body) => {
  const list = el("ul", { class: "sentences" });
  const detail = el("p", { class: "detail", role: "status" });
  const prompt = el("p", { class: "prompt", dir: "auto" });
  const fill = () => {
    prompt.textContent = visibleProse(trace.prompt);
    list.replaceChildren(...trace.sentences.map((sentence, i) => {
      const place = standing(trace.scores.effect, i);
      const mark = el("span", { class: "mark" });
      if (place !== null) mark.style.background = rgb(colourAt(ramps().sequential, 0.1 + 0.9 * place));
      const pick = () => choose(i);
      return el("li", {
        role: "button", tabindex: 0, "aria-pressed": String(chosen === i), onclick: pick,
        onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(); } },
      }, el("span", { class: "at" }, String(i)), mark, el("span", { class: "words", dir: "auto" }, flatten(sentence)), el("span", { class: "kind" }, trace.categories[i]));
    }));
    light();
  };
  const light = () => {
    [...list.children].forEach((row, i) => {
      row.setAttribute("aria-pressed", String(chosen === i));
      row.classList.toggle("source", chosen !== null && sourcesOf(chosen).includes(i));
      row.classList.toggle("target", chosen !== null && targetsOf(chosen).includes(i));
    });
    detail.replaceChildren(...(chosen === null ? ["No sentence is chosen."] : [
      `Sentence ${chosen} rests most on ${sourcesOf(chosen).join(" and ") || "no earlier sentence in particular"}, and is among the strongest sources of ${targetsOf(chosen).join(", ") || "no later one"}. ${scoreLines(chosen).join(" · ")}${placeText(chosen)}`,
      el("span", { class: "key source" }), "rests on", el("span", { class: "key target" }), "rests on it",
    ]));
  };
  followers.push((anew) => (anew ? fill() : light()));
  painters.push(fill);
  fill();
  body.append(...[choices()].filter(Boolean), el("div", { class: "card wide" }, el("details", {}, el("summary", {}, "The prompt"), prompt), list, detail));
});

// Text of several lines, each made visible.
function visibleProse(text) {
  return text.split("\n").map(prose).join("\n");
}

function placeText(i) {
  const [low, high] = trace.null[i] ?? [];
  return Number.isFinite(low) ? ` (other sentences at this place: ${number(low, false)} to ${number(high, false)})` : "";
}

section("graph", (body) => {
  if (!DATA.traces.some(({ edges }) => edges.length)) {
    body.append(el("p", { class: "quiet" }, "No sentence rests on another more than on average."));
    return;
  }
  const node = el("div", { role: "img", "aria-label": "Arcs between sentences; the causal matrix below holds the numbers" });
  const redraw = plot(node, graphPlot, () => {
    tipFor(node, ({ customdata }) => (customdata.length > 1
      ? [`Sentence ${customdata[0]} → ${customdata[1]}`, `effect ${number(customdata[2], false)} above the average`, short(trace.sentences[customdata[0]]), short(trace.sentences[customdata[1]])]
      : sentenceLines(customdata[0])));
    node.on("plotly_click", ({ points }) => { if (points[0].customdata.length === 1) choose(points[0].customdata[0]); });
  });
  followers.push(redraw);
  body.append(el("p", { class: "lead" }, "Sentences from left to right. An arc goes from a sentence to one of the two it changes most when hidden; points are larger where more hangs on them. Choose a point to see its arcs alone."), el("figure", { class: "card wide" }, node));
});

function graphPlot() {
  const count = trace.sentences.length;
  const strongest = Math.max(...trace.edges.map(([, , weight]) => weight), 1e-9);
  const arcs = trace.edges.map(([source, target, weight]) => {
    const steps = Array.from({ length: 25 }, (_, i) => (Math.PI * i) / 24);
    const [middle, radius] = [(source + target) / 2, (target - source) / 2];
    const on = chosen === null || chosen === source || chosen === target;
    const colour = chosen === source ? css("--accent") : css("--bar");
    return {
      type: "scatter", mode: "lines", x: steps.map((a) => middle - radius * Math.cos(a)), y: steps.map((a) => radius * Math.sin(a)), hoverinfo: "none",
      customdata: steps.map(() => [source, target, weight]), line: { width: 1 + 3.5 * (weight / strongest), color: colour }, opacity: on ? 0.75 : 0.08,
    };
  });
  const places = trace.sentences.map((_, i) => standing(trace.scores.effect, i));
  const points = {
    type: "scatter", mode: "markers+text", x: places.map((_, i) => i), y: places.map(() => 0), hoverinfo: "none", customdata: places.map((_, i) => [i]), cliponaxis: false,
    text: places.map((_, i) => (count <= 40 || i % 5 === 0 ? String(i) : "")), textposition: "bottom center", textfont: { color: css("--muted"), size: 10 },
    marker: { size: places.map((p) => 7 + 12 * (p ?? 0)), color: places.map((_, i) => (i === chosen ? css("--accent") : css("--ink"))), line: { width: 1, color: css("--card") } },
  };
  const reach = Math.max(...trace.edges.map(([source, target]) => target - source), 1) / 2;
  return {
    traces: [...arcs, points],
    layout: {
      height: narrow() ? 260 : 340, hovermode: "closest", margin: { l: 16, r: 16, t: 8, b: 34 },
      xaxis: { visible: false, range: [-0.7, count - 0.3] }, yaxis: { visible: false, range: [-0.14 * reach - 0.1, reach * 1.05 + 0.1] },
    },
  };
}

section("matrix", (body) => {
  const node = el("div", { role: "img", "aria-label": "Effect of hiding each sentence on each later one" });
  const redraw = plot(node, () => {
    const count = trace.sentences.length;
    const known = trace.matrix.flat().filter(Number.isFinite);
    const most = Math.max(...known.map(Math.abs), 1e-9);
    const ticks = { tickmode: "linear", dtick: tickStep(count), showgrid: false, zeroline: false };
    const shape = frame(Math.min(Math.max(18 * count, 200), 620));
    return {
      traces: [{ type: "heatmap", z: trace.matrix, zmin: -most, zmax: most, colorscale: plotlyScale(ramps().diverging), hoverinfo: "none", xgap: 1, ygap: 1, colorbar: colourBar("effect above the row's average") }],
      layout: { ...shape, xaxis: { ...ticks, title: { text: "hidden sentence" } }, yaxis: { ...ticks, autorange: "reversed", title: { text: "sentence that changes" } } },
    };
  }, () => tipFor(node, ({ x, y, z }) => [`Sentence ${x} → ${y}: ${number(z, false)}`, short(trace.sentences[x]), short(trace.sentences[y])]));
  followers.push((anew) => { if (anew) redraw(); });
  body.append(el("p", { class: "lead" }, "A row is a sentence, a column what was hidden from it. Each row is taken minus its own mean, so warm cells are what the sentence needs more than the rest. The effect is the mean logarithm of the change in predicted tokens."), el("figure", { class: "card wide" }, node));
});

section("heads", (body) => {
  const node = el("div", { role: "img", "aria-label": "Kurtosis by layer and head" });
  plot(node, () => {
    const [layers, heads] = [DATA.kurtosis.length, DATA.kurtosis[0].length];
    const ring = { type: "scatter", mode: "markers", x: DATA.receivers.map(([layer]) => layer), y: DATA.receivers.map(([, head]) => head), hoverinfo: "skip", marker: { symbol: "circle-open", size: 9, color: css("--accent"), line: { width: 2 } } };
    return {
      traces: [{ type: "heatmap", x: DATA.layers, z: DATA.kurtosis[0].map((_, head) => DATA.kurtosis.map((row) => row[head])), colorscale: plotlyScale(ramps().sequential), hoverinfo: "none", colorbar: colourBar("kurtosis") }, ring],
      layout: { ...frame(Math.min(Math.max(22 * heads, 140), 480)), xaxis: { title: { text: "layer" }, dtick: tickStep(layers), showgrid: false, zeroline: false }, yaxis: { title: { text: "head" }, dtick: tickStep(heads), showgrid: false, zeroline: false } },
    };
  }, () => tipFor(node, ({ x, y, z }) => [`Layer ${x}, head ${y}`, `kurtosis ${number(z, false)}`]));
  const received = el("div", { role: "img", "aria-label": "Receiver score by sentence" });
  const redraw = plot(received, receiverPlot, () => tipFor(received, ({ x }) => [...sentenceLines(x), placeText(x).trim()].filter(Boolean)));
  followers.push((anew) => { if (anew) redraw(); });
  body.append(
    el("p", { class: "lead" }, "Kurtosis is high where a head's far looks back all go to a few sentences. Rings are the receiver heads."),
    el("figure", { class: "card wide" }, node),
    el("p", { class: "lead" }, "Attention that each sentence draws from the receiver heads, as points. The bar behind is what other sentences draw when they stand at that place: inside it, the place explains the score."),
    el("figure", { class: "card wide" }, received));
});

function receiverPlot() {
  const values = trace.scores.receiver;
  const known = trace.null.map((row, i) => [i, ...row]).filter(([, low]) => Number.isFinite(low));
  if (!values.some(Number.isFinite)) {
    return { traces: [], layout: { height: 80, xaxis: { visible: false }, yaxis: { visible: false }, annotations: [{ text: "This trace is too short for receiver scores.", showarrow: false, font: { color: css("--muted") } }] } };
  }
  return {
    traces: [
      { type: "bar", x: known.map(([i]) => i), y: known.map(([, low, high]) => high - low), base: known.map(([, low]) => low), hoverinfo: "none", marker: { color: css("--hole") } },
      { type: "scatter", mode: "markers", x: values.map((_, i) => i), y: values, hoverinfo: "none", marker: { size: 9, color: values.map((v, i) => (v > (trace.null[i]?.[1] ?? Infinity) ? css("--accent") : css("--bar"))) } },
    ],
    layout: { height: 260, hovermode: "closest", margin: { l: 58, r: 12, t: 8, b: 42 }, xaxis: { title: { text: "sentence" }, zeroline: false, dtick: tickStep(values.length) }, yaxis: { title: { text: "mean attention" }, rangemode: "tozero" } },
  };
}

section("methods", (body) => {
  const words = ({ rho }) => `${number(rho.value, false)}${Number.isFinite(rho.low) ? ` (${number(rho.low, false)} to ${number(rho.high, false)})` : ""}`;
  const parts = [
    el("p", { class: "lead" }, "Rank correlation between methods over the sentences, with its 95 % interval. They ask different questions and need not agree."),
    el("div", { class: "card wide" }, table(["method", "and", "Spearman ρ", "sentences"], DATA.agreement.map((pair) => [DATA.methods[pair.first], DATA.methods[pair.second], words(pair), pair.rho.n]))),
  ];
  if (DATA.categories.length) {
    const rows = DATA.categories.map(([name, m]) => [name, number(m.value, false), Number.isFinite(m.low) ? `${number(m.low, false)} to ${number(m.high, false)}` : "–", m.n]);
    parts.push(el("p", { class: "lead" }, "Effect of hiding a sentence by what the sentence does, in nats above the average of the sentences it acts on."), el("div", { class: "card wide" }, table(["category", "mean effect", "95 % interval", "sentences"], rows)));
  }
  body.append(...parts);
});
