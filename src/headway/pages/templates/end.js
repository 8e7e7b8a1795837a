// The end of every page: the section in view is marked in the navigation, then Plotly is unpacked and draws.

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
