// The rest of the free-form numbers, the first choice of a head, and Plotly.

section("more", (body) => {
  for (const [heading, record, drawn] of [["Sinks", DATA.sinks, ["positions", "sentence"]], ["Roles", DATA.roles, ["sentence"]]]) {
    if (Object.keys(record).length) {
      const sentence = record.sentence ? el("p", { class: "about" }, prose(record.sentence)) : null;
      body.append(el("div", { class: "card wide" }, el("h3", {}, heading), sentence, facts(record, drawn)));
    }
  }
});

const first = DATA.maps[0] ?? { layer: 0, head: 0 };
if (DATA.grid.layers && DATA.grid.heads) choose(first.layer, first.head);

const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    links.forEach((link) => link.removeAttribute("aria-current"));
    links.get(target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
document.querySelectorAll("main > section").forEach((part) => watcher.observe(part));

loadPlotly().then(drawAll).catch((error) => {
  for (const { node } of PLOTS) node.replaceChildren(el("p", { class: "quiet" }, `This plot could not be drawn: ${error.message}.`));
}).finally(() => document.documentElement.setAttribute("data-ready", ""));
