// The data of the page, and the small tools that every section uses. Text reaches the page as text nodes only.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Builds a section when the page has it. A result of an unexpected shape costs its own section, not the page.
function section(name, build) {
  const body = byId(`${name}-body`);
  if (!body) return;
  try {
    build(body);
  } catch (error) {
    console.error(error);
    body.append(el("p", { class: "quiet" }, `The rest of this section could not be drawn: ${error.message}.`));
  }
}

// An element with attributes, listeners (`onclick`) and children; strings become text.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// A number for reading: three significant digits, thousands apart, an en dash for "not measured". `whole`: print it as
// an integer; a column of fractions passes false, so that its ones and zeros look like the rest.
function number(value, whole = Number.isInteger(value)) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e9)) return powerOfTen(value);
  return (whole || value === 0 || size >= 1e3 ? Math.round(value).toLocaleString("en") : value.toPrecision(3)).replace("-", "−");
}

function powerOfTen(value) {
  const [digits, power] = value.toExponential(2).split("e");
  return `${digits.replace("-", "−")}×10${raised(Number(power))}`;
}

const raised = (power) => String(power).replace(/[-\d]/g, (sign) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign] ?? "⁻");

// The label of a power of ten on an axis.
const decade = (power) => (power > 3 || power < -3 ? `10${raised(power)}` : String(Number((10 ** power).toPrecision(1))));

// Units follow the number, except those that only name what a bare number is.
const SILENT_UNITS = new Set(["", "share", "cosine", "score", "ratio", "fraction", "mass", "probability", "rate", "correlation", "kurtosis"]);

function measure(value, unit, whole) {
  return !SILENT_UNITS.has(unit ?? "") && unit.length <= 10 && Number.isFinite(value) ? `${number(value, whole)}\u00a0${prose(unit)}` : number(value, whole);
}

const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

// A token with everything invisible made visible. The joiner inside a joined emoji is left at work.
function visible(text) {
  if (text === "") return "∅";
  return text.replace(INVISIBLE, (character) => {
    const code = character.charCodeAt(0);
    if (character === "\n") return "↵";
    if (character === "\t") return "⇥";
    if (code === 0x200d && text.length > 1) return character;
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

// A token for a table or a tip: visible, cut, its outer spaces shown.
function shown(text, longest = 40) {
  const clear = visible(text).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
  const letters = Array.from(clear);
  return letters.length > longest ? `${letters.slice(0, longest).join("")}…` : clear;
}

// Free text inside a sentence of the page.
const prose = (text) => (text === "" ? "" : visible(String(text)));

function bytes(text) {
  const raw = atob(text);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

// One tip for the whole page. `lines` are strings or nodes; the first is the heading.
function showTip(event, lines) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line, i) => el(i ? "div" : "strong", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const x = event.clientX + 14 + width > innerWidth - 8 ? Math.max(8, event.clientX - width - 14) : event.clientX + 14;
  const y = event.clientY + 16 + height > innerHeight - 8 ? Math.max(8, event.clientY - height - 12) : event.clientY + 16;
  tip.style.left = `${x}px`;
  tip.style.top = `${y}px`;
}

const hideTip = () => { byId("tip").hidden = true; };
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, { passive: true });

// A table; a column of numbers stands to the right.
function table(headings, rows, caption) {
  const isNumber = headings.map((_, column) => rows.length > 0 && rows.every((cells) => typeof cells[column] === "number"));
  const isWhole = headings.map((_, column) => rows.every((cells) => Number.isInteger(cells[column])));
  return el("div", { class: "scroll" }, el("table", {},
    caption ? el("caption", {}, caption) : null,
    el("thead", {}, el("tr", {}, ...headings.map((heading, i) => el("th", { scope: "col", class: isNumber[i] ? "number" : null }, heading)))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell, i) =>
      el("td", { class: isNumber[i] ? "number" : null }, typeof cell === "number" ? number(cell, isNumber[i] ? isWhole[i] : undefined) : cell)))))));
}
